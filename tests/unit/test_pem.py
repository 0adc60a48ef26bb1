"""What is read from PEM that tenants and CAs wrote, and which certificate must not replace the one in use."""

from __future__ import annotations

import base64
import os
import warnings
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption
from hypothesis import given
from hypothesis import strategies as st

from certbotk8s.domain import api, pem
from certbotk8s.domain.names import names_hash
from tests import builders
from tests.builders import DAY, HOUR, MINUTE, NAME, NOW, authority, chain, key_pem, leaf, private_key, secret_json

if TYPE_CHECKING:
    from collections.abc import Callable

RSA = private_key("rsa", "RSA", 2048)
OURS = pem.public_key_hash(private_key().public_key())
JUNK = os.urandom(1 << 20)


def unwrapped(text: bytes) -> bytes:
    """The DER of the first PEM block."""
    return base64.b64decode(b"".join(text.partition(b"-----END")[0].splitlines()[1:]))


def wrapped(der: bytes, kind: str = "CERTIFICATE") -> bytes:
    return f"-----BEGIN {kind}-----\n".encode() + base64.encodebytes(der) + f"-----END {kind}-----\n".encode()


def altered(old: bytes, new: bytes, names: tuple[str, ...] = (NAME,)) -> bytes:
    """A certificate of which some bytes were exchanged."""
    der = unwrapped(chain(names))
    assert old in der
    return wrapped(der.replace(old, new))


# What a library in another language would not have made, and cryptography has exceptions of their own for.
X400_NAME = altered(b"\x82\x11" + NAME.encode(), b"\xa3\x11" + NAME.encode())
VERSION_6 = altered(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05")
UNKNOWN_CURVE = altered(bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06082a8648ce3d030163"))
YEAR_0 = altered(b"\x17\r2611", b"\x17\r9999")


# --- certificates -----------------------------------------------------------------------------------------------------


def test_facts_of_a_certificate() -> None:
    """Facts are those of the leaf: times, names, serial number, key and who issued.

    Mutation: swap the two times, take another certificate of the chain, or give the serial number in decimal.
    """
    certificate = leaf((NAME, "*.Example.test"), life=30 * DAY, start=NOW)
    found = pem.certificate_facts(pem.load_chain(builders.pem(certificate, *authority().served))[0])
    assert found == api.CertificateFacts(
        not_before=NOW,
        not_after=NOW + 30 * DAY,
        serial_number=f"{certificate.serial_number:x}",
        names_hash=names_hash([NAME, "*.example.test"]),
        public_key_hash=OURS,
        key_algorithm="ECDSA",
        key_size=256,
        issuer="CN=Example CA E1",
    )


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (RSA, ("RSA", 2048)),
        (private_key(), ("ECDSA", 256)),
        (private_key("leaf", "ECDSA", 384), ("ECDSA", 384)),
        (private_key("leaf", "ECDSA", 521), ("ECDSA", 521)),
    ],
)
def test_kind_and_size_of_a_key(key: builders.PrivateKey, expected: tuple[str, int]) -> None:
    """Certificate and private key of a pair tell the same kind, size and hash.

    Mutation: measure an RSA key in bytes, or hash the private key.
    """
    found = pem.certificate_facts(pem.load_chain(chain(key=key))[0])
    assert (found.key_algorithm, found.key_size) == expected
    assert pem.private_key_facts(key_pem(key))[:3] == (found.public_key_hash, *expected)


def test_a_chain_is_read_leaf_first() -> None:
    """All certificates are read, in the order they stand in, whatever text is between them.

    Mutation: sort, or stop after the first.
    """
    one, other = leaf(("a.test",)), leaf(("b.test",))
    text = b"subject=a\n" + builders.pem(one) + b"\r\n  issuer=b\n" + builders.pem(other)
    assert pem.load_chain(text) == [one, other]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"junk",
        JUNK[:50_000],
        b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        builders.pem(leaf())[:-60],
        builders.pem(leaf()) + wrapped(b"\x30\x03\x02\x01\x01"),
        key_pem(),
        unwrapped(chain()),
    ],
    ids=["empty", "junk", "binary", "hollow", "no DER", "cut", "one of two", "a key", "DER"],
)
def test_what_is_no_chain_is_a_value_error(text: bytes) -> None:
    """Text without a certificate, or with one that cannot be read, is refused as a whole.

    Mutation: catch nothing in load_chain, or return what was readable.
    """
    with pytest.raises(ValueError, match="no PEM certificate that can be read"):
        pem.load_chain(text)


