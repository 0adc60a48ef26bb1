"""Times, columns and hostile text on a terminal."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certbotk8s.certctl.table import absolute, printable, relative, relative_times, span, table

NOW = datetime(2026, 11, 21, 12, 0, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("delta", "text"),
    [
        (timedelta(seconds=40, milliseconds=900), "40s"),
        (timedelta(seconds=119), "119s"),
        (timedelta(seconds=120), "2m"),
        (timedelta(minutes=119, seconds=59), "119m"),
        (timedelta(hours=5, minutes=59), "5h"),
        (timedelta(hours=47, minutes=59), "47h"),
        (timedelta(days=59, hours=23), "59d"),
        (timedelta(days=-3), "3d"),
        (timedelta(0), "0s"),
    ],
)
def test_span_is_rounded_down_in_its_largest_unit(delta: timedelta, text: str) -> None:
    """A certificate is never said to live longer than it does. Fails when a span is rounded up, or a limit moves."""
    assert span(delta) == text


def test_times_are_relative_or_absolute() -> None:
    """Future, past and missing times each have one form. Fails when `in` and `ago` are exchanged."""
    assert relative(NOW + timedelta(days=29, seconds=1), NOW) == "in 29d"
    assert relative(NOW - timedelta(minutes=5), NOW) == "5m ago"
    assert absolute(NOW.astimezone(tz=None)) == "2026-11-21T12:00:30Z"
    assert absolute(None) == "-"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Renewal failed. Next attempt 2026-11-21 12:42 UTC.", "Renewal failed. Next attempt in 41m."),
        ("valid until 2027-01-20 12:01 UTC, renews 2026-12-21 12:01 UTC", "valid for another 60d, renews in 30d"),
        ("The certificate expired 2026-11-18 12:00 UTC", "The certificate expired 3d ago"),
        ("Held until 2026-11-21 11:50 UTC", "Held until 10m ago"),
        ("Asked again at 2026-11-21 14:30 UTC", "Asked again in 2h"),
        ("Next attempt 2026-11-21 12:00 UTC", "Next attempt this minute"),
        ("Next attempt 2026-11-21 12:01 UTC", "Next attempt in about a minute"),
        ("valid until 2026-11-21 12:00 UTC", "valid until this minute"),
        ("valid until 2026-11-21 12:01 UTC", "valid for about a minute"),
        ("processing since 09:41 UTC", "processing since 09:41 UTC"),
        ("no time: 2026-99-21 12:42 UTC", "no time: 2026-99-21 12:42 UTC"),
    ],
)
def test_times_in_messages_become_relative(message: str, shown: str) -> None:
    """A message's absolute times are told relative to now. Fails when `until` keeps its word before `in 60d`."""
    assert relative_times(message, NOW) == shown


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    """Columns line up, wide letters count twice, nothing trails. Fails when `len` measures the cells."""
    assert table([["NAME", "READY", "STATUS"], ["web", "yes", "Up to date"], ["証明", "no", ""]], indent=" ") == [
        " NAME  READY  STATUS",
        " web   yes    Up to date",
        " 証明  no",
    ]
    assert table([]) == []


def test_messages_cannot_steer_the_terminal() -> None:
    """Escape sequences, line breaks and bidirectional overrides do nothing. Fails when category Cf is let through."""
    assert printable("a\x1b[31mred\x07\x9bK\nnext\t\u202egnp.exe\u2028z") == "a[31mredK next gnp.exe z"


@given(st.text())
def test_whatever_comes_is_one_harmless_line(text: str) -> None:
    """No character of what is printed is a control or a line break. Fails when only ASCII controls are removed."""
    shown = printable(text)
    assert len(f"{shown}.".splitlines()) == 1
    assert all(unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in shown)
