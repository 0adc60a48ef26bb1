"""How many orders of an issuer are under way at once, and whose turn is next: some CAs bear few.

Memory only: orders in status hold their places again after a restart, before any new one is placed.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from certbotk8s.ports import Key


class Turn(NamedTuple):
    """Who goes before whom, the least first: certificates to be renewed by their expiry, then new ones by their age."""

    first_issuance: bool
    moment: float


@dataclass
class _Issuer:
    limit: int = 0
    holders: set[Key] = field(default_factory=set)
    queue: list[tuple[Turn, Key]] = field(default_factory=list)  # a heap; may hold what `_waiting` has overruled
    queued: set[tuple[Turn, Key]] = field(default_factory=set)


class Places:
    """The places of all issuers, by Certificate; `enqueue` wakes the one whose turn it is when a place is free."""

    def __init__(self, enqueue: Callable[[Key], None]) -> None:
        self._enqueue = enqueue
        self._lock = Lock()
        self._issuers: dict[Key, _Issuer] = {}
        self._held: dict[Key, Key] = {}
        self._waiting: dict[Key, tuple[Key, Turn]] = {}

    def hold(self, issuer: Key, keys: Iterable[Key]) -> None:
        """These have orders under way there, whatever the limit."""
        with self._lock:
            for key in keys:
                self._hold(key, issuer)

    def take(self, key: Key, issuer: Key, limit: int, turn: Turn) -> bool:
        """Whether `key` has a place at the issuer, of that many; if not, it is enqueued when it is its turn."""
        with self._lock:
            self._waiting.pop(key, None)
            there = self._issuers.setdefault(issuer, _Issuer())
            there.limit = limit
            if self._held.get(key) != issuer:
                first = self._first(issuer)
                if len(there.holders) >= limit or (first and first < (turn, key)):
                    self._waiting[key] = issuer, turn
                    if (turn, key) not in there.queued:
                        there.queued.add((turn, key))
                        heapq.heappush(there.queue, (turn, key))
                else:
                    self._hold(key, issuer)
            has = self._held.get(key) == issuer
        self._wake(issuer)
        return has

    def release(self, key: Key, *, waits: bool = False) -> None:
        """Give the place of `key` back, if it has one, and its turn, unless it still waits for that."""
        with self._lock:
            freed = []
            if issuer := self._held.pop(key, None):
                self._issuers[issuer].holders.discard(key)
                freed.append(issuer)
            if not waits and (wait := self._waiting.pop(key, None)):
                freed.append(wait[0])
        for issuer in freed:
            self._wake(issuer)

    def _hold(self, key: Key, issuer: Key) -> None:
        before = self._held.get(key)
        if before is not None and before != issuer:
            self._issuers[before].holders.discard(key)
        self._held[key] = issuer
        self._waiting.pop(key, None)
        self._issuers.setdefault(issuer, _Issuer()).holders.add(key)

    def _first(self, issuer: Key) -> tuple[Turn, Key] | None:
        """Whose turn is next."""
        queue = self._issuers[issuer].queue
        while queue:
            turn, key = queue[0]
            if self._waiting.get(key) == (issuer, turn):
                return queue[0]
            self._issuers[issuer].queued.discard(heapq.heappop(queue))
        return None

    def _wake(self, issuer: Key) -> None:
        with self._lock:
            there = self._issuers.get(issuer)
            if there is None:
                return
            first = self._first(issuer) if len(there.holders) < there.limit else None
            if not there.holders and not there.queue:
                del self._issuers[issuer]
        if first:
            self._enqueue(first[1])