@pytest.mark.parametrize("text", [JUNK, chain() + JUNK[:95_000], builders.pem(leaf()) * 11])
def test_sizes_are_capped_before_anything_is_parsed(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many bytes or too many certificates never reach the parser.

    Mutation: remove either cap, or count after parsing.
    """

    def parsed(_: bytes) -> list[x509.Certificate]:
        pytest.fail("parsed")

    monkeypatch.setattr(x509, "load_pem_x509_certificates", parsed)
    with pytest.raises(ValueError, match=r"at most 95000 are read|more than 10 certificates"):
        pem.load_chain(text)


def test_a_chain_that_is_cut_off_is_a_value_error() -> None:
    """A chain of which the end did not arrive is not taken for a shorter one.

    Mutation: return what was readable.
    """
    with pytest.raises(ValueError, match="a certificate that is cut off"):
        pem.load_chain(chain()[:-60])


def test_ten_certificates_are_not_too_many() -> None:
    """A chain of the longest length is read.

    Mutation: count with >=.
    """
    assert len(pem.load_chain(builders.pem(leaf()) * 10)) == 10


@pytest.mark.parametrize(
    "text", [X400_NAME, VERSION_6, UNKNOWN_CURVE, YEAR_0], ids=["x400 name", "version", "curve", "year"]
)
def test_oddities_of_x509_never_break_the_reader(text: bytes) -> None:
    """A certificate with what the library has exceptions of its own for is a ValueError, or one without names.

    Mutation: take InvalidVersion, UnsupportedGeneralNameType or UnsupportedAlgorithm out of what is caught.
    """
    try:
        found = pem.certificate_facts(pem.load_chain(text)[0])
    except ValueError:
        return
    assert found.names_hash == names_hash([])


DER = {"certificate": unwrapped(chain()), "ECDSA": unwrapped(key_pem()), "RSA": unwrapped(key_pem(RSA, "PKCS8"))}


@given(st.sampled_from(sorted(DER)), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4))
def test_no_byte_breaks_the_reader(kind: str, exchanged: list[tuple[int, int]]) -> None:
    """With any bytes exchanged, a certificate or key is read or is a ValueError.

    Mutation: catch ValueError alone.
    """
    der = bytearray(DER[kind])
    for place, byte in exchanged:
        der[place % len(der)] = byte
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library warns of what it will refuse one day
        try:
            if kind == "certificate":
                pem.certificate_facts(pem.load_chain(wrapped(bytes(der)))[0])
            else:
                pem.private_key_facts(wrapped(bytes(der), "PRIVATE KEY" if kind == "RSA" else "EC PRIVATE KEY"))
        except ValueError:
            return


# --- private keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [RSA, private_key()])
@pytest.mark.parametrize("encoding", ["PKCS1", "PKCS8"])
def test_encoding_of_a_key(key: builders.PrivateKey, encoding: str) -> None:
    """RSA and ECDSA keys are told apart by how they are written, and have one hash however they are.

    Mutation: take every key for PKCS1, or hash the text.
    """
    found = pem.private_key_facts(key_pem(key, encoding))
    assert found[3] == encoding
    assert found[0] == pem.public_key_hash(key.public_key())


ENCRYPTED = private_key().private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
)


@pytest.mark.parametrize(
    "text",
    [b"", b"junk", JUNK[:13_000], chain(), key_pem()[:-40], ENCRYPTED, wrapped(b"\x30\x00", "PRIVATE KEY")],
    ids=["empty", "junk", "binary", "a certificate", "cut", "encrypted", "hollow"],
)
def test_what_is_no_key_is_a_value_error(text: bytes) -> None:
    """What is not a plain PEM private key is refused, an encrypted one too.

    Mutation: leave TypeError out of what is caught.
    """
    with pytest.raises(ValueError, match=r"^no PEM private key that can be read$"):
        pem.private_key_facts(text)


def test_a_key_is_measured_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the longest key never reaches the parser.

    Mutation: remove the cap.
    """
    monkeypatch.setattr(serialization, "load_pem_private_key", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(ValueError, match="13001 bytes of key; at most 13000 are read"):
        pem.private_key_facts(JUNK[:13_001])


# --- Secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_as_facts() -> None:
    """A Secret that holds a pair is told by facts of both, with its metadata and without a problem.

    Mutation: read tls.key where tls.crt is meant, or drop the metadata.
    """
    found = pem.secret_facts(
        secret_json(
            {"tls.crt": chain(), "tls.key": key_pem(encoding="PKCS8"), "ca.crt": b"more"},
            labels={"certbotk8s.io/role": "tls"},
            resourceVersion="42",
        )
    )
    assert (found.key, found.type, found.metadata.resource_version) == ("shop/web-tls", "kubernetes.io/tls", "42")
    assert found.metadata.labels == {"certbotk8s.io/role": "tls"}
    assert found.certificate
    assert found.certificate.names_hash == names_hash([NAME])
    assert found.certificate.public_key_hash == found.public_key_hash == OURS
    assert (found.key_encoding, found.problem) == ("PKCS8", "")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({}, "tls.crt: no PEM certificate that can be read; tls.key: no PEM private key that can be read"),
        ({"tls.crt": chain()}, "tls.key: no PEM private key that can be read"),
        ({"tls.key": key_pem()}, "tls.crt: no PEM certificate that can be read"),
        ({"tls.crt": JUNK, "tls.key": key_pem()}, "tls.crt: 1048576 bytes of certificates; at most 95000 are read"),
        ({"tls.crt": chain(), "tls.key": JUNK}, "tls.key: 1048576 bytes of key; at most 13000 are read"),
        ({"tls.crt": VERSION_6, "tls.key": key_pem()}, "tls.crt: no PEM certificate that can be read"),
        ({"tls.crt": UNKNOWN_CURVE, "tls.key": key_pem()}, "tls.crt: the certificate's key cannot be read"),
    ],
)
def test_hostile_data_becomes_a_problem(data: dict[str, bytes], problem: str) -> None:
    """Whatever the members of a Secret hold, it becomes facts with a problem in short words, never an error.

    Mutation: catch less than everything a decoder raises, RecursionError among it, or leave out a size.
    """
    assert pem.secret_facts(secret_json(data)).problem == problem


