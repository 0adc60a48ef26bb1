"""What is read from PEM: facts of certificates and keys, and the checks before a certificate is accepted.

All PEM is hostile input (tenants write Secrets, the CA sends chains): sizes are capped before anything is parsed, since
parsing costs more than linear time. Hashes are SHA-256, hex; a key is known by the hash of its SubjectPublicKeyInfo.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from certbotk8s.domain import api
from certbotk8s.domain.names import names_hash
from certbotk8s.domain.sensitive import Sensitive

if TYPE_CHECKING:
    from datetime import datetime

    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

CHAIN_MAX_BYTES = 95_000
KEY_MAX_BYTES = 13_000
CHAIN_MAX_LENGTH = 10
# A certificate that says it lives longer is a mistake of the CA: public ones live 398 days at most, inner ones years.
LIFE_MAX = timedelta(days=3660)
CLOCK_SKEW = timedelta(minutes=5)

# Everything that cryptography raises for input it cannot read.
UNREADABLE = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def public_key_hash(key: PublicKeyTypes) -> str:
    """The hash by which a key pair is known."""
    info = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(info).hexdigest()


def key_type(key: object) -> tuple[str, int]:
    """(`RSA` | `ECDSA` | the class name, bits)."""
    if isinstance(key, rsa.RSAPublicKey | rsa.RSAPrivateKey):
        return "RSA", key.key_size
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey):
        return "ECDSA", key.curve.key_size
    return type(key).__name__, 0


def load_chain(pem: bytes) -> list[x509.Certificate]:
    """The certificates of a PEM chain, leaf first; ValueError when there is none, too many, or one cannot be read."""
    if len(pem) > CHAIN_MAX_BYTES:
        raise ValueError(f"{len(pem)} bytes of certificates; at most {CHAIN_MAX_BYTES} are read")
    begun = pem.count(b"-----BEGIN CERTIFICATE-----")
    if begun > CHAIN_MAX_LENGTH:
        raise ValueError(f"a chain of more than {CHAIN_MAX_LENGTH} certificates")
    try:
        chain = x509.load_pem_x509_certificates(pem)
    except UNREADABLE as error:
        raise ValueError("no PEM certificate that can be read") from error
    if len(chain) < begun:
        # The parser passes over a certificate without an end.
        raise ValueError("a certificate that is cut off")
    return chain


def san_names(certificate: x509.Certificate) -> list[str]:
    """DNS names and addresses of the subject alternative name, lower-case."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, *UNREADABLE):
        return []
    dns = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    return dns + [str(address) for address in names.get_values_for_type(x509.IPAddress)]


def certificate_facts(certificate: x509.Certificate) -> api.CertificateFacts:
    """What the cache keeps of a certificate; ValueError when its key or extensions cannot be read."""
    try:
        key = certificate.public_key()
        algorithm, size = key_type(key)
        return api.CertificateFacts(
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            serial_number=f"{certificate.serial_number:x}",
            names_hash=names_hash(san_names(certificate)),
            public_key_hash=public_key_hash(key),
            key_algorithm=algorithm,
            key_size=size,
            issuer=certificate.issuer.rfc4514_string()[:256],
        )
    except UNREADABLE as error:
        raise ValueError("the certificate's key cannot be read") from error


def private_key_facts(pem: bytes) -> tuple[str, str, int, str]:
    """(public key hash, algorithm, bits, encoding) of a PEM private key; ValueError when it cannot be read."""
    if len(pem) > KEY_MAX_BYTES:
        raise ValueError(f"{len(pem)} bytes of key; at most {KEY_MAX_BYTES} are read")
    try:
        # Whether an RSA key is consistent costs 100 ms to check, and shows at the first handshake anyway.
        key = serialization.load_pem_private_key(pem, None, unsafe_skip_rsa_key_validation=True)
        algorithm, size = key_type(key)
        return public_key_hash(key.public_key()), algorithm, size, "PKCS8" if b"BEGIN PRIVATE KEY" in pem else "PKCS1"
    except UNREADABLE as error:
        raise ValueError("no PEM private key that can be read") from error


class _RawSecret(api.Resource, frozen=True):
    type: str = ""
    immutable: bool = False
    data: dict[str, str] = {}


_decode_secret = msgspec.json.Decoder(_RawSecret).decode


def secret_value(data: dict[str, str], key: str) -> Sensitive:
    """A member of a Secret's data, decoded; empty when it is missing or no base64."""
    try:
        return Sensitive(base64.b64decode(data.get(key, ""), validate=True))
    except (binascii.Error, ValueError):
        return Sensitive()


def secret_facts(raw: bytes | msgspec.Raw) -> api.SecretFacts:
    """A Secret's JSON as facts: what cannot be read becomes `problem`, never an error."""
    secret = _decode_secret(raw)
    problems = []
    certificate, key_hash, encoding = None, "", ""
    try:
        certificate = certificate_facts(load_chain(secret_value(secret.data, "tls.crt"))[0])
    except ValueError as error:
        problems.append(f"tls.crt: {error}")
    try:
        key_hash, _, _, encoding = private_key_facts(secret_value(secret.data, "tls.key"))
    except ValueError as error:
        problems.append(f"tls.key: {error}")
    return api.SecretFacts(
        metadata=secret.metadata,
        type=secret.type,
        immutable=secret.immutable,
        certificate=certificate,
        public_key_hash=key_hash,
        key_encoding=encoding,
        problem="; ".join(problems),
    )


# The cached view of the Secrets that are ours.
SECRET_FACTS = api.Kind("", "v1", "secrets", "Secret", api.SecretFacts, parse=secret_facts)


def refusal(chain: bytes, key_hash: str, names: tuple[str, ...], now: datetime) -> str:
    """Why this chain must not replace the certificate in use; "" when it may.

    Checked: our key, all names asked for and no others, valid now, each link signed by the next, a sane life.
    """
    try:
        links = load_chain(chain)
        facts = certificate_facts(links[0])
    except ValueError as error:
        return f"it cannot be read: {error}"
    if facts.public_key_hash != key_hash:
        return "it is for another key than ours"
    if facts.names_hash != names_hash(names):
        got, wanted = set(san_names(links[0])), set(names)
        missing, foreign = sorted(wanted - got)[:5], sorted(got - wanted)[:5]
        return (
            f"its names differ (missing: {', '.join(missing) or 'none'}; not asked for: {', '.join(foreign) or 'none'})"
        )
    if facts.not_before > now + CLOCK_SKEW:
        return f"it is not valid before {facts.not_before:%Y-%m-%d %H:%M:%S} UTC"
    if facts.not_after <= now:
        return f"it expired at {facts.not_after:%Y-%m-%d %H:%M:%S} UTC"
    if facts.not_after - facts.not_before > LIFE_MAX:
        return f"its life of {(facts.not_after - facts.not_before).days} days is no sane one"
    for certificate, issuer in pairwise(links):
        try:
            certificate.verify_directly_issued_by(issuer)
        except (InvalidSignature, *UNREADABLE):
            subject, signer = certificate.subject.rfc4514_string(), issuer.subject.rfc4514_string()
            return f"its chain is broken: {subject[:100]!r} is not signed by {signer[:100]!r}"
    return ""
