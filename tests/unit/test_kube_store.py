"""The cache: newest version wins, deletions stay deletions, indexes follow."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from certbotk8s.domain.api import ObjectMeta, Resource
from certbotk8s.kube.store import ObjectStore

Change = tuple[Resource | None, Resource | None]


def thing(name: str, version: int, *, uid: str = "", namespace: str = "shop", **labels: str) -> Resource:
    meta = ObjectMeta(
        name=name, namespace=namespace, uid=uid or f"uid-{name}", resource_version=str(version), labels=labels
    )
    return Resource(metadata=meta)


class Told:
    """A store and what it told."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.store: ObjectStore[Resource] = ObjectStore(
            indexes={
                "app": lambda obj: [obj.metadata.labels[key] for key in ("app", "also") if key in obj.metadata.labels]
            },
            on_change=lambda old, new: self.changes.append((old, new)),
        )


def test_newest_version_wins() -> None:
    """An older or equal version changes nothing and tells nothing. (Break: compare versions as text: "9" > "10".)"""
    told = Told()
    new, newer = thing("web", 9), thing("web", 10)
    for obj in (new, newer, new, newer):
        told.store.put(obj)
    assert told.store.get("shop/web") is newer
    assert told.changes == [(None, new), (new, newer)]


def test_a_late_event_does_not_revive() -> None:
    """After a deletion nothing older brings the object back, a namesake does. (Break: remove leaves no tombstone.)"""
    told = Told()
    told.store.put(thing("web", 5))
    told.store.remove("shop/web", "uid-web", math.inf)
    told.store.put(thing("web", 7))
    assert told.store.get("shop/web") is None
    namesake = thing("web", 8, uid="another")
    told.store.put(namesake)
    assert told.store.get("shop/web") is namesake


def test_a_late_deletion_spares_a_namesake() -> None:
    """The deletion of an earlier uid leaves the object of that name alone. (Break: remove goes by the key alone.)"""
    told = Told()
    told.store.put(thing("web", 8, uid="second"))
    told.store.remove("shop/web", "first", 9)
    assert told.store.get("shop/web") is not None


def test_what_was_deselected_may_return() -> None:
    """An object gone from the selection at one version returns at a later one. (Break: tombstones never yield.)"""
    told = Told()
    told.store.put(thing("web", 5))
    told.store.remove("shop/web", "uid-web", 6)
    told.store.put(thing("web", 6))
    assert told.store.get("shop/web") is None
    told.store.put(thing("web", 7))
    assert told.store.get("shop/web") is not None
    told.store.remove("shop/web", "uid-web", 6)
    assert told.store.get("shop/web") is not None


def test_a_list_removes_what_it_lacks() -> None:
    """What a list no longer has is told as deleted, and its late events are ignored. (Break: replace only adds.)"""
    told = Told()
    stays, goes = thing("stays", 3), thing("goes", 4)
    told.store.put(stays)
    told.store.put(goes)
    told.changes.clear()
    told.store.replace([stays], 9)
    assert told.changes == [(goes, None)]
    told.store.put(thing("goes", 8))
    assert told.store.get("shop/goes") is None


def test_a_list_spares_what_is_newer() -> None:
    """An own write newer than the list, another namespace and the unreadable stay. (Break: replace asks no version.)"""
    told = Told()
    told.store.put(thing("written-since", 12))
    told.store.put(thing("elsewhere", 3, namespace="blog"))
    told.store.put(thing("unreadable", 3))
    told.store.replace([], 9, namespace="shop", keep={"shop/unreadable"})
    assert [obj.key for obj in told.store.all()] == ["shop/written-since", "blog/elsewhere", "shop/unreadable"]


def test_tombstones_are_bounded() -> None:
    """A hundred thousand deletions do not stay in memory. (Break: _bury drops none.)"""
    told = Told()
    for number in range(10_000):
        told.store.remove(f"shop/{number}", f"uid-{number}", number)
    assert len(told.store._tombstones) < 5_000


def test_handlers_may_read_and_write() -> None:
    """A handler runs outside the lock, and finds what it was told of. (Break: call on_change under the lock.)"""
    seen: list[int] = []

    def look(_old: Resource | None, new: Resource | None) -> None:
        seen.append(len(store.all()))
        if new is not None and new.metadata.name == "web":
            store.put(thing("api", 2))

    store: ObjectStore[Resource] = ObjectStore(on_change=look)
    store.put(thing("web", 1))
    assert seen == [1, 2]


def test_index_of_an_object_with_many_values() -> None:
    """`find` gives the objects of a value in order of keys, whatever happened before. (Break: sorted is left out.)"""
    told = Told()
    for number, name in enumerate(["c", "a", "b"], start=1):
        told.store.put(thing(name, number, app="web", also="shop"))
    assert [obj.metadata.name for obj in told.store.find("app", "web")] == ["a", "b", "c"]
    told.store.put(thing("a", 9, app="api"))
    assert [obj.metadata.name for obj in told.store.find("app", "shop")] == ["b", "c"]
    told.store.remove("shop/b", "uid-b", math.inf)
    assert [obj.metadata.name for obj in told.store.find("app", "web")] == ["c"]
    assert told.store.find("app", "nothing") == []


history = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["one", "two", ""])), min_size=1, max_size=12)


@given(history=history, data=st.data())
def test_any_order_ends_the_same(history: list[tuple[str, str]], data: st.DataObject) -> None:
    """Every version of every object, in any order and any number of times, ends in the last one of each.

    A label "" is a deletion; after it the object has a new uid. (Break: put ignores tombstones.)
    """
    steps: list[tuple[Resource, bool]] = []
    life: dict[str, int] = {}
    for version, (name, app) in enumerate(history, start=1):
        steps.append((thing(name, version, uid=f"{name}-{life.get(name, 0)}", app=app), app == ""))
        if app == "":
            life[name] = life.get(name, 0) + 1
    told = Told()
    for obj, deleted in data.draw(st.permutations(steps + steps)):
        if deleted:
            told.store.remove(obj.key, obj.metadata.uid, int(obj.metadata.resource_version))
        else:
            told.store.put(obj)
    expected = dict(_survivors(steps))
    assert {obj.key: obj for obj in told.store.all()} == expected
    for app in ("one", "two"):
        wanted = sorted(key for key, obj in expected.items() if obj.metadata.labels["app"] == app)
        assert [obj.key for obj in told.store.find("app", app)] == wanted


def _survivors(steps: list[tuple[Resource, bool]]) -> Iterator[tuple[str, Resource]]:
    last: dict[str, tuple[Resource, bool]] = {}
    for obj, deleted in steps:
        last[obj.key] = (obj, deleted)
    return ((key, obj) for key, (obj, deleted) in last.items() if not deleted)