@pytest.mark.parametrize("value", ["%%%", "AAA", "A A=", "\N{SNOWMAN}", "=", "AAAA\n===="])
def test_bad_base64_is_nothing(value: str) -> None:
    """A member that is no base64 counts as absent.

    Mutation: decode without validate, or catch nothing.
    """
    raw = msgspec.json.encode({"metadata": {"name": "web-tls"}, "data": {"tls.crt": value, "tls.key": value}})
    found = pem.secret_facts(raw)
    assert (found.certificate, found.public_key_hash) == (None, "")
    assert pem.secret_value({"member": value}, "member") == b""
    assert pem.secret_value({}, "member") == b""
    assert pem.secret_value({"member": "QQ=="}, "member") == b"A"


def test_a_secret_without_data_is_read() -> None:
    """A Secret that never had data is no error, with its type if it has one.

    Mutation: require the member `data`.
    """
    assert pem.secret_facts(b'{"metadata":{"name":"a"}}').key == "a"
    assert pem.SECRET_FACTS.decode(b'{"metadata":{"name":"a"},"type":"Opaque"}').type == "Opaque"


@pytest.mark.parametrize("encoding", ["PKCS1", "PKCS8"])
def test_facts_hold_no_pem(encoding: str) -> None:
    """Nothing of a certificate or key is in the facts, neither as PEM, nor base64, nor raw.

    Mutation: keep `data` in the facts, or put the input into a problem.
    """
    text = chain()
    key = key_pem(RSA, encoding)
    for data in ({"tls.crt": text, "tls.key": key}, {"tls.crt": key, "tls.key": text}, {"tls.crt": text[:-60]}):
        found = pem.secret_facts(secret_json(data))
        shown = msgspec.json.encode(found) + repr(found).encode()
        assert b"-----" not in shown
        for line in [*text.splitlines(), *key.splitlines()]:
            assert line not in shown
            assert base64.b64encode(line) not in shown


# --- what must not be installed ---------------------------------------------------------------------------------------


def refused(text: bytes, *, key_hash: str = OURS, names: tuple[str, ...] = (NAME,), now: datetime = NOW) -> str:
    return pem.refusal(text, key_hash, names, now)


