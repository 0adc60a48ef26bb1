"""Account keys: signatures, thumbprints, external account binding."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from certbotk8s.ca.jws import AccountKey, account_key, is_nonce
from certbotk8s.ca.keys import Keys
from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.reasons import Reason
from certbotk8s.ports import Binding

URL = "https://ca.test/new-account"
SECRET = bytes(range(200, 232))


def pem(key: Any) -> bytes:
    return bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def parts(jws: bytes) -> tuple[dict[str, Any], bytes, bytes, bytes]:
    """Header, payload, what was signed, signature."""
    raw = json.loads(jws)
    assert set(raw) == {"protected", "payload", "signature"}
    signed = f"{raw['protected']}.{raw['payload']}".encode()
    return json.loads(decoded(raw["protected"])), decoded(raw["payload"]), signed, decoded(raw["signature"])


@pytest.mark.parametrize(
    ("curve", "algorithm", "digest"),
    [(ec.SECP256R1(), "ES256", hashes.SHA256()), (ec.SECP384R1(), "ES384", hashes.SHA384())],
)
def test_an_elliptic_key_signs(curve: ec.EllipticCurve, algorithm: str, digest: hashes.SHA256 | hashes.SHA384) -> None:
    """The signature verifies, and the header holds algorithm, nonce, URL and account URL, and no key.

    Mutation: sign with the digest of another curve, or put key and account URL into the header.
    """
    key = ec.generate_private_key(curve)
    jws = AccountKey(pem(key)).sign(b'{"a":1}', url=URL, nonce="nonce_-1", account_uri="https://ca.test/acct/1")
    header, payload, signed, signature = parts(jws)
    assert header == {"alg": algorithm, "nonce": "nonce_-1", "url": URL, "kid": "https://ca.test/acct/1"}
    assert payload == b'{"a":1}'
    half = len(signature) // 2
    r, s = int.from_bytes(signature[:half]), int.from_bytes(signature[half:])
    key.public_key().verify(encode_dss_signature(r, s), signed, ec.ECDSA(digest))


def test_an_rsa_key_signs() -> None:
    """RSA keys sign as RS256, and a request without an account carries the public key and nothing private.

    Mutation: put the whole key into the header.
    """
    key = rsa.generate_private_key(65537, 2048)
    header, payload, signed, signature = parts(AccountKey(pem(key)).sign(b"", url=URL, nonce="nonce_-1"))
    assert (header["alg"], payload) == ("RS256", b"")
    assert set(header["jwk"]) == {"kty", "n", "e"}
    assert "kid" not in header
    key.public_key().verify(signature, signed, padding.PKCS1v15(), hashes.SHA256())


def test_the_thumbprint_is_that_of_rfc_7638() -> None:
    """The thumbprint is the SHA-256 of the canonical public key, base64url without padding.

    Mutation: hash the PEM.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    numbers = key.public_key().public_numbers()
    x, y = (base64.urlsafe_b64encode(n.to_bytes(32)).rstrip(b"=").decode() for n in (numbers.x, numbers.y))
    canonical = f'{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}'
    expected = base64.urlsafe_b64encode(hashlib.sha256(canonical.encode()).digest()).rstrip(b"=").decode()
    assert AccountKey(pem(key)).thumbprint == expected


