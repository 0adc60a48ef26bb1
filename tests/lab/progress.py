"""One line per thing that takes time, on stderr: rewritten in place on a terminal, else repeated every 30 s."""

import shutil
import sys
import time
from typing import TextIO

_REPEAT = 30.0


def show(text: str, seconds: float | None = None, topic: str = "lab") -> None:
    """Prints one finished line: `topic`, the text, and how long it took."""
    print(_line(topic, text, seconds), file=sys.stderr, flush=True)


class Progress:
    """The line of one thing under way. Call `beat` often, and `done` at its end."""

    def __init__(self, topic: str, stream: TextIO | None = None) -> None:
        """`topic` is its first column; `stream` defaults to stderr."""
        self._topic = topic
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._started = time.monotonic()
        self._shown_at = float("-inf")

    def beat(self, text: str) -> None:
        """Says what goes on now; prints only as often as the stream can bear."""
        now = time.monotonic()
        if now - self._shown_at < (0.2 if self._terminal else _REPEAT):
            return
        self._shown_at = now
        self._write(text, end="" if self._terminal else "\n")

    def done(self, text: str) -> None:
        """Says how it ended, with the time that it took."""
        self._write(text, end="\n")
        self._shown_at = float("-inf")

    def _write(self, text: str, end: str) -> None:
        line = _line(self._topic, text, time.monotonic() - self._started)
        if self._terminal:
            line = "\r\033[K" + line[: shutil.get_terminal_size().columns - 1]
        print(line, end=end, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """A time as people say it: `3.4 s`, `42 s`, `5 min 20 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:2d} s" if minutes else f"{rest} s"


def _line(topic: str, text: str, seconds: float | None) -> str:
    if seconds is None:
        return f"{topic:<8} {text}"
    return f"{topic:<8} {text:<76} {duration(seconds):>11}"
