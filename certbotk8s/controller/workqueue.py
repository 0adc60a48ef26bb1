"""The work queue: keys that want a look, each at most once in it and at most once at work.

Hand-written to client-go's semantics (k8s.io/client-go/util/workqueue), which no Python library has: a key added while
it is at work comes once more afterwards, failures are spaced out per key, and a due time is kept per key instead of a
timer. Two additions: a key whose work was put aside for a call to the outside comes back by `resume`, before all others
and without ever having left the state of being at work; and a key that waited for a moment goes before those that are
new, so that of many things at once some are finished early, instead of all being half done for a long time.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from certbotk8s.ports import Clock, Key

# Who comes back within this many seconds has begun something; who comes back later begins anew.
MOMENT = 10.0
FIRST_DELAY = 0.005
LONGEST_DELAY = 1000.0


class WorkQueue:
    """Thread-safe. All waiting is by the clock given.

    `spread` gives numbers from 0 to 1 that keep the keys which failed together from coming back together.
    """

    def __init__(self, clock: Clock, *, spread: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._spread = spread
        self._waiter = threading.Condition()
        self._queue: deque[Key] = deque()  # may hold keys that `_begun` has overtaken, and are no longer dirty
        self._begun: deque[Key] = deque()
        self._resumed: deque[Key] = deque()
        self._dirty: dict[Key, float] = {}  # wanted, since when; in one of the queues unless at work
        self._processing: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._due: dict[Key, float] = {}
        self._brief: set[Key] = set()  # those of `_due` that have begun something
        self._heap: list[tuple[float, Key]] = []  # may hold entries that `_due` has overruled
        self._shutting_down = False
        self._abandoned = False

    def __len__(self) -> int:
        """How many keys wait for a worker."""
        with self._waiter:
            return len(self._dirty.keys() - self._processing) + len(self._resumed)

    def oldest(self) -> float:
        """For how many seconds the key that was wanted first has been waiting."""
        with self._waiter:
            waiting = [since for key, since in self._dirty.items() if key not in self._processing]
            return self._clock.monotonic() - min(waiting) if waiting else 0.0

    @property
    def shutting_down(self) -> bool:
        """Whether no new work is given out any more."""
        return self._shutting_down

    def add(self, key: Key) -> None:
        """Want a look at `key`, as soon as a worker is free and it is not at work."""
        with self._waiter:
            self._add(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """`add` in that many seconds; of several due times of a key the earliest holds."""
        with self._waiter:
            if self._shutting_down:
                return
            if seconds <= 0:
                self._add(key)
                return
            due = self._clock.monotonic() + seconds
            if key in self._due and self._due[key] <= due:
                return
            self._due[key] = due
            if seconds <= MOMENT:
                self._brief.add(key)
            heapq.heappush(self._heap, (due, key))
            if len(self._heap) > 2 * len(self._due) + 64:
                self._heap = [(due, key) for key, due in self._due.items()]
                heapq.heapify(self._heap)
            if self._heap[0][1] == key:
                self._waiter.notify_all()  # every one that waits must wait less

    def add_rate_limited(self, key: Key) -> None:
        """`add` after a delay that doubles with every call for this key: 5 ms to 1000 s, spread by a quarter."""
        with self._waiter:
            failures = self._failures.get(key, 0)
            self._failures[key] = failures + 1
        delay = min(FIRST_DELAY * 2.0 ** min(failures, 32), LONGEST_DELAY)
        self.add_after(key, delay * (1.0 - 0.25 * self._spread()))

    def forget(self, key: Key) -> None:
        """The work succeeded: the next delay of this key is the shortest again."""
        with self._waiter:
            self._failures.pop(key, None)

    def get(self) -> Key | None:
        """Wait for a key to work on; it counts as at work until `done`. None: there will be none any more."""
        with self._waiter:
            while not self._abandoned:
                if self._resumed:
                    return self._resumed.popleft()
                if self._shutting_down:
                    if not self._processing:
                        return None
                    self._clock.wait(self._waiter, None)
                    continue
                timeout = self._add_due()
                if (key := self._next()) is not None:
                    del self._dirty[key]
                    self._processing.add(key)
                    return key
                self._clock.wait(self._waiter, timeout)
            return None

    def resume(self, key: Key) -> None:
        """The work on `key`, which was put aside, can go on: `get` returns it before any other."""
        with self._waiter:
            self._resumed.append(key)
            self._waiter.notify()

    def done(self, key: Key) -> None:
        """The work on `key` has ended; if it was added meanwhile, it comes again."""
        with self._waiter:
            self._processing.discard(key)
            if key in self._dirty:
                self._queue.append(key)
            if self._shutting_down:
                self._waiter.notify_all()  # it may have been the last one that the others wait for
            else:
                self._waiter.notify()

    def shut_down(self) -> None:
        """Give out no new key. Work that was put aside may still be resumed; `get` ends when none is left."""
        with self._waiter:
            self._shutting_down = True
            self._queue.clear()
            self._begun.clear()
            self._dirty.clear()
            self._due.clear()
            self._brief.clear()
            self._heap.clear()
            self._waiter.notify_all()

    def abandon(self) -> None:
        """End every `get` now, whatever is still at work."""
        with self._waiter:
            self._shutting_down = self._abandoned = True
            self._waiter.notify_all()

    def _add(self, key: Key) -> None:
        if self._shutting_down or key in self._dirty:
            return
        self._dirty[key] = self._clock.monotonic()
        if key not in self._processing:
            self._queue.append(key)
            self._waiter.notify()

    def _next(self) -> Key | None:
        for queue in (self._begun, self._queue):
            while queue:
                key = queue.popleft()
                if key in self._dirty and key not in self._processing:
                    return key
        return None

    def _add_due(self) -> float | None:
        """Queue what is due; the seconds until the next is."""
        now = self._clock.monotonic()
        while self._heap:
            due, key = self._heap[0]
            if self._due.get(key) != due:
                heapq.heappop(self._heap)
            elif due <= now:
                heapq.heappop(self._heap)
                del self._due[key]
                self._add(key)
                if key in self._brief and key not in self._processing:
                    self._begun.append(key)
                self._brief.discard(key)
            else:
                return due - now
        return None
