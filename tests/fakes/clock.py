"""A clock that moves when the test says so."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from threading import Condition as Waiter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

START = datetime(2026, 11, 20, 9, 0, tzinfo=UTC)

# `Clock.wait` may return early. A caller that had worked out its timeout just before `advance` is woken by this.
_LOOK_AGAIN = 0.05


class FakeClock:
    """`ports.Clock` for tests: hours pass in a call of `advance`. Thread-safe."""

    def __init__(self, start: datetime = START) -> None:
        self._start = start
        self._passed = 0.0
        self._lock = threading.Lock()
        self._waiters: list[Waiter] = []

    def now(self) -> datetime:
        """UTC, `start` plus what has passed."""
        with self._lock:
            return self._start + timedelta(seconds=self._passed)

    def monotonic(self) -> float:
        """Seconds that have passed."""
        with self._lock:
            return self._passed

    def advance(self, seconds: float) -> None:
        """Let time pass, and wake everybody who waits to look at it."""
        with self._lock:
            self._passed += seconds
            waiters = list(self._waiters)
        for waiter in waiters:
            with waiter:
                waiter.notify_all()

    def step(self, seconds: float) -> None:
        """Somebody sets the wall clock forward or back; no time passes."""
        with self._lock:
            self._start += timedelta(seconds=seconds)

    def wait(self, waiter: Waiter, timeout: float | None) -> None:
        """Wait in real time until notified or until time has been advanced."""
        if timeout is not None and timeout <= 0:
            return
        with self._lock:
            self._waiters.append(waiter)
        try:
            waiter.wait(_LOOK_AGAIN)
        finally:
            with self._lock:
                self._waiters.remove(waiter)


class HurryingClock(FakeClock):
    """Every wait with a timeout passes at once, and is kept: for code whose only waits are delays between attempts."""

    def __init__(self, start: datetime = START) -> None:
        super().__init__(start)
        self.waits: list[float] = []

    def wait(self, waiter: Waiter, timeout: float | None) -> None:
        """Time moves by the whole timeout."""
        if timeout is None:
            super().wait(waiter, None)
        else:
            self.waits.append(timeout)
            self.advance(timeout)


def soon(look: Callable[[], object], seconds: float = 10.0) -> bool:
    """Whether `look` becomes true within so many real seconds, without time passing on a fake clock."""
    end = time.monotonic() + seconds
    while not look():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
