"""Which of an issuer's external account bindings an order goes with: some CAs sell one kind of certificate to each.

A shape is either of the names (one name, several, a wildcard among them) or of the certificate's key. A binding takes
the shapes that it lists; of a kind of which it lists none, it takes all. The first one in the list that fits is used.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from certbotk8s.domain.names import listing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from certbotk8s.domain.api import AcmeSpec, BindingSpec

# The account of an issuer without `bindings`.
DEFAULT = "default"


class Shape(StrEnum):
    """What a binding may be for."""

    SINGLE_NAME = "SingleName"
    SEVERAL_NAMES = "SeveralNames"
    WILDCARD = "Wildcard"
    RSA = "RSA"
    ECDSA = "ECDSA"


_OF_NAMES = frozenset({Shape.SINGLE_NAME, Shape.SEVERAL_NAMES, Shape.WILDCARD})
_OF_KEYS = frozenset({Shape.RSA, Shape.ECDSA})
_SAID = {
    Shape.SINGLE_NAME: "one name",
    Shape.SEVERAL_NAMES: "several names",
    Shape.WILDCARD: "a wildcard name",
    Shape.RSA: "an RSA key",
    Shape.ECDSA: "an ECDSA key",
}


def shapes(names: Sequence[str], algorithm: str) -> tuple[Shape, Shape]:
    """The shape of an order's names, and that of its certificate's key."""
    if any(name.startswith("*.") for name in names):
        return Shape.WILDCARD, Shape(algorithm)
    return Shape.SEVERAL_NAMES if len(names) > 1 else Shape.SINGLE_NAME, Shape(algorithm)


def account_for(acme: AcmeSpec, names: Sequence[str], algorithm: str) -> str | None:
    """The name of the account to order with: that of the first binding that fits, None when none does."""
    if not acme.bindings:
        return DEFAULT
    asked = shapes(names, algorithm)
    return next((binding.name for binding in acme.bindings if _fits(binding, asked)), None)


def missing(acme: AcmeSpec, names: Sequence[str], algorithm: str) -> str:
    """What none of the bindings is for, as a sentence part."""
    asked = shapes(names, algorithm)
    lone = [shape for shape in asked if not any(_fits(binding, (shape,)) for binding in acme.bindings)]
    there = listing(f"{binding.name} ({listing(binding.shapes) or 'all'})" for binding in acme.bindings)
    return f"{' with '.join(_SAID[shape] for shape in lone or asked)}; there are {there}"


def _fits(binding: BindingSpec, asked: Sequence[Shape]) -> bool:
    listed = set(binding.shapes)
    return all(shape in listed or not listed & (_OF_NAMES if shape in _OF_NAMES else _OF_KEYS) for shape in asked)