@pytest.mark.parametrize(
    "text",
    [
        chain(),
        builders.pem(leaf()),
        chain(life=60 * timedelta(seconds=1), start=NOW),
        chain(start=NOW + 5 * MINUTE),
        chain(life=3660 * DAY),
    ],
    ids=["as served", "without its issuer", "of a minute", "5 min ahead", "of ten years"],
)
def test_a_good_chain_is_accepted(text: bytes) -> None:
    """A certificate for our key and names that is valid now is accepted, up to 5 minutes ahead of our clock.

    Mutation: drop the skew, or ask for a chain of two.
    """
    assert refused(text) == ""


def test_names_are_a_set() -> None:
    """The order and the case of the names in the certificate do not matter.

    Mutation: compare lists.
    """
    assert refused(chain(("B.test", "a.test")), names=("a.test", "b.test")) == ""


OTHER = authority("Example CA E2", "Example Root X2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "it cannot be read: no PEM certificate"),
        (JUNK, "it cannot be read: 1048576 bytes"),
        (builders.pem(leaf()) * 11, "it cannot be read: a chain of more than 10"),
        (chain()[:-60], "it cannot be read: a certificate that is cut off"),
        (VERSION_6, "it cannot be read"),
        (UNKNOWN_CURVE, "it cannot be read: the certificate's key"),
        (chain(key=private_key("another")), "it is for another key than ours"),
        (builders.pem(*authority().served, leaf()), "it is for another key than ours"),
        (chain(("www.example.test",)), f"missing: {NAME}; not asked for: www.example.test"),
        (chain((NAME, "www.example.test")), "missing: none; not asked for: www.example.test"),
        (X400_NAME, f"missing: {NAME}; not asked for: none"),
        (chain(start=NOW + 5 * MINUTE + timedelta(seconds=1)), "it is not valid before 2026-11-20 09:05:01 UTC"),
        (chain(start=NOW - DAY, life=DAY), "it expired at 2026-11-20 09:00:00 UTC"),
        (chain(start=NOW - 2 * DAY, life=DAY), "it expired at 2026-11-19 09:00:00 UTC"),
        (chain(life=3661 * DAY), "its life of 3661 days is no sane one"),
        (chain(issuer=OTHER) + builders.pem(*authority().served), "'CN=Example CA E2' is not signed by 'CN=Example CA"),
        (builders.pem(leaf(), OTHER.certificate), "'CN=shop.example.test' is not signed by 'CN=Example CA E2'"),
        (builders.pem(leaf(), leaf()), "its chain is broken"),
    ],
)
def test_a_bad_chain_is_refused_with_the_reason(text: bytes, words: str) -> None:
    """Each fault of a chain keeps it from replacing the certificate in use, and is named.

    Mutation: remove any one of the checks.
    """
    assert words in refused(text)


def test_a_forged_link_is_refused() -> None:
    """An issuer of the right name that did not sign is found out.

    Mutation: compare the names of the links only.
    """
    forged = builders.CA(authority().certificate, private_key("forger"), ())
    assert "its chain is broken" in refused(builders.pem(leaf(issuer=forged), authority().certificate))


def test_many_foreign_names_make_a_short_sentence() -> None:
    """A certificate with a hundred other names is refused in words that fit a condition.

    Mutation: list all names.
    """
    assert len(refused(chain([f"{'n' * 40}{number}.test" for number in range(100)]))) < 500


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: RSA, ("RSA", 2048)),
        (lambda: private_key().public_key(), ("ECDSA", 256)),
        (ed25519.Ed25519PrivateKey.generate, ("OpenSSLEd25519PrivateKey", 0)),
    ],
)
def test_other_kinds_of_keys_have_a_name(make: Callable[[], Any], expected: tuple[str, int]) -> None:
    """A key of a kind that is never asked for is told by what it is, so that it fits no spec.

    Mutation: take what is not RSA for ECDSA.
    """
    kind, size = pem.key_type(make())
    assert size == expected[1]
    assert (kind in {"RSA", "ECDSA"}) == (expected[0] in {"RSA", "ECDSA"})
    assert kind


def test_times_are_in_utc() -> None:
    """Times of a certificate carry their zone.

    Mutation: read not_valid_after.
    """
    found = pem.certificate_facts(pem.load_chain(chain(start=NOW - HOUR, life=2 * HOUR))[0])
    assert (found.not_before.tzinfo, found.not_after.tzinfo) == (UTC, UTC)
