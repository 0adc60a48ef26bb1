"""Private keys and certificate signing requests."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from certbotk8s.ca.keys import Keys
from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.reasons import Reason

KEYS = Keys()
EC_KEY = KEYS.certificate_key("ECDSA", 256, "PKCS8")


@pytest.mark.parametrize(
    ("algorithm", "size", "encoding", "header", "bits"),
    [
        ("RSA", 0, "PKCS1", "RSA PRIVATE KEY", 2048),
        ("RSA", 2048, "PKCS8", "PRIVATE KEY", 2048),
        ("RSA", 3072, "PKCS1", "RSA PRIVATE KEY", 3072),
        ("ECDSA", 0, "PKCS1", "EC PRIVATE KEY", 256),
        ("ECDSA", 256, "PKCS8", "PRIVATE KEY", 256),
        ("ECDSA", 384, "PKCS8", "PRIVATE KEY", 384),
        ("ECDSA", 521, "PKCS1", "EC PRIVATE KEY", 521),
    ],
)
def test_a_key_is_of_the_kind_asked_for(algorithm: str, size: int, encoding: str, header: str, bits: int) -> None:
    """Algorithm, size and PEM form are those of the spec; size 0 is the algorithm's default.

    Mutation: swap the two encodings, or any two rows of the table.
    """
    pem = KEYS.certificate_key(algorithm, size, encoding)
    key = load_pem_private_key(pem, None)
    assert pem.startswith(f"-----BEGIN {header}-----".encode())
    assert isinstance(key, rsa.RSAPrivateKey if algorithm == "RSA" else ec.EllipticCurvePrivateKey)
    assert key.key_size == bits


def test_an_account_key_is_p256() -> None:
    """Account keys are ECDSA P-256 in PKCS8, and each is new.

    Mutation: keep the first one.
    """
    pem = KEYS.account_key()
    key = load_pem_private_key(pem, None)
    assert pem.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp256r1"
    assert KEYS.account_key() != pem


@pytest.mark.parametrize(
    ("algorithm", "size", "encoding"),
    [
        ("RSA", 1024, "PKCS1"),
        ("RSA", 256, "PKCS1"),
        ("ECDSA", 2048, "PKCS8"),
        ("Ed25519", 0, "PKCS8"),
        ("RSA", 0, "DER"),
    ],
)
def test_what_cannot_be_made_is_refused(algorithm: str, size: int, encoding: str) -> None:
    """A kind of key that no CA takes ends as InvalidSpec, and the error lists what there is.

    Mutation: fall back to the default.
    """
    with pytest.raises(PermanentError, match=r"spec\.privateKey") as caught:
        KEYS.certificate_key(algorithm, size, encoding)
    assert caught.value.reason is Reason.INVALID_SPEC


@pytest.mark.parametrize(
    "kind", [("RSA", 2048, "PKCS1"), ("ECDSA", 256, "PKCS1"), ("ECDSA", 384, "PKCS8"), ("ECDSA", 521, "PKCS8")]
)
def test_a_request_is_signed_and_names_all(kind: tuple[str, int, str]) -> None:
    """A request holds all names, wildcards too, and verifies with the key that signed it.

    Mutation: leave out the last name.
    """
    pem = KEYS.certificate_key(*kind)
    request = x509.load_der_x509_csr(KEYS.csr(pem, ["shop.example.test", "*.shop.example.test"], ""))
    names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["shop.example.test", "*.shop.example.test"]
    assert request.is_signature_valid
    assert request.public_key() == load_pem_private_key(pem, None).public_key()
    assert list(request.subject) == []


def test_the_common_name_is_the_subject() -> None:
    """A common name asked for is the whole subject.

    Mutation: leave the subject empty, as the library's own maker does.
    """
    request = x509.load_der_x509_csr(KEYS.csr(EC_KEY, ["shop.example.test"], "shop.example.test"))
    assert [(one.oid, one.value) for one in request.subject] == [(NameOID.COMMON_NAME, "shop.example.test")]


@pytest.mark.parametrize(("names", "common_name"), [(["a.test"], "a" * 65), (["münchen.test"], "")])
def test_names_that_no_certificate_can_hold(names: list[str], common_name: str) -> None:
    """A common name of over 64 characters or a name that is not in A-labels ends as InvalidSpec.

    Mutation: let ValueError of the library pass.
    """
    with pytest.raises(PermanentError) as caught:
        KEYS.csr(EC_KEY, names, common_name)
    assert caught.value.reason is Reason.INVALID_SPEC


# Modulus 15: what signs with it can hold no digest.
TINY_RSA_KEY = (
    b"-----BEGIN RSA PRIVATE KEY-----\nMBsCAQACAQ8CAQMCAQMCAQUCAQMCAQECAQECAQI=\n-----END RSA PRIVATE KEY-----\n"
)


def tampered_rsa_key() -> bytes:
    """An RSA key whose private exponents do not fit its public key."""
    whole = rsa.generate_private_key(65537, 2048).private_numbers()
    broken = rsa.RSAPrivateNumbers(
        whole.p, whole.q, whole.d - 2, whole.dmp1 - 2, whole.dmq1 - 2, whole.iqmp, whole.public_numbers
    )
    key = broken.private_key(unsafe_skip_rsa_key_validation=True)
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"x" * 20_000,
        EC_KEY[:100],
        ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        EC_KEY + b"\n" * 20_000,
        tampered_rsa_key(),
        TINY_RSA_KEY,
    ],
)
def test_a_key_that_cannot_be_used_is_lost(pem: bytes) -> None:
    """A stored key that was cut, exchanged or tampered with ends as KeyLost, and nothing of it is shown.

    Mutation: leave out the check of the request's own signature, or of the length of the PEM.
    """
    with pytest.raises(PermanentError) as caught:
        KEYS.csr(pem, ["a.test"], "")
    assert caught.value.reason is Reason.KEY_LOST
    assert "BEGIN" not in str(caught.value)
