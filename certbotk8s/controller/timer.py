"""Interval sweeps. They only heal: exact times are per key in the work queue."""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.base import STATE_STOPPED, BaseScheduler
from apscheduler.triggers.interval import IntervalTrigger

if TYPE_CHECKING:
    from collections.abc import Callable

    from certbotk8s.ports import Clock

log = logging.getLogger(__name__)

_LONGEST_WAIT = 60.0


class Timer:
    """Calls functions at intervals, on threads of its own, by the clock given.

    A run that was missed is made up once, never dropped; a function never runs twice at once; one that raises is logged
    and called again the next time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._scheduler = _ClockScheduler(clock)

    def every(self, seconds: float, function: Callable[[], None], name: str) -> None:
        """Call `function` every so many seconds (a tenth more at most, so that replicas differ), first after one."""
        start = datetime.now(self._scheduler.timezone).astimezone(UTC) + timedelta(seconds=seconds)  # noqa: TID251
        trigger = IntervalTrigger(seconds=seconds, start_date=start, timezone=UTC, jitter=seconds / 10)

        def run() -> None:
            try:
                function()
            except Exception:
                log.exception("the sweep %s failed; the next is in about %.0f s", name, seconds)

        self._scheduler.add_job(
            run, trigger, id=name, name=name, misfire_grace_time=None, coalesce=True, max_instances=1
        )

    def start(self) -> None:
        """Begin."""
        self._scheduler.start()

    def stop(self) -> None:
        """End; a function that is running is not waited for."""
        self._scheduler.shutdown()


class _ClockZone(tzinfo):
    """UTC in which it is as late as the clock says: APScheduler takes no clock, but asks `datetime.now(timezone)`.

    It goes by the monotonic clock, so that a step of the wall clock neither drops sweeps nor delays them.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._origin = clock.now() - timedelta(seconds=clock.monotonic())

    def fromutc(self, _: datetime) -> datetime:
        return (self._origin + timedelta(seconds=self._clock.monotonic())).replace(tzinfo=self)

    def utcoffset(self, _: datetime | None) -> timedelta:
        return timedelta(0)

    def dst(self, _: datetime | None) -> timedelta:
        return timedelta(0)

    def tzname(self, _: datetime | None) -> str:
        return "UTC"


class _ClockScheduler(BaseScheduler):  # type: ignore[misc]
    """A BackgroundScheduler that waits by the clock, extended where APScheduler's documentation says one can.

    The next time is looked up here, not taken from `_process_jobs`, which converts it into the zone above.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(timezone=_ClockZone(clock), executors={"default": ThreadPoolExecutor(4)})
        self._clock = clock
        self._waiter = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="timer", daemon=True)

    def start(self) -> None:
        super().start()
        self._thread.start()

    def shutdown(self) -> None:
        super().shutdown(wait=False)
        self.wakeup()
        self._thread.join()

    def wakeup(self) -> None:
        with self._waiter:
            self._waiter.notify_all()

    def _loop(self) -> None:
        while self.state != STATE_STOPPED:
            self._process_jobs()
            times = [job.next_run_time for job in self.get_jobs()]
            with self._waiter:
                now = datetime.now(self.timezone)  # noqa: TID251 - the clock's, by the zone
                left = min(((time - now).total_seconds() for time in times), default=_LONGEST_WAIT)
                if left > 0 and self.state != STATE_STOPPED:
                    self._clock.wait(self._waiter, left)
