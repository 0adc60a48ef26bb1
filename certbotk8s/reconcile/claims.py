"""Who is ordering which set of names: at most one Certificate at a time.

CAs answer two orders for the same names and account with one and the same pending order; two Certificates would then
fight over its one certificate. Memory only: after a restart the orders in status are claimed again.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from certbotk8s.ports import Key


class Claims:
    """Claims on order sets; `enqueue` wakes those that waited for one."""

    def __init__(self, enqueue: Callable[[Key], None]) -> None:
        self._enqueue = enqueue
        self._lock = Lock()
        self._holders: dict[str, Key] = {}
        self._held: dict[Key, str] = {}
        self._waiting: dict[str, set[Key]] = {}

    def take(self, key: Key, order_set: str) -> Key | None:
        """Claim the set for `key`: None when it has it now, else who has it; then `key` is enqueued when that ends.

        What else `key` holds is given up.
        """
        if self._held.get(key, order_set) != order_set:
            self.release(key)
        with self._lock:
            holder = self._holders.setdefault(order_set, key)
            if holder != key:
                self._waiting.setdefault(order_set, set()).add(key)
                return holder
            self._held[key] = order_set
            return None

    def release(self, key: Key) -> None:
        """Give up what `key` holds, if anything."""
        with self._lock:
            order_set = self._held.pop(key, "")
            if not order_set:
                return
            del self._holders[order_set]
            waiting = self._waiting.pop(order_set, set())
        for other in waiting:
            self._enqueue(other)
