"""Threads for calls that a worker must not wait for: a pool per name, made when it is first used, gone when idle.

Hand-written, since `concurrent.futures` keeps its threads for ever, and an account that was used once would hold eight.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from certbotk8s.ports import Clock

log = logging.getLogger(__name__)

IDLE_SECONDS = 60.0


class _Pool:
    def __init__(self, lock: threading.Lock) -> None:
        self.waiter = threading.Condition(lock)
        self.jobs: deque[Callable[[], None]] = deque()
        self.threads = 0
        self.idle = 0


class Pools:
    """Runs functions on threads, at most `limit` at once per pool. A function must not raise."""

    def __init__(self, clock: Clock, *, on_death: Callable[[str], None], limit: int = 8) -> None:
        self._clock = clock
        self._on_death = on_death
        self._limit = limit
        self._lock = threading.Lock()
        self._pools: dict[str, _Pool] = {}
        self._stopped = False

    def __len__(self) -> int:
        """How many pools have threads."""
        with self._lock:
            return len(self._pools)

    def submit(self, name: str, function: Callable[[], None]) -> None:
        """Run it as soon as a thread of that pool is free; dropped after `stop`."""
        with self._lock:
            if self._stopped:
                return
            pool = self._pools.get(name)
            if pool is None:
                pool = self._pools[name] = _Pool(self._lock)
            pool.jobs.append(function)
            if len(pool.jobs) <= pool.idle or pool.threads >= self._limit:
                pool.waiter.notify()
                return
            pool.threads += 1
        threading.Thread(target=self._live, args=(name, pool), name=f"pool {name}", daemon=True).start()

    def stop(self) -> None:
        """Start nothing more; a function that is running ends by itself."""
        with self._lock:
            self._stopped = True
            for pool in self._pools.values():
                pool.jobs.clear()
                pool.waiter.notify_all()

    def _live(self, name: str, pool: _Pool) -> None:
        try:
            while (job := self._next(name, pool)) is not None:
                job()
        except BaseException:
            log.exception("a thread of pool %s died", name)
            self._on_death(f"a thread of pool {name} died")

    def _next(self, name: str, pool: _Pool) -> Callable[[], None] | None:
        """The next function; None when this thread has been idle for too long."""
        with self._lock:
            deadline = self._clock.monotonic() + IDLE_SECONDS
            pool.idle += 1
            while not pool.jobs and not self._stopped and (left := deadline - self._clock.monotonic()) > 0:
                self._clock.wait(pool.waiter, left)
            pool.idle -= 1
            if pool.jobs:
                return pool.jobs.popleft()
            pool.threads -= 1
            if pool.threads == 0 and self._pools.get(name) is pool:
                del self._pools[name]
            return None
