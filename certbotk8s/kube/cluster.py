"""`ports.Cluster`: cached collections, live reads, and writes that the caches show at once."""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from certbotk8s.domain.api import Kind, ObjectMeta, Resource
from certbotk8s.domain.errors import Conflict, TemporaryError
from certbotk8s.kube.api import NotFound
from certbotk8s.kube.events import EventRecorder
from certbotk8s.kube.store import ObjectStore, no_change
from certbotk8s.kube.watch import Reflector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from certbotk8s.domain.reasons import Reason
    from certbotk8s.kube.api import Api
    from certbotk8s.ports import Clock, Reference

R = TypeVar("R", bound=Resource)

# Secrets that an Issuer names are read live; their watch carries metadata only.
_SECRET_METADATA = Kind("", "v1", "secrets", "Secret", Resource)

_FLUSH_SECONDS = 2.0


@dataclass(frozen=True)
class _Watched(Generic[R]):
    """A collection that is cached, and which objects of its type belong into it."""

    kind: Kind[R]
    store: ObjectStore[R]
    reflectors: tuple[Reflector[R], ...]
    selects: Callable[[ObjectMeta], bool]


class _NamedSecret:
    """The watch of one Secret, shared by all that asked for it."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[], None]] = []
        self.reflector: Reflector[Resource] | None = None

    def changed(self, _old: Resource | None, _new: Resource | None) -> None:
        for listener in list(self.listeners):
            listener()


class KubeCluster:
    """The API server for the reconcilers.

    Watches are declared first and started together. `on_death` is called with a sentence when a watch ends by a bug.
    `fence` is called before every write and raises TemporaryError when this process must change nothing.
    """

    def __init__(
        self, api: Api, clock: Clock, *, on_death: Callable[[str], None], fence: Callable[[], None] = lambda: None
    ) -> None:
        self._fence = fence
        self._api = api
        self._clock = clock
        self._on_death = on_death
        self._events = EventRecorder(api, clock)
        self._watched: dict[tuple[str, str], _Watched[Any]] = {}
        self._lock = threading.Lock()
        self._secrets: dict[tuple[str, str], _NamedSecret] = {}
        self._stopped = False

    # --- watches ------------------------------------------------------------------------------------------------------

    def watch(
        self,
        kind: Kind[R],
        *,
        label_selector: str = "",
        namespaces: Sequence[str] = (),
        indexes: Mapping[str, Callable[[R], Iterable[str]]] | None = None,
        on_change: Callable[[R | None, R | None], None] = no_change,
    ) -> ObjectStore[R]:
        """Declare a cached collection, before `start`; of all namespaces if none is named.

        One per resource type. `label_selector` knows `key`, `key=value` and `key in (a,b)`, comma-separated, since own
        writes are matched against it here. `on_change(old, new)`: see ObjectStore.
        """
        resource = (kind.group, kind.plural)
        if resource in self._watched:
            raise ValueError(f"{kind.plural} are watched already")
        matches = _matcher(label_selector)
        store = ObjectStore(indexes=indexes, on_change=on_change)
        reflectors = tuple(
            Reflector(
                self._api,
                kind,
                store,
                self._clock,
                on_death=self._on_death,
                namespace=namespace,
                label_selector=label_selector,
            )
            for namespace in (tuple(namespaces) if kind.namespaced and namespaces else ("",))
        )

        def selects(meta: ObjectMeta) -> bool:
            in_scope = not (kind.namespaced and namespaces) or meta.namespace in namespaces
            return in_scope and matches(meta.labels)

        self._watched[resource] = _Watched(kind, store, reflectors, selects)
        return store

    def watch_secret(self, namespace: str, name: str, on_change: Callable[[], None]) -> Callable[[], None]:
        """Call `on_change` whenever that Secret appears, changes or goes, until the function returned is called.

        Only that it changed is told, nothing of it is kept. Watch first and read then, so that no change falls between.
        Many may watch the same Secret; there is one request for all. Works with RBAC resourceNames.
        """
        with self._lock:
            watched = self._secrets.get((namespace, name))
            if watched is None:
                watched = self._secrets[namespace, name] = _NamedSecret()
                watched.reflector = Reflector(
                    self._api,
                    _SECRET_METADATA,
                    ObjectStore(on_change=watched.changed),
                    self._clock,
                    on_death=self._on_death,
                    namespace=namespace,
                    field_selector=f"metadata.name={name}",
                )
                if not self._stopped:
                    watched.reflector.start()
            watched.listeners.append(on_change)

        def stop() -> None:
            with self._lock:
                if on_change in watched.listeners:
                    watched.listeners.remove(on_change)
                    if not watched.listeners:
                        del self._secrets[namespace, name]
                        if watched.reflector:
                            watched.reflector.stop()

        return stop

    def start(self) -> None:
        """Begin to fill the caches and to write Events; returns at once."""
        self._events.start()
        for reflector in self._reflectors():
            reflector.start()

    def has_synced(self) -> bool:
        """Whether every declared collection has been read once."""
        return all(reflector.has_synced for reflector in self._reflectors())

    def missing(self) -> str:
        """Which collections have not been read yet, as a sentence part; "" when none."""
        lacking = Counter(
            watched.kind.plural
            for watched in self._watched.values()
            if not all(reflector.has_synced for reflector in watched.reflectors)
        )
        return ", ".join(sorted(lacking))

    def wait_synced(self, stop: threading.Event) -> bool:
        """Wait until all caches are filled or `stop` is set; whether they are filled."""
        waiter = threading.Condition()
        while not self.has_synced() and not stop.is_set():
            with waiter:
                self._clock.wait(waiter, 0.05)
        return self.has_synced()

    def stop(self) -> None:
        """Write the waiting Events (two seconds at most), then end every watch. The caches keep what they have."""
        self._events.flush(_FLUSH_SECONDS)
        self._events.stop()
        with self._lock:
            self._stopped = True
            secrets = [watched.reflector for watched in self._secrets.values() if watched.reflector]
        reflectors: list[Reflector[Any]] = [*self._reflectors(), *secrets]
        for reflector in reflectors:
            reflector.stop()
        for reflector in reflectors:
            reflector.join(1.0)

    def _reflectors(self) -> list[Reflector[Any]]:
        return [reflector for watched in self._watched.values() for reflector in watched.reflectors]

    # --- ports.Cluster ------------------------------------------------------------------------------------------------

    def store(self, kind: Kind[R]) -> ObjectStore[R]:
        """The watched collection of that kind; KeyError if it is not watched, or watched as something else."""
        watched = self._watched[kind.group, kind.plural]
        if watched.kind.type is not kind.type:
            raise KeyError(kind.plural)
        return watched.store

    def get(self, kind: Kind[R], namespace: str, name: str) -> R | None:
        """A live read; None when there is no such object."""
        raw = self._api.get(kind, namespace, name)
        return None if raw is None else _decode(kind, raw)

    def create(self, kind: Kind[R], manifest: Mapping[str, Any]) -> R:
        """POST; raises AlreadyExists when the name is taken."""
        self._fence()
        return self._absorb(kind, self._api.create(kind, manifest))

    def apply(self, kind: Kind[R], manifest: Mapping[str, Any], *, subresource: str = "") -> R:
        """Server-side apply, forced. Raises Conflict when `metadata.uid` or `metadata.resourceVersion` do not hold."""
        self._fence()
        return self._absorb(kind, self._api.apply(kind, manifest, subresource))

    def delete(self, kind: Kind[Any], namespace: str, name: str, *, uid: str = "", version: str = "") -> None:
        """Delete (in the background); no object, or one of another uid, is no error, another version is a Conflict."""
        self._fence()
        try:
            answer = self._api.delete(kind, namespace, name, uid, version)
        except NotFound:
            return
        except Conflict:
            there = self.get(kind, namespace, name)
            if uid and (there is None or there.metadata.uid != uid):
                return
            raise
        watched = self._watched.get((kind.group, kind.plural))
        if watched is None:
            return
        done = _decode_deletion(answer)
        if done.metadata.name:  # a finalizer holds it: it is still there, and marked
            self._absorb(kind, answer)
        elif done.details is not None and done.details.uid:
            key = f"{namespace}/{name}" if kind.namespaced else name
            watched.store.remove(key, done.details.uid, math.inf)

    def event(self, about: Reference, reason: Reason, message: str, *, warning: bool = False) -> None:
        """Record an Event, later and at most once for the same words in ten minutes. Never raises."""
        self._events.record(about, reason, message, warning=warning)

    def _absorb(self, kind: Kind[R], answer: bytes) -> R:
        """The object that the API server answered with, which the cache of its type shows from now on."""
        obj = _decode(kind, answer)
        watched = self._watched.get((kind.group, kind.plural))
        if watched is not None:
            meta = obj.metadata
            if watched.selects(meta):
                watched.store.put(obj if watched.kind is kind else _decode(watched.kind, answer))
            else:
                watched.store.remove(obj.key, meta.uid, int(meta.resource_version))
        return obj


class _Details(msgspec.Struct, frozen=True):
    uid: str = ""


class _DeletedMeta(msgspec.Struct, frozen=True):
    name: str = ""


class _Deletion(msgspec.Struct, frozen=True):
    """What a DELETE is answered with: the object while a finalizer holds it, else a Status with its uid."""

    metadata: _DeletedMeta = _DeletedMeta()
    details: _Details | None = None


_decode_deletion = msgspec.json.Decoder(_Deletion).decode


def _decode(kind: Kind[R], raw: bytes) -> R:
    try:
        return kind.decode(raw)
    except msgspec.MsgspecError as error:
        raise TemporaryError(f"a {kind.kind} from the API server cannot be read: {error}") from error


_TERM = re.compile(r"\s*([^\s,=!()]+)\s*(?:==?\s*([^\s,=!()]*)|\s+in\s*\(([^()]*)\))?\s*(?:,|$)")


def _matcher(selector: str) -> Callable[[Mapping[str, str]], bool]:
    """The label selector as a function of labels; ValueError for one of another form."""
    terms: list[tuple[str, frozenset[str] | None]] = []
    position = 0
    while position < len(selector):
        term = _TERM.match(selector, position)
        if term is None:
            raise ValueError(f"label selector {selector!r} is not of the form key, key=value or key in (a,b)")
        key, value, values = term.groups()
        if values is not None:
            terms.append((key, frozenset(part.strip() for part in values.split(","))))
        else:
            terms.append((key, None if value is None else frozenset([value])))
        position = term.end()

    def matches(labels: Mapping[str, str]) -> bool:
        return all(key in labels and (values is None or labels[key] in values) for key, values in terms)

    return matches
