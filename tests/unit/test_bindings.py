"""Which binding an order goes with."""

from __future__ import annotations

import pytest

from certbotk8s.domain.api import AcmeSpec, BindingSpec, ExternalAccountBinding, SecretKeyRef
from certbotk8s.domain.bindings import account_for, missing

ONE, TWO, WILD = ("a.test",), ("a.test", "b.test"), ("a.test", "*.a.test")


def acme(**shapes: tuple[str, ...]) -> AcmeSpec:
    """An issuer with these bindings, in this order."""
    bound = ExternalAccountBinding("kid", SecretKeyRef("eab"))
    bindings = tuple(BindingSpec(name, bound, listed) for name, listed in shapes.items())
    return AcmeSpec("https://ca.test/dir", SecretKeyRef("key"), bindings=bindings)


ALL = acme(single=("SingleName",), ucc=("SeveralNames", "RSA"), wild=("Wildcard", "ECDSA"))


@pytest.mark.parametrize(
    ("spec", "names", "algorithm", "expected"),
    [
        (acme(), TWO, "RSA", "default"),
        (ALL, ONE, "RSA", "single"),
        (ALL, ONE, "ECDSA", "single"),
        (ALL, TWO, "RSA", "ucc"),
        (ALL, TWO, "ECDSA", None),
        (ALL, WILD, "ECDSA", "wild"),
        (ALL, WILD, "RSA", None),
        (acme(any=()), WILD, "RSA", "any"),
        (acme(first=("RSA",), second=("SingleName",)), ONE, "RSA", "first"),
        (acme(first=("RSA",), second=("SingleName",)), ONE, "ECDSA", "second"),
    ],
)
def test_the_first_binding_that_fits(
    spec: AcmeSpec, names: tuple[str, ...], algorithm: str, expected: str | None
) -> None:
    """Of names and of keys, a binding takes what it lists, and all where it lists none; the first in the list wins.

    Mutation: demand that every shape of an order is listed, or look at the last binding first.
    """
    assert account_for(spec, names, algorithm) == expected


@pytest.mark.parametrize(
    ("names", "algorithm", "expected"),
    [(TWO, "ECDSA", "several names with an ECDSA key; there are"), (WILD, "RSA", "a wildcard name with an RSA key;")],
)
def test_what_is_missing(names: tuple[str, ...], algorithm: str, expected: str) -> None:
    """Where each shape has a binding, but none has both, both are named; else the one that has none.

    Mutation: name the shape of the names only.
    """
    assert missing(ALL, names, algorithm).startswith(expected)
    assert missing(acme(single=("SingleName", "RSA")), names, "RSA").split(";")[0] in {
        "several names",
        "a wildcard name",
    }
