"""Sweeps by the clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from certbotk8s.controller.timer import Timer
from tests.fakes.clock import START, FakeClock

SECONDS = 20.0


class Sweeping:
    """A timer and when its sweep ran."""

    def __init__(self) -> None:
        # Long ago, so that whoever compares with the machine's own clock finds every run late.
        self.clock = FakeClock(datetime(2001, 1, 1, tzinfo=UTC))
        self.timer = Timer(self.clock)
        self.runs: list[float] = []

    def sweep(self) -> None:
        self.runs.append(self.clock.monotonic())

    def advance(self, seconds: float) -> None:
        """Lets time pass when no sweep is running: one that is due while it still ends would be skipped."""
        executor = self.timer._scheduler._executors["default"]
        self.until(lambda: not any(count for name, count in executor._instances.copy().items() if name != "slow"))
        self.clock.advance(seconds)

    def until(self, look: Callable[[], bool]) -> None:
        pause = threading.Event()
        for _ in range(int(SECONDS / 0.005)):
            if look():
                return
            pause.wait(0.005)
        raise AssertionError(f"never came true; runs {self.runs}")


@pytest.fixture
def sweeping() -> Iterator[Sweeping]:
    one = Sweeping()
    yield one
    one.timer.stop()


def test_intervals_by_the_clock(sweeping: Sweeping) -> None:
    """A sweep runs once per interval of the clock, not of the wall. (Break: BackgroundScheduler as it is.)"""
    sweeping.timer.every(3600, sweeping.sweep, "hourly")
    sweeping.timer.start()
    sweeping.advance(3599)
    assert sweeping.runs == []
    sweeping.advance(362)
    for count in (1, 2, 3, 4):
        sweeping.until(lambda wanted=count: len(sweeping.runs) == wanted)  # type: ignore[misc]
        sweeping.advance(3961)


def test_missed_runs_are_made_up_once(sweeping: Sweeping) -> None:
    """After a long sleep of the machine a sweep runs once, and goes on. (Break: the default misfire_grace_time.)"""
    sweeping.timer.every(60, sweeping.sweep, "often")
    sweeping.timer.start()
    sweeping.advance(86_400)
    sweeping.until(lambda: len(sweeping.runs) >= 1)
    sweeping.advance(132)
    sweeping.until(lambda: sweeping.runs[-1] == 86_532)
    assert len(sweeping.runs) <= 4  # of 1,400: the spread of the times may bring one more on each occasion


def test_a_failing_sweep_goes_on(sweeping: Sweeping, caplog: pytest.LogCaptureFixture) -> None:
    """A sweep that raises is logged by its name and runs again. (Break: the first error ends it unlogged.)"""

    def fail() -> None:
        sweeping.sweep()
        raise ZeroDivisionError

    sweeping.timer.every(60, fail, "due Certificates")
    sweeping.timer.start()
    for count in (1, 2):
        sweeping.advance(66)
        sweeping.until(lambda wanted=count: len(sweeping.runs) == wanted)  # type: ignore[misc]
    sweeping.until(lambda: "the sweep due Certificates failed" in caplog.text)


def test_a_slow_sweep_does_not_overlap(sweeping: Sweeping) -> None:
    """A sweep that outlasts its interval is not begun a second time. (Break: max_instances=2.)"""
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow() -> None:
        begun.release()
        go_on.wait(SECONDS)

    sweeping.timer.every(60, slow, "slow")
    sweeping.timer.every(60, sweeping.sweep, "quick")
    sweeping.timer.start()
    for count in (1, 2, 3):
        sweeping.advance(66)
        sweeping.until(lambda wanted=count: len(sweeping.runs) == wanted)  # type: ignore[misc]
    assert begun.acquire(timeout=SECONDS)
    assert not begun.acquire(blocking=False)
    go_on.set()


def test_a_step_of_the_wall_clock_changes_nothing() -> None:
    """Sweeps go by the monotonic clock: setting the wall clock back does not delay them. (Break: use Clock.now.)"""

    class Stepping(FakeClock):
        """Its wall clock is set back by a day after the first look."""

        back = timedelta(0)

        def now(self) -> datetime:
            return START + timedelta(seconds=self.monotonic()) - self.back

    sweeping = Sweeping()
    clock = sweeping.clock = Stepping()
    sweeping.timer = Timer(clock)
    sweeping.timer.every(60, sweeping.sweep, "often")
    sweeping.timer.start()
    clock.back = timedelta(days=1)
    sweeping.clock.advance(66)
    sweeping.until(lambda: len(sweeping.runs) == 1)
    sweeping.timer.stop()