def test_a_key_shows_nothing_of_itself() -> None:
    """What a log or a traceback would show of a key is its thumbprint.

    Mutation: remove __repr__ and make the class a dataclass.
    """
    key = account_key(Keys().account_key())
    assert repr(key) == f"AccountKey({key.thumbprint})"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "no private key"),
        (b"nonsense", "no private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "no private key"),
        (b"x" * 20_000, "too long"),
        (pem(ed25519.Ed25519PrivateKey.generate()), "neither"),
        (pem(ec.generate_private_key(ec.SECP521R1())), "neither"),
        (pem(rsa.generate_private_key(65537, 1024)), "neither"),
        (
            ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"password"),
            ),
            "encrypted",
        ),
    ],
)
def test_what_is_no_account_key(text: bytes, words: str) -> None:
    """A text that is no usable key ends as AccountKeyInvalid, says why, and repeats nothing of the text.

    Mutation: let ValueError or TypeError of the loader pass.
    """
    with pytest.raises(PermanentError, match=words) as caught:
        AccountKey(text)
    assert caught.value.reason is Reason.ACCOUNT_KEY_INVALID
    assert "BEGIN" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        base64.urlsafe_b64encode(SECRET).rstrip(b"="),
        base64.urlsafe_b64encode(SECRET),
        base64.b64encode(SECRET),
        base64.b64encode(SECRET).rstrip(b"="),
        b" \t" + base64.b64encode(SECRET) + b"\r\n\n",
    ],
)
@pytest.mark.parametrize(("algorithm", "digest"), [("HS256", "sha256"), ("HS384", "sha384"), ("HS512", "sha512")])
def test_a_binding_in_every_usual_form(text: bytes, algorithm: str, digest: str) -> None:
    """The binding signs the account's public key with the HMAC key, however its base64 is written.

    Mutation: leave out strip or the translation of "+/", or always use SHA-256.
    """
    key = account_key(Keys().account_key())
    bound = key.bind(Binding("kid-1", text, algorithm), URL)
    header, payload, signed, signature = parts(json.dumps(bound).encode())
    assert header == {"alg": algorithm, "kid": "kid-1", "url": URL}
    assert set(json.loads(payload)) == {"kty", "crv", "x", "y"}
    assert signature == hmac.digest(SECRET, signed, digest)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"====", "empty"),
        (b'"' + base64.b64encode(SECRET) + b'"', "not base64"),
        (base64.b64encode(SECRET)[:10] + b"\n" + base64.b64encode(SECRET)[10:], "not base64"),
        (b"abc=defghijklmnopqrstuvwxyz", "not base64"),
        ("schlüsselschlüsselschlüssel".encode(), "not base64"),
        (b"\x00" * 32, "not base64"),
        (base64.urlsafe_b64encode(SECRET).rstrip(b"=")[:41], "length"),
        (base64.urlsafe_b64encode(SECRET) + b"==", "length"),
        (b"c2hvcnQ", "5 bytes"),
        (b"A" * 10_000, "7500 bytes"),
    ],
)
def test_what_is_no_hmac_key(text: bytes, words: str) -> None:
    """A text that is no base64, is cut or is too short ends as EABKeyInvalid: it says why and repeats nothing of it.

    Mutation: let the decoder ignore foreign characters, as Python's does.
    """
    with pytest.raises(PermanentError, match=words) as caught:
        account_key(Keys().account_key()).bind(Binding("kid-1", text), URL)
    assert caught.value.reason is Reason.EAB_KEY_INVALID
    assert "kid-1" in str(caught.value)
    secret = text.decode("latin-1").strip()
    assert len(secret) < 6 or secret not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_unknown_hmac_algorithm_is_refused() -> None:
    """Only HS256, HS384 and HS512 bind.

    Mutation: fall back to HS256.
    """
    with pytest.raises(PermanentError, match="HS256, HS384 and HS512") as caught:
        account_key(Keys().account_key()).bind(Binding("kid-1", base64.b64encode(SECRET), "none"), URL)
    assert caught.value.reason is Reason.EAB_KEY_INVALID


@pytest.mark.parametrize(
    ("nonce", "expected"),
    [("abcd", True), ("a_-9", True), ("YQ", True), ("YR", False), ("abcde", False), ("", False), ("a+b/", False)],
)
def test_only_base64url_is_a_nonce(nonce: str, expected: bool) -> None:
    """A Replay-Nonce that would not come back as it was is ignored, as RFC 8555 section 6.5.1 demands.

    Mutation: accept every text.
    """
    assert is_nonce(nonce) is expected


@given(st.text())
def test_any_header_value_is_judged(nonce: str) -> None:
    """No Replay-Nonce raises, and one that is accepted comes back in the header letter by letter.

    Mutation: leave out the check of the length.
    """
    if is_nonce(nonce):
        header, _, _, _ = parts(account_key(KEY).sign(b"", url=URL, nonce=nonce))
        assert header["nonce"] == nonce


KEY = Keys().account_key()
