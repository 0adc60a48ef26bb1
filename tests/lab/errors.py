"""What the lab says when it cannot go on."""

from collections import deque
from pathlib import Path


class LabError(Exception):
    """A lab that cannot be built or started; the message says what happened, why, and what to do."""


def last_lines(path: Path, count: int = 15) -> str:
    """The last `count` lines of a log file, indented for a message; says so when there are none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            tail = deque(lines, maxlen=count)
    except FileNotFoundError:
        tail = deque()
    return "".join(f"  {line.rstrip()}\n" for line in tail) or "  (it wrote nothing)\n"
