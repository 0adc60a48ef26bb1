"""The cache of one collection: what the watch brought, and the own writes as soon as they are answered.

Both come in any order, from several threads. Three rules make that safe: the newest resourceVersion wins (versions of
one resource type are comparable as integers), a deletion leaves a tombstone so that nothing late revives the object,
and a list does not remove what is newer than itself.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

from certbotk8s.domain.api import Resource

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

R = TypeVar("R", bound=Resource)

# A tombstone is needed only while an answer or an event about the object may still be under way.
_TOMBSTONES = 4096


def no_change(_old: Resource | None, _new: Resource | None) -> None:
    """For a store whose changes concern nobody."""


class ObjectStore(Generic[R]):
    """`ports.Store`: thread-safe, with indexes.

    `indexes` maps a name to a pure function from an object to the values under which it is found. `on_change(old, new)`
    is called once for every change of what is stored, whatever brought it, by the thread that brought it and outside
    the lock; a first sight has no `old`, a deletion no `new`.
    """

    def __init__(
        self,
        *,
        indexes: Mapping[str, Callable[[R], Iterable[str]]] | None = None,
        on_change: Callable[[R | None, R | None], None] = no_change,
    ) -> None:
        self._lock = threading.Lock()
        self._objects: dict[str, R] = {}
        self._functions = dict(indexes or {})
        self._indexes: dict[str, dict[str, set[str]]] = {name: {} for name in self._functions}
        self._tombstones: OrderedDict[str, float] = OrderedDict()
        self._on_change = on_change

    def __len__(self) -> int:
        return len(self._objects)

    def get(self, key: str) -> R | None:
        """The object `namespace/name` (or `name` of a cluster-scoped one), or None."""
        return self._objects.get(key)

    def find(self, index: str, value: str) -> Sequence[R]:
        """The objects whose index function gave that value, in order of their keys."""
        with self._lock:
            return [self._objects[key] for key in sorted(self._indexes[index].get(value, ()))]

    def all(self) -> Sequence[R]:
        """Every object."""
        with self._lock:
            return list(self._objects.values())

    def knows(self, key: str, uid: str, version: int) -> bool:
        """Whether `put` of that version would change nothing: it, a newer one, or its deletion is known."""
        with self._lock:
            return self._knows(key, uid, version)

    def put(self, new: R) -> None:
        """Store an object, unless it or its deletion is known from a version at least as new."""
        with self._lock:
            changes = self._put(new)
        self._tell(changes)

    def remove(self, key: str, uid: str, version: float) -> None:
        """Forget an object that was gone at `version` (infinite: for ever); a newer one stays."""
        with self._lock:
            self._bury(uid, version)
            old = self._objects.get(key)
            changes: list[tuple[R | None, R | None]] = []
            if old is not None and old.metadata.uid == uid and _version(old) <= version:
                self._exchange(key, old, None)
                changes.append((old, None))
        self._tell(changes)

    def replace(self, objects: Iterable[R], version: int, *, namespace: str = "", keep: Collection[str] = ()) -> None:
        """Take over a whole list of that version, of one namespace or of all; what it lacks is gone.

        `keep` are keys of objects that the list has but that could not be read: what is known of them stays.
        """
        with self._lock:
            present = set(keep)
            changes: list[tuple[R | None, R | None]] = []
            for new in objects:
                present.add(new.key)
                changes += self._put(new)
            for key, old in list(self._objects.items()):
                elsewhere = namespace and old.metadata.namespace != namespace
                if key in present or elsewhere or _version(old) > version:
                    continue
                self._bury(old.metadata.uid, version)
                self._exchange(key, old, None)
                changes.append((old, None))
        self._tell(changes)

    def _put(self, new: R) -> list[tuple[R | None, R | None]]:
        if self._knows(new.key, new.metadata.uid, _version(new)):
            return []
        old = self._objects.get(new.key)
        self._exchange(new.key, old, new)
        return [(old, new)]

    def _knows(self, key: str, uid: str, version: int) -> bool:
        old = self._objects.get(key)
        return (old is not None and _version(old) >= version) or self._tombstones.get(uid, -1) >= version

    def _exchange(self, key: str, old: R | None, new: R | None) -> None:
        moves = [
            (self._indexes[name], _values(function, old), _values(function, new))
            for name, function in self._functions.items()
        ]
        for index, before, after in moves:
            for value in before - after:
                index[value].discard(key)
                if not index[value]:
                    del index[value]
            for value in after - before:
                index.setdefault(value, set()).add(key)
        if new is None:
            del self._objects[key]
        else:
            self._objects[key] = new

    def _bury(self, uid: str, version: float) -> None:
        self._tombstones[uid] = max(version, self._tombstones.pop(uid, version))
        while len(self._tombstones) > _TOMBSTONES:
            self._tombstones.popitem(last=False)

    def _tell(self, changes: list[tuple[R | None, R | None]]) -> None:
        for old, new in changes:
            self._on_change(old, new)


def _values(function: Callable[[R], Iterable[str]], obj: R | None) -> set[str]:
    return set() if obj is None else set(function(obj))


def _version(obj: Resource) -> int:
    return int(obj.metadata.resource_version)
