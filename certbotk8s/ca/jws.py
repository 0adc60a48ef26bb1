"""Account keys: what they sign (RFC 8555 sections 6.2, 7.3.4, 7.3.5), by `acme` and `josepy`."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from acme.jws import JWS
from acme.messages import Directory as AcmeDirectory
from acme.messages import ExternalAccountBinding
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from josepy.b64 import b64decode, b64encode
from josepy.errors import Error as JwkError
from josepy.jwa import ES256, ES384, RS256, JWASignature
from josepy.jwk import JWK, JWKEC, JWKRSA
from msgspec import json

from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.reasons import Reason

if TYPE_CHECKING:
    from certbotk8s.ports import Binding

# RFC 7518 section 3.1: the signature algorithm that goes with each curve.
_CURVES: dict[str, JWASignature] = {"secp256r1": ES256, "secp384r1": ES384}
_PEM_LIMIT = 13_000
_HMAC_MINIMUM = 16
_HMAC_LIMIT = 1024
_BASE64URL = re.compile(r"[A-Za-z0-9_-]+")


class AccountKey:
    """The private key of an ACME account: EC P-256 or P-384 (ES256, ES384), or RSA (RS256)."""

    def __init__(self, text: bytes) -> None:
        """A key in PEM (PKCS #8, PKCS #1, SEC 1), or a JWK (RFC 7517) as certbot keeps it.

        PermanentError(ACCOUNT_KEY_INVALID) when `text` is no such key.
        """
        if len(text) > _PEM_LIMIT:
            raise _unusable("it is too long for a key")
        try:
            key = _load_jwk(text) if text.lstrip().startswith(b"{") else load_pem_private_key(text, password=None)
        except TypeError as error:
            raise _unusable("it is encrypted") from error
        except (ValueError, UnsupportedAlgorithm, JwkError) as error:
            raise _unusable("it is no private key in PEM, and no JWK, that can be read") from error
        if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
            self._jwk: JWK = JWKEC(key=key)
            self._algorithm = _CURVES[key.curve.name]
        elif isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
            self._jwk = JWKRSA(key=key)
            self._algorithm = RS256
        else:
            raise _unusable("it is neither ECDSA P-256, ECDSA P-384 nor RSA of at least 2048 bits")
        self.thumbprint: str = b64encode(self._jwk.thumbprint()).decode()

    def __repr__(self) -> str:
        return f"AccountKey({self.thumbprint})"

    def sign(self, payload: bytes, *, url: str, nonce: str, account_uri: str = "") -> bytes:
        """A JWS for one POST to `url`; it names the account by its URL, or by the public key where there is none."""
        jws = JWS.sign(payload, self._jwk, self._algorithm, b64decode(nonce), url, account_uri or None)
        return str(jws.json_dumps()).encode()

    def hand_over(self, new: AccountKey, *, url: str, account_uri: str) -> dict[str, Any]:
        """The payload of a keyChange request to `url` that gives the account to the key `new` (section 7.3.5)."""
        old_key = self._jwk.public_key().to_partial_json()
        payload = json.encode({"account": account_uri, "oldKey": old_key})
        return dict(JWS.sign(payload, new._jwk, new._algorithm, None, url).to_partial_json())

    def bind(self, binding: Binding, url: str) -> dict[str, Any]:
        """The `externalAccountBinding` member of a newAccount request to `url`.

        PermanentError(EAB_KEY_INVALID) when the HMAC key's text or the algorithm cannot be used.
        """
        hmac_key = _hmac_key(binding)
        try:
            return ExternalAccountBinding.from_data(
                self._jwk.public_key(),
                binding.key_id,
                hmac_key,
                AcmeDirectory({"newAccount": url}),
                binding.algorithm,
            )
        except ValueError as error:
            raise _unbindable(binding, "its algorithm is none of HS256, HS384 and HS512") from error


@lru_cache(maxsize=256)
def account_key(text: bytes) -> AccountKey:
    """The key of that text, loaded once: checking an RSA key takes longer than a hundred signatures."""
    return AccountKey(text)


def _load_jwk(text: bytes) -> Any:
    """The private key of a JWK. ValueError, or what josepy raises, when it is none."""
    jwk = JWK.json_loads(text.decode())
    if not hasattr(jwk.key, "private_bytes"):
        raise ValueError("it is no private key")
    pem = jwk.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return load_pem_private_key(pem, password=None)


def is_nonce(value: str) -> bool:
    """Whether a Replay-Nonce is base64url as RFC 8555 section 6.5.1 has it; any other must be ignored."""
    if len(value) > 1024 or not _BASE64URL.fullmatch(value) or len(value) % 4 == 1:
        return False
    return bool(b64encode(b64decode(value)) == value.encode())


def _hmac_key(binding: Binding) -> str:
    """The HMAC key as unpadded base64url, from whichever base64 the CA's portal gave."""
    text = binding.hmac_key.decode("latin-1").strip().translate(str.maketrans("+/", "-_"))
    text, padding = text.rstrip("="), len(text) - len(text.rstrip("="))
    if not text:
        raise _unbindable(binding, "it is empty")
    if not _BASE64URL.fullmatch(text):
        raise _unbindable(binding, "it holds characters that are not base64")
    if len(text) % 4 == 1 or padding > 2:
        raise _unbindable(binding, "its length is not that of base64; a part of it may be missing")
    size = len(text) * 3 // 4
    if not _HMAC_MINIMUM <= size <= _HMAC_LIMIT:
        raise _unbindable(binding, f"it is a key of {size} bytes, and {_HMAC_MINIMUM} to {_HMAC_LIMIT} are expected")
    return text


def _unbindable(binding: Binding, what: str) -> PermanentError:
    return PermanentError(
        Reason.EAB_KEY_INVALID,
        f"The HMAC key for external account binding {binding.key_id} cannot be used: {what}. "
        "Put the key into the Secret as the CA gave it (base64url or base64).",
    )


def _unusable(what: str) -> PermanentError:
    return PermanentError(
        Reason.ACCOUNT_KEY_INVALID,
        f"The account key cannot be used: {what}. Restore the Secret that privateKeySecretRef names, "
        "or remove it to get a new account.",
    )
