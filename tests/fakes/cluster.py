"""An API server in memory and its clients, for tests of what reconcilers and solvers decide and of crashes in between.

`ApiServer` keeps the objects and the rules: uids, resourceVersions, preconditions, server-side apply, finalizers.
`FakeCluster` is `ports.Cluster` for one process; its caches are the real ones of `certbotk8s.kube.store`. Two of them
on one server are two replicas, or a process and the one that replaces it. Nothing is random, and no time passes.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from certbotk8s.domain.api import SECRET, Kind, Resource
from certbotk8s.domain.errors import AlreadyExists, Conflict, PermanentError
from certbotk8s.domain.reasons import Reason
from certbotk8s.kube.store import ObjectStore, no_change

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from certbotk8s.ports import Reference, Store

R = TypeVar("R", bound=Resource)
T = TypeVar("T")
Json = dict[str, Any]

_START = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
_WITH_STATUS = frozenset({"Certificate", "Issuer", "ClusterIssuer", "Ingress"})
_SYSTEM = ("uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")
_WITHOUT_GENERATION = frozenset({"Secret"})
# Lists that server-side apply merges item by item, and what tells two items apart; all others are replaced as a whole.
_SETS: dict[str, Callable[[Any], Any]] = {
    "finalizers": lambda item: item,
    "ownerReferences": lambda item: item["uid"],
}


class Change(NamedTuple):
    """An object as it was written, or as it was when it went (`version` is then that of its deletion)."""

    collection: str
    obj: Json
    version: int
    gone: bool


class ApiServer:
    """Objects by collection (`group/plural`) and key (`namespace/name`), as JSON values."""

    def __init__(self, now: Callable[[], datetime] = lambda: _START) -> None:
        self.log: list[Change] = []
        self.watchers: list[Callable[[], None]] = []
        self._now = now
        self._objects: dict[str, dict[str, Json]] = {}
        self._applied: dict[str, Json] = {}  # by uid: what our field manager applied last
        self._uids = 0

    def get(self, kind: Kind[R], namespace: str, name: str) -> R | None:
        """The object, or None."""
        found = self._collection(kind).get(_key(namespace, name))
        return None if found is None else _decode(kind, found)

    def all(self, kind: Kind[R]) -> list[R]:
        """Every object of that kind, in the order of their keys."""
        return [_decode(kind, obj) for _, obj in sorted(self._collection(kind).items())]

    def objects(self, kind: Kind[Any]) -> list[Json]:
        """Every object of that kind as JSON values, not to be changed."""
        return list(self._collection(kind).values())

    def create(self, kind: Kind[R], manifest: Mapping[str, Any]) -> R:
        """POST."""
        obj = _copy(manifest)
        obj["metadata"] = {part: value for part, value in obj["metadata"].items() if part not in _SYSTEM}
        if kind.kind in _WITH_STATUS:
            obj.pop("status", None)
        return self._insert(kind, obj)

    def apply(self, kind: Kind[R], manifest: Mapping[str, Any], subresource: str = "") -> R:
        """Server-side apply with the one field manager, forced; a status is replaced as a whole."""
        given = _copy(manifest)
        metadata = given["metadata"]
        namespace, name = metadata.get("namespace", ""), metadata["name"]
        preconditions = {part: metadata.pop(part, "") for part in ("uid", "resourceVersion")}
        live = self._collection(kind).get(_key(namespace, name))
        if live is None:
            if subresource or preconditions["uid"]:
                raise Conflict(f"{kind.kind} {_key(namespace, name)} is gone")
            obj = self.create(kind, given)
            self._applied[obj.metadata.uid] = _fields(kind, given)
            return obj
        for part, wanted in preconditions.items():
            if wanted and live["metadata"][part] != wanted:
                raise Conflict(f"{kind.kind} {_key(namespace, name)} changed since it was read")
        if subresource:
            return self._update(kind, live | {"status": given.get("status", {})})
        owned = live["metadata"]["uid"]
        fields = _fields(kind, given)
        before = self._applied.get(owned)
        self._applied[owned] = fields
        return self._update(kind, _merge(live, fields, before or {}), force=before != fields)

    def delete(self, kind: Kind[Any], namespace: str, name: str, uid: str = "", version: str = "") -> None:
        """Delete, or mark as being deleted while there are finalizers."""
        live = self._collection(kind).get(_key(namespace, name))
        if live is None or (uid and live["metadata"]["uid"] != uid):
            return
        if version and live["metadata"]["resourceVersion"] != version:
            raise Conflict(f"{kind.kind} {_key(namespace, name)} changed since it was read")
        if not live["metadata"].get("finalizers"):
            self._drop(kind, live)
        elif "deletionTimestamp" not in live["metadata"]:
            stamped = _copy(live)
            stamped["metadata"]["deletionTimestamp"] = self._time()
            self._update(kind, stamped)

    def put(self, kind: Kind[R], manifest: Mapping[str, Any]) -> R:
        """What somebody else wrote, status and all: the object is there afterwards, and exactly so.

        A new one may bring its own uid, generation and times.
        """
        obj = _copy(manifest)
        metadata = obj["metadata"]
        live = self._collection(kind).get(_key(metadata.get("namespace", ""), metadata["name"]))
        if live is None:
            return self._insert(kind, obj)
        metadata.update({part: live["metadata"][part] for part in _SYSTEM if part in live["metadata"]})
        return self._update(kind, {"apiVersion": kind.api_version, "kind": kind.kind, **obj})

    def _insert(self, kind: Kind[R], obj: Json) -> R:
        metadata = obj["metadata"]
        key = _key(metadata.get("namespace", ""), metadata["name"])
        if key in self._collection(kind):
            raise AlreadyExists(f"{kind.kind} {key} exists already")
        self._uids += 1
        metadata.setdefault("uid", f"00000000-0000-4000-8000-{self._uids:012}")
        metadata.setdefault("creationTimestamp", self._time())
        if kind.kind not in _WITHOUT_GENERATION:
            metadata.setdefault("generation", 1)
        return self._store(kind, {"apiVersion": kind.api_version, "kind": kind.kind, **obj})

    def _update(self, kind: Kind[R], obj: Json, *, force: bool = False) -> R:
        live = self._collection(kind)[_key_of(obj)]
        if obj == live and not force:
            return _decode(kind, live)
        if live.get("immutable") and any(obj.get(part) != live.get(part) for part in ("data", "immutable")):
            raise PermanentError(Reason.INVALID_SPEC, f"{kind.kind} {_key_of(obj)} is immutable.")
        obj = {**obj, "metadata": dict(obj["metadata"])}
        if "generation" in live["metadata"] and _desired(obj) != _desired(live):
            obj["metadata"]["generation"] = live["metadata"]["generation"] + 1
        if "deletionTimestamp" in obj["metadata"] and not obj["metadata"].get("finalizers"):
            self._drop(kind, obj)
            return _decode(kind, obj)
        return self._store(kind, obj)

    def _store(self, kind: Kind[R], obj: Json) -> R:
        version = len(self.log) + 1
        obj["metadata"]["resourceVersion"] = str(version)
        decoded = _decode(kind, obj)
        self._collection(kind)[_key_of(obj)] = obj
        self._tell(Change(_collection(kind), obj, version, gone=False))
        return decoded

    def _drop(self, kind: Kind[Any], obj: Json) -> None:
        del self._collection(kind)[_key_of(obj)]
        self._tell(Change(_collection(kind), obj, len(self.log) + 1, gone=True))

    def _tell(self, change: Change) -> None:
        self.log.append(change)
        for watcher in self.watchers:
            watcher()

    def _collection(self, kind: Kind[Any]) -> dict[str, Json]:
        return self._objects.setdefault(_collection(kind), {})

    def _time(self) -> str:
        return self._now().strftime("%Y-%m-%dT%H:%M:%SZ")


class _Watched(NamedTuple):
    kind: Kind[Any]
    store: ObjectStore[Any]
    selects: Callable[[Json], bool]


class Recorded(NamedTuple):
    """An Event."""

    about: Reference
    reason: Reason
    message: str
    warning: bool


class FakeCluster:
    """`ports.Cluster` on an `ApiServer`.

    `before` and `after` are called around every request with its verb (get, create, apply, delete), the kind
    ("Certificate", "Certificate/status"), namespace and name. What they raise comes out of it: denied when `before`
    raises, done but unknown to the caller when `after` does. While `lagging`, the stores see nothing that others write
    until `catch_up`. `writes` counts the requests that change something, refused ones too.
    """

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.before: Callable[[str, str, str, str], None] = _nothing
        self.after: Callable[[str, str, str, str], None] = _nothing
        self.lagging = False
        self.writes: list[tuple[str, str, str, str]] = []
        self.events: list[Recorded] = []
        self._watched: dict[str, _Watched] = {}
        self._secrets: dict[str, list[Callable[[], None]]] = {}
        self._seen = len(server.log)
        self._lost = 0
        server.watchers.append(self._notice)

    def watch(
        self,
        kind: Kind[R],
        *,
        label_selector: str = "",
        namespaces: Sequence[str] = (),
        indexes: Mapping[str, Callable[[R], Iterable[str]]] | None = None,
        on_change: Callable[[R | None, R | None], None] = no_change,
    ) -> ObjectStore[R]:
        """Keep a cache of a collection, filled at once; as KubeCluster.watch."""
        store = ObjectStore(indexes=indexes, on_change=on_change)
        watched = self._watched[_collection(kind)] = _Watched(kind, store, _selector(label_selector, namespaces))
        self._list(watched)
        return store

    def _list(self, watched: _Watched) -> None:
        objects = self.server.objects(watched.kind)
        chosen = [_decode(watched.kind, obj) for obj in objects if watched.selects(obj["metadata"])]
        watched.store.replace(chosen, len(self.server.log))

    def store(self, kind: Kind[R]) -> Store[R]:
        """The cache; KeyError when the kind is not watched, or watched as something else."""
        watched = self._watched[_collection(kind)]
        if watched.kind.type is not kind.type:
            raise KeyError(kind.plural)
        return watched.store

    def get(self, kind: Kind[R], namespace: str, name: str) -> R | None:
        """A live read."""
        self.before("get", kind.kind, namespace, name)
        found = self.server.get(kind, namespace, name)
        self.after("get", kind.kind, namespace, name)
        return found

    def create(self, kind: Kind[R], manifest: Mapping[str, Any]) -> R:
        """POST."""
        return self._write("create", kind, manifest, "", lambda: self.server.create(kind, manifest))

    def apply(self, kind: Kind[R], manifest: Mapping[str, Any], *, subresource: str = "") -> R:
        """Server-side apply."""
        return self._write("apply", kind, manifest, subresource, lambda: self.server.apply(kind, manifest, subresource))

    def delete(self, kind: Kind[Any], namespace: str, name: str, *, uid: str = "", version: str = "") -> None:
        """Delete."""
        manifest = {"metadata": {"namespace": namespace, "name": name}}
        self._write("delete", kind, manifest, "", lambda: self.server.delete(kind, namespace, name, uid, version))

    def watch_secret(self, namespace: str, name: str, on_change: Callable[[], None]) -> Callable[[], None]:
        """Call `on_change` after each change of that Secret, until the returned function is called."""
        listeners = self._secrets.setdefault(_key(namespace, name), [])
        listeners.append(on_change)
        return lambda: listeners.remove(on_change)

    def event(self, about: Reference, reason: Reason, message: str, *, warning: bool = False) -> None:
        """Record an Event."""
        self.events.append(Recorded(about, reason, message, warning))

    def close(self) -> None:
        """The process is gone: it sees nothing any more."""
        self.server.watchers.remove(self._notice)

    def skip(self) -> None:
        """The watch loses the next change; `relist` brings it back."""
        self._lost += 1

    def relist(self) -> None:
        """What follows a broken watch: everything is listed anew."""
        self._seen, self._lost = len(self.server.log), 0
        for watched in self._watched.values():
            self._list(watched)

    def catch_up(self, most: int | None = None) -> None:
        """Let the caches see everything that was written so far, or `most` changes of it."""
        end = len(self.server.log) if most is None else min(self._seen + most, len(self.server.log))
        while self._seen < end:
            change = self.server.log[self._seen]
            self._seen += 1
            if self._lost:
                self._lost -= 1
                continue
            self._show(change)
            if change.collection == _collection(SECRET):
                for listener in list(self._secrets.get(_key_of(change.obj), ())):
                    listener()

    def _notice(self) -> None:
        if not self.lagging:
            self.catch_up()

    def _write(self, verb: str, kind: Kind[Any], manifest: Mapping[str, Any], sub: str, effect: Callable[[], T]) -> T:
        metadata = manifest["metadata"]
        call = (verb, f"{kind.kind}/{sub}" if sub else kind.kind, metadata.get("namespace", ""), metadata["name"])
        self.writes.append(call)
        self.before(*call)
        begin = len(self.server.log)
        answer = effect()
        end = len(self.server.log)
        self.after(*call)
        for change in self.server.log[begin:end]:
            self._show(change)
        return answer

    def _show(self, change: Change) -> None:
        watched = self._watched.get(change.collection)
        if watched is None:
            return
        metadata = change.obj["metadata"]
        if change.gone or not watched.selects(metadata):
            watched.store.remove(_key_of(change.obj), metadata["uid"], change.version)
        else:
            watched.store.put(_decode(watched.kind, change.obj))


def _nothing(_verb: str, _kind: str, _namespace: str, _name: str) -> None:
    """A hook that lets everything pass."""


def _selector(labels: str, namespaces: Sequence[str]) -> Callable[[Json], bool]:
    """Whether an object with that metadata is in the namespaces and fits `key`, `key=value`, `key in (a,b)`, ..."""
    terms = re.findall(r"([^\s,=()]+)\s*(?:=\s*([^\s,()]+)|in\s*\(([^)]*)\))?", labels)

    def selects(metadata: Json) -> bool:
        found = metadata.get("labels", {})
        return (not namespaces or metadata.get("namespace") in namespaces) and all(
            key in found and (not (one or many) or found[key] in (one, *many.replace(" ", "").split(",")))
            for key, one, many in terms
        )

    return selects


def _copy(manifest: Mapping[str, Any]) -> Json:
    copy: Json = msgspec.json.decode(msgspec.json.encode(manifest))
    return copy


def _decode(kind: Kind[R], obj: Json) -> R:
    return kind.decode(msgspec.json.encode(obj))


def _collection(kind: Kind[Any]) -> str:
    return f"{kind.group}/{kind.plural}"


def _key(namespace: str, name: str) -> str:
    return f"{namespace}/{name}" if namespace else name


def _key_of(obj: Json) -> str:
    return _key(obj["metadata"].get("namespace", ""), obj["metadata"]["name"])


def _desired(obj: Json) -> Json:
    return {part: value for part, value in obj.items() if part not in ("metadata", "status")}


def _fields(kind: Kind[Any], given: Json) -> Json:
    """What an apply may touch: all but the status of a kind that has it as a subresource."""
    return {part: value for part, value in given.items() if part != "status" or kind.kind not in _WITH_STATUS}


def _merge(live: Json, new: Json, old: Json) -> Json:
    """`live` with the fields of `new`, without those that `old` had and `new` has no more; `live` stays as it is."""
    merged = dict(live)
    for part in old.keys() - new.keys():
        rest: Any = None
        if _both(dict, merged.get(part), old[part]):
            rest = _merge(merged[part], {}, old[part])
        elif part in _SETS and part in merged:
            rest = _unite(part, merged[part], [], old[part])
        elif merged.get(part) != old[part]:
            rest = merged.get(part)  # whoever changed it since owns it now
        if rest:
            merged[part] = rest
        else:
            merged.pop(part, None)
    for part, value in new.items():
        known = old.get(part)
        if _both(dict, merged.get(part), value):
            merged[part] = _merge(merged[part], value, known if isinstance(known, dict) else {})
        elif part in _SETS and part in merged:
            merged[part] = _unite(part, merged[part], value, known or [])
        else:
            merged[part] = value
    return merged


def _unite(part: str, live: list[Any], new: list[Any], old: list[Any]) -> list[Any]:
    identity = _SETS[part]
    ours = {identity(item) for item in (*new, *old)}
    return [item for item in live if identity(item) not in ours] + new


def _both(kind: type, one: Any, other: Any) -> bool:
    return isinstance(one, kind) and isinstance(other, kind)
