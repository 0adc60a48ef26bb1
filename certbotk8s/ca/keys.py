"""Private keys and CSRs, by `cryptography`.

Not by `acme.crypto_util.make_csr`: its subject is always empty, and some CAs want a common name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.reasons import Reason
from certbotk8s.domain.sensitive import Sensitive

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

# Algorithm and size (0: the default) to what makes such a key.
_KINDS: dict[tuple[str, int], Callable[[], PrivateKey]] = {
    ("RSA", 0): lambda: rsa.generate_private_key(65537, 2048),
    ("RSA", 2048): lambda: rsa.generate_private_key(65537, 2048),
    ("RSA", 3072): lambda: rsa.generate_private_key(65537, 3072),
    ("RSA", 4096): lambda: rsa.generate_private_key(65537, 4096),
    ("ECDSA", 0): lambda: ec.generate_private_key(ec.SECP256R1()),
    ("ECDSA", 256): lambda: ec.generate_private_key(ec.SECP256R1()),
    ("ECDSA", 384): lambda: ec.generate_private_key(ec.SECP384R1()),
    ("ECDSA", 521): lambda: ec.generate_private_key(ec.SECP521R1()),
}
# TraditionalOpenSSL is PKCS #1 for RSA and SEC 1 for EC: what cert-manager means by PKCS1 as well.
_FORMATS = {"PKCS1": PrivateFormat.TraditionalOpenSSL, "PKCS8": PrivateFormat.PKCS8}
_DIGESTS: dict[int, hashes.SHA384 | hashes.SHA512] = {384: hashes.SHA384(), 521: hashes.SHA512()}
_PEM_LIMIT = 13_000


class Keys:
    """`ports.KeyMaker` by OpenSSL."""

    def account_key(self, algorithm: str = "ECDSA") -> Sensitive:
        """A new key, PKCS8 PEM: ECDSA P-256, or RSA 2048."""
        return _pem(_KINDS[algorithm, 0](), PrivateFormat.PKCS8)

    def certificate_key(self, algorithm: str, size: int, encoding: str) -> Sensitive:
        """A new private key in PEM. `size` is in bits, 0 for the default: RSA 2048, ECDSA 256.

        `encoding` is PKCS1 (SEC 1 for ECDSA) or PKCS8. PermanentError(INVALID_SPEC) for anything else.
        """
        make = _KINDS.get((algorithm, size))
        if make is None or encoding not in _FORMATS:
            raise PermanentError(
                Reason.INVALID_SPEC,
                f"A private key of {algorithm} {size or ''} in {encoding} cannot be made. spec.privateKey may be RSA "
                "2048, 3072 or 4096 or ECDSA 256, 384 or 521, in PKCS1 or PKCS8.",
            )
        return _pem(make(), _FORMATS[encoding])

    def csr(self, key_pem: bytes, dns_names: Sequence[str], common_name: str) -> bytes:
        """A DER certificate signing request (RFC 2986) with these names as SAN; `common_name` "" leaves no subject.

        PermanentError: KEY_LOST when the key cannot be read, INVALID_SPEC when a name cannot stand in a certificate.
        """
        key = _load(key_pem)
        try:
            subject = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else []
            builder = (
                x509.CertificateSigningRequestBuilder()
                .subject_name(x509.Name(subject))
                .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in dns_names]), critical=False)
            )
        except ValueError as error:
            raise PermanentError(
                Reason.INVALID_SPEC, f"These names cannot stand in a certificate request: {error}."
            ) from error
        try:
            csr = builder.sign(key, _DIGESTS.get(key.key_size, hashes.SHA256()))
        except ValueError as error:
            raise _lost() from error
        if not csr.is_signature_valid:
            raise _lost()
        return csr.public_bytes(Encoding.DER)


def _load(pem: bytes) -> PrivateKey:
    if len(pem) > _PEM_LIMIT:
        raise _lost()
    try:
        # The primality checks cost as much CPU as all else of an issuance; the CSR's own signature shows a broken key.
        key = load_pem_private_key(pem, password=None, unsafe_skip_rsa_key_validation=True)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _lost() from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise _lost()
    return key


def _pem(key: PrivateKey, form: PrivateFormat) -> Sensitive:
    return Sensitive(key.private_bytes(Encoding.PEM, form, NoEncryption()))


def _lost() -> PermanentError:
    return PermanentError(Reason.KEY_LOST, "The stored private key cannot be read: a new one is needed.")
