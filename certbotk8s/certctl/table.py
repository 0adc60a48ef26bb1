"""Text for a terminal: times, columns, and what strangers wrote made harmless. Pure functions.

Written out because what a table needs is thirty lines: the libraries for it bring colours, wrapping and, in rich's
case, three times the start-up time of this program.
"""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_GAP = "  "
# (from this many seconds on, unit in seconds, letter): two of a unit before the next larger one is used, so that the
# figure is never further off than by half.
_UNITS = ((2 * 86400, 86400, "d"), (2 * 3600, 3600, "h"), (120, 60, "m"), (0, 1, "s"))
# How messages of the controller give a time.
_TIME = re.compile(r"(?:\b(until|at) )?\b(\d{4}-\d{2}-\d{2} \d{2}:\d{2}) UTC\b")


def printable(text: object) -> str:
    """`text` on one line without control, formatting and bidirectional characters: it may come from a stranger."""
    return "".join(
        " " if character.isspace() else character
        for character in str(text)
        if character.isspace() or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    )


def span(delta: timedelta) -> str:
    """A length of time in its largest unit, rounded down: `59d`, `5h`, `3m`, `40s`. The sign is left out."""
    seconds = abs(delta) // timedelta(seconds=1)
    unit, letter = next((unit, letter) for least, unit, letter in _UNITS if seconds >= least)
    return f"{seconds // unit}{letter}"


def relative(time: datetime, now: datetime) -> str:
    """`in 59d` or `5m ago`."""
    return f"{span(time - now)} ago" if time < now else f"in {span(time - now)}"


def absolute(time: datetime | None) -> str:
    """RFC 3339 in UTC, to the second: `2027-02-18T04:10:00Z`; `-` for none."""
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}" if time else "-"


def relative_times(message: str, now: datetime) -> str:
    """A message of the controller with its absolute times made relative: `next attempt in 41m`.

    Messages give minutes; within one of them nothing is said about which second.
    """

    def rewrite(match: re.Match[str]) -> str:
        try:
            time = datetime.strptime(match[2], "%Y-%m-%d %H:%M").replace(tzinfo=UTC)
        except ValueError:  # 2026-99-99: no time that the controller wrote
            return match[0]
        until, left = match[1] == "until", time - now
        if timedelta(0) < left < timedelta(minutes=1):
            return "for about a minute" if until else "in about a minute"
        if -timedelta(minutes=1) < left <= timedelta(0):
            return "until this minute" if until else "this minute"
        if until:
            return f"for another {span(left)}" if left > timedelta(0) else f"until {relative(time, now)}"
        return relative(time, now)

    return _TIME.sub(rewrite, message)


def widths(rows: Iterable[Sequence[str]]) -> list[int]:
    """The width of each column."""
    return [max(map(_width, column)) for column in zip(*rows, strict=True)]


def line(row: Sequence[str], columns: Sequence[int], indent: str = "") -> str:
    """One row in columns of at least these widths; the last column is not padded."""
    cells = [cell + " " * (width - _width(cell)) for cell, width in zip(row, columns, strict=True)]
    return indent + _GAP.join(cells).rstrip()


def table(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Rows (the head is one of them) as lines in columns."""
    columns = widths(rows) if rows else []
    return [line(row, columns, indent) for row in rows]


def _width(text: str) -> int:
    """Columns that a terminal gives the text: two for a wide character, none for a combining one."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )
