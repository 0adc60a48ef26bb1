"""Reasons: words that machines compare and people read."""

from __future__ import annotations

import re

import pytest

from certbotk8s.domain.reasons import Reason


@pytest.mark.parametrize("reason", list(Reason))
def test_a_reason_is_a_word_of_kubernetes(reason: Reason) -> None:
    """A reason is CamelCase, as the API server demands of conditions, and says what its name in the code says.

    Mutation: misspell a value, or write one with a space.
    """
    assert re.fullmatch(r"[A-Z][A-Za-z]{1,40}", reason)
    assert reason.lower() == reason.name.replace("_", "").lower()


def test_reasons_are_told_apart() -> None:
    """No two names share a word.

    Mutation: give a second name to a reason.
    """
    assert len(set(Reason.__members__.values())) == len(Reason.__members__)


def test_a_reason_is_found_from_its_word() -> None:
    """What stands in a condition is read back as the reason.

    Mutation: use a plain Enum.
    """
    assert [Reason(str(reason)) for reason in Reason] == list(Reason)
    assert f"{Reason.CA_UNAVAILABLE}" == "CAUnavailable"
