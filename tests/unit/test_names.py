"""Names: one form in which they are compared, hashed and ordered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.provisional import domains
from msgspec import structs

from certbotk8s.domain import api
from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.names import common_name, listing, names_hash, normalise, wanted_names
from certbotk8s.domain.reasons import Reason
from tests.builders import certificate

LONG = ".".join(["a" * 49] * 5)  # 249 characters
FIRST = api.AcmeSpec("https://ca.test/dir", api.SecretKeyRef("account"), common_name="First")
ROOMY = f"{'a' * 40}.{'b' * 40}.example.test"  # a DNS name too long for a common name


@pytest.mark.parametrize(
    ("given_name", "expected"),
    [
        ("shop.example.test", "shop.example.test"),
        ("Shop.EXAMPLE.Test", "shop.example.test"),
        (" shop.example.test\n", "shop.example.test"),
        ("shop.example.test.", "shop.example.test"),
        ("shop.example.test\N{IDEOGRAPHIC FULL STOP}", "shop.example.test"),
        ("shop\N{IDEOGRAPHIC FULL STOP}example.test", "shop.example.test"),
        ("*.Example.test", "*.example.test"),
        ("*.Bücher.example", "*.xn--bcher-kva.example"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("bu\N{COMBINING DIAERESIS}cher.example", "xn--bcher-kva.example"),
        ("XN--Bcher-KVA.example", "xn--bcher-kva.example"),
        ("straße.example", "xn--strae-oqa.example"),
        ("\N{CIRCLED LATIN SMALL LETTER A}.test", "a.test"),
        ("localhost", "localhost"),
        ("4711.example.test", "4711.example.test"),
        ("a.b-c.d3", "a.b-c.d3"),
        (LONG, LONG),
        (f"*.{LONG}.a", f"*.{LONG}.a"),
    ],
)
def test_one_form_for_each_name(given_name: str, expected: str) -> None:
    """A name is lower-case, in A-labels of IDNA 2008 (ß stays ß), without the dot at its end, its wildcard kept.

    Mutation: drop uts46 or the removal of the dot, or move that before the encoding; encode the `*.` too.
    """
    assert normalise(given_name) == expected


@pytest.mark.parametrize(
    "given_name",
    [
        "",
        ".",
        "*",
        "*.",
        "*.*.example.test",
        "a.*.example.test",
        "a*.example.test",
        "*.*",
        ".example.test",
        "a..example.test",
        "example.test..",
        "example.test.\N{IDEOGRAPHIC FULL STOP}",
        "a_b.example.test",
        "_acme-challenge.example.test",
        "-a.example.test",
        "a-.example.test",
        "ab--cd.example.test",
        "a b.example.test",
        "a/b.example.test",
        "a.example.test:443",
        "https://a.example.test",
        "a@example.test",
        "a\x00.example.test",
        "a" * 64 + ".test",
        f"{LONG}.aaaa",
        f"*.{LONG}.aa",
        "\N{SNOWMAN}.example",
        "\N{PILE OF POO}.example",
        "xn--a.example",
        "xn--.example",
        "192.0.2.1",
        "\N{FULLWIDTH DIGIT ONE}92.0.2.\N{FULLWIDTH DIGIT ONE}",
        "2001:db8::1",
        "example.0",
    ],
)
def test_what_is_no_name_is_refused(given_name: str) -> None:
    """What no CA can certify as a DNS name ends as InvalidSpec that shows it, cut to the longest name there can be.

    Mutation: drop the length with the wildcard, or the check for addresses.
    """
    with pytest.raises(PermanentError, match="is no DNS name") as caught:
        normalise(given_name)
    assert caught.value.reason is Reason.INVALID_SPEC
    assert given_name[:253] in str(caught.value)


def test_a_long_wrong_name_makes_a_short_sentence() -> None:
    """The sentence about a name of any length fits a condition.

    Mutation: show the whole name.
    """
    with pytest.raises(PermanentError) as caught:
        normalise("ä_" * 5000)
    assert len(str(caught.value)) < 600


@given(st.one_of(domains(), domains().map(str.upper), domains().map(lambda name: f"*.{name}."), st.text(max_size=80)))
def test_normalising_is_done_once(text: str) -> None:
    """Whatever is given, out comes a name that stays as it is when it is normalised again, or a refusal.

    Mutation: return the name before it is encoded.
    """
    try:
        name = normalise(text)
    except PermanentError:
        return
    assert normalise(name) == name
    assert name.isascii()
    assert name == name.lower()
    assert not name.endswith(".")
    assert 0 < len(name) <= 253


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b.test", "a.test"], ("b.test", "a.test")),
        (["a.test", "A.test.", "a.TEST"], ("a.test",)),
        (["bücher.test", "xn--bcher-kva.test"], ("xn--bcher-kva.test",)),
        (["x.a.test", "*.a.test"], ("*.a.test",)),
        (["a.test", "*.a.test"], ("a.test", "*.a.test")),
        (["x.y.a.test", "*.a.test"], ("x.y.a.test", "*.a.test")),
        (["*.y.a.test", "*.a.test"], ("*.y.a.test", "*.a.test")),
        (["xa.test", "*.a.test"], ("xa.test", "*.a.test")),
        (["X.a.test", "*.A.test", "x.b.test"], ("*.a.test", "x.b.test")),
    ],
)
def test_each_name_is_ordered_once(names: list[str], expected: tuple[str, ...]) -> None:
    """Duplicates and names one label below a wildcard of the same spec are left out; the rest keeps its order.

    Mutation: compare before normalising, sort, or let a wildcard cover itself, its own domain or two labels.
    """
    assert wanted_names(certificate(names=names).spec) == expected


def test_a_common_name_alone_is_the_one_name() -> None:
    """Without dnsNames the common name is ordered; beside dnsNames it adds none.

    Mutation: leave the common name out, or always add it.
    """
    assert wanted_names(certificate(names=(), common_name="Shop.example.test").spec) == ("shop.example.test",)
    assert wanted_names(certificate(names=("a.test", "b.test"), common_name="b.test").spec) == ("a.test", "b.test")
    with pytest.raises(PermanentError, match="is no DNS name"):
        wanted_names(certificate(names=()).spec)


@pytest.mark.parametrize(
    ("names", "asked", "expected"),
    [
        (["a.test", "b.test"], "", "a.test"),
        (["a.test", "b.test"], "B.test.", "b.test"),
        ([], "a.test", "a.test"),
        ([ROOMY, "b.test"], "", "b.test"),
        ([ROOMY], "", ""),
        (["a" * 59 + ".test"], "", "a" * 59 + ".test"),
        (["a" * 60 + ".test"], "", ""),
        (["*.a.test", "b.test"], "", "*.a.test"),
        (["b.test", "*.a.test", "x.a.test"], "x.a.test", "*.a.test"),
    ],
)
def test_common_name_is_one_of_the_names_ordered(names: list[str], asked: str, expected: str) -> None:
    """The subject's name is the one asked for, else the first of 64 bytes or fewer, and is always among those ordered.

    Mutation: take the first name unmeasured, measure with < 64, or keep a common name that a wildcard covers.
    """
    spec = certificate(names=names, common_name=asked).spec
    assert common_name(spec, FIRST) == expected
    assert expected in {*wanted_names(spec), ""}


@pytest.mark.parametrize(
    ("names", "asked", "words"),
    [
        (["a.test"], "b.test", "not among dnsNames"),
        (["*.a.test"], "x.y.a.test", "not among dnsNames"),
        (["*.a.test"], "a.test", "not among dnsNames"),
        ([ROOMY], ROOMY, "longer than 64 bytes"),
        ([], ROOMY, "longer than 64 bytes"),
        (["a.test"], "a_b", "is no DNS name"),
    ],
)
def test_a_common_name_that_cannot_be_is_refused(names: list[str], asked: str, words: str) -> None:
    """A common name that is not ordered, too long for X.509 or no name ends as InvalidSpec before anything is ordered.

    Mutation: return the common name without looking at it.
    """
    with pytest.raises(PermanentError, match=words) as caught:
        common_name(certificate(names=names, common_name=asked).spec, FIRST)
    assert caught.value.reason is Reason.INVALID_SPEC


BINDING = api.ExternalAccountBinding("kid", api.SecretKeyRef("hmac"))


@pytest.mark.parametrize(
    ("setting", "binding", "expected"),
    [
        ("Auto", None, ""),
        ("Auto", BINDING, "a.test"),
        ("First", None, "a.test"),
        ("First", BINDING, "a.test"),
        ("Never", None, ""),
        ("Never", BINDING, ""),
    ],
)
def test_the_issuer_says_whether_there_is_a_common_name(
    setting: str, binding: api.ExternalAccountBinding | None, expected: str
) -> None:
    """What a spec leaves open the issuer's setting decides, by default whether its account is bound; what the spec
    asks for stands.

    Mutation: take Auto for First, or let Never win over the spec.
    """
    acme = structs.replace(FIRST, common_name=setting, external_account_binding=binding)
    names = ("a.test", "b.test")
    assert common_name(certificate(names=names).spec, acme) == expected
    assert common_name(certificate(names=names, common_name="b.test").spec, acme) == "b.test"
    assert common_name(certificate(names=names).spec, None) == ""


NAMES = st.lists(st.sampled_from(["a.test", "b.test", "*.a.test", "c.test", "ab.test"]))


@given(NAMES, NAMES)
def test_the_hash_is_of_the_set(one: list[str], other: list[str]) -> None:
    """Two lists have one hash exactly when they hold the same names, whatever their order and repetitions.

    Mutation: hash the list unsorted, or with repetitions.
    """
    assert (names_hash(one) == names_hash(other)) == (set(one) == set(other))


def test_the_hash_tells_where_a_name_ends() -> None:
    """Names that join to the same letters are told apart.

    Mutation: join the names with nothing.
    """
    assert names_hash(["a.test", "b.test"]) != names_hash(["a.testb.test"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b"], "a and b"),
        (["a", "b", "c"], "a, b and c"),
        (list("abcd"), "a, b, c and 1 more"),
        (list("abcdefg"), "a, b, c and 4 more"),
    ],
)
def test_a_sentence_lists_a_few_names(names: list[str], expected: str) -> None:
    """At most three names are written out, the others counted.

    Mutation: count one more or fewer.
    """
    assert listing(names) == expected
    assert listing(iter(names)) == expected
