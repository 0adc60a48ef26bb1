"""The reflector in trouble: what a real API server does only on bad days."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from certbotk8s.domain.api import INGRESS, Ingress, Kind, Resource
from certbotk8s.kube import api, watch
from certbotk8s.kube.store import ObjectStore
from certbotk8s.kube.watch import Reflector
from tests.fakes.apiserver import Answer, ScriptedApiServer, event, hang_up, page, status, status_object, stream
from tests.fakes.clock import HurryingClock

SECONDS = 20.0


def web(version: int, name: str = "web", host: object = "shop.example.test", uid: str = "") -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": "shop",
            "name": name,
            "uid": uid or f"uid-{name}",
            "resourceVersion": str(version),
        },
        "spec": {"rules": [{"host": host}]},
    }


def bookmark(version: int) -> bytes:
    return event("BOOKMARK", {"metadata": {"resourceVersion": str(version)}})


class Watched:
    """A reflector on a script, and what came of it."""

    def __init__(self) -> None:
        self.clock = HurryingClock()
        self.deaths: list[str] = []
        self.told: list[str] = []
        self.store: ObjectStore[Ingress] = ObjectStore(on_change=self._tell)
        self._servers: list[ScriptedApiServer] = []
        self._reflectors: list[Reflector[Ingress]] = []

    def run(
        self, *, answers: list[Answer], watches: list[Answer], kind: Kind[Ingress] = INGRESS, namespace: str = ""
    ) -> ScriptedApiServer:
        server = ScriptedApiServer(answers=answers, watches=watches)
        reflector = Reflector(
            server.api(), kind, self.store, self.clock, on_death=self.deaths.append, namespace=namespace
        )
        self._servers.append(server)
        self._reflectors.append(reflector)
        reflector.start()
        return server

    def until(self, look: Callable[[], bool]) -> None:
        pause = threading.Event()
        for _ in range(int(SECONDS / 0.005)):
            if look():
                return
            pause.wait(0.005)
        raise AssertionError(f"never came true; told {self.told}, died {self.deaths}")

    def close(self) -> None:
        for reflector in self._reflectors:
            reflector.stop()
            assert reflector.join(SECONDS)
        for server in self._servers:
            server.close()
            assert server.unexpected == []

    def _tell(self, old: Ingress | None, new: Ingress | None) -> None:
        there = new or old
        assert there is not None
        sign = "-" if new is None else "+" if old is None else "~"
        self.told.append(f"{sign}{there.metadata.name}@{there.metadata.resource_version}")


@pytest.fixture
def watched() -> Iterator[Watched]:
    one = Watched()
    yield one
    one.close()
    assert one.deaths == []


def versions(server: ScriptedApiServer) -> list[str]:
    """The versions that watches began at, "list" for a list."""
    return [request.query.get("resourceVersion", "list") for request in server.requests]


def test_pages_and_bookmarks(watched: Watched) -> None:
    """A list is read page by page, and the next watch begins at the last bookmark. (Break: bookmarks are skipped.)"""
    server = watched.run(
        answers=[page(web(1, "a"), version="5", token="more"), page(web(2, "b"), version="5")],
        watches=[stream(event("ADDED", web(7, "c")), bookmark(90)), stream(then="hold")],
    )
    watched.until(lambda: len(versions(server)) == 4)
    assert versions(server) == ["list", "list", "5", "90"]
    assert [request.query.get("continue") for request in server.requests[:2]] == [None, "more"]
    assert server.requests[0].query["limit"] == "500"
    assert server.requests[2].query["allowWatchBookmarks"] == "true"
    assert 300 <= int(server.requests[2].query["timeoutSeconds"]) <= 600
    assert watched.told == ["+a@1", "+b@2", "+c@7"]


@pytest.mark.parametrize(
    "gone",
    [
        pytest.param(status(410, "too old resource version"), id="by status"),
        pytest.param(stream(event("ERROR", status_object(410, "too old", "Expired"))), id="by event"),
    ],
)
def test_expired_version(watched: Watched, gone: Answer) -> None:
    """A version that is too old, told either way, leads to a new list that also tells what is gone.

    (Break: keep the version; or put the list into the store without the diff.)
    """
    server = watched.run(
        answers=[page(web(1, "a"), web(2, "b"), version="5"), page(web(2, "b"), web(8, "c"), version="9")],
        watches=[gone],
    )
    watched.until(lambda: len(versions(server)) == 4)
    assert versions(server) == ["list", "5", "list", "9"]
    assert sorted(watched.told) == ["+a@1", "+b@2", "+c@8", "-a@1"]


def test_expired_page(watched: Watched) -> None:
    """A continue token that expires begins the list again, and nothing half-read is kept. (Break: store each page.)"""
    server = watched.run(
        answers=[
            page(web(1, "a"), version="5", token="more"),
            status(410, "continue token too old"),
            page(web(6, "b"), version="9"),
        ],
        watches=[],
    )
    watched.until(lambda: versions(server)[-1:] == ["9"])
    assert watched.told == ["+b@6"]


def test_repeated_expiry_waits(watched: Watched) -> None:
    """Lists that expire again and again are spaced out up to 30 s. (Break: Expired goes on without a wait.)"""
    count = 9
    watched.run(
        answers=[page(version=str(number)) for number in range(1, count + 2)],
        watches=[status(410) for _ in range(count)],
    )
    watched.until(lambda: len(watched.clock.waits) == count)
    assert watched.clock.waits[0] <= 0.8
    assert watched.clock.waits[4] >= 0.8 * 2**4 / 2
    assert 15 <= watched.clock.waits[-1] <= 30


def test_expiry_after_an_outage(watched: Watched) -> None:
    """After an API server that was away for long, an expired version is news and no trouble: the list comes soon.

    Mutation: let the delay grow on after an expiry.
    """
    server = watched.run(
        answers=[page(version="5"), page(web(8), version="9")],
        watches=[*[status(503) for _ in range(5)], stream(event("ERROR", status_object(410)))],
    )
    watched.until(lambda: versions(server)[-1:] == ["9"])
    assert watched.clock.waits[4] >= 0.8 * 2**4 / 2
    assert watched.clock.waits[5] <= 0.8


def test_the_pace_that_the_server_asks_for(watched: Watched) -> None:
    """A server that refuses watches for now, and says for how long, is asked again then, however often; not in an hour.

    Mutation: take no notice of Retry-After.
    """
    count = 6
    server = watched.run(
        answers=[page(version="5")],
        watches=[*[status(429, Retry_After="1") for _ in range(count)], status(429, Retry_After="3600")],
    )
    watched.until(lambda: len(versions(server)) == count + 3)
    assert all(1 <= wait <= 1.8 for wait in watched.clock.waits[:count])
    assert 30 <= watched.clock.waits[count] <= 31


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(stream(event("ADDED", web(7, "c")), b'{"type":"ADDED","obj', then="cut"), id="half a line"),
        pytest.param(stream(event("ADDED", web(7, "c")), then="cut"), id="cut"),
        pytest.param(stream(event("ADDED", web(7, "c")), b'{"type":"ADDED","obj'), id="half a line, then the end"),
        pytest.param(stream(event("ADDED", web(7, "c")), event("ERROR", status_object(500, "etcd"))), id="error event"),
    ],
)
def test_a_broken_watch_goes_on_where_it_was(watched: Watched, broken: Answer) -> None:
    """After a cut the next watch begins at the last whole event. (Break: list anew after every failure.)"""
    server = watched.run(
        answers=[page(version="5")], watches=[broken, stream(event("MODIFIED", web(8, "c")), then="hold")]
    )
    watched.until(lambda: len(watched.told) == 2)
    assert watched.told == ["+c@7", "~c@8"]
    assert versions(server) == ["list", "5", "7"]
    assert len(watched.clock.waits) == 1


@pytest.mark.parametrize("refused", [hang_up, status(503, "later"), status(403, "no"), status(400, "bad selector")])
def test_refused_requests_are_repeated(watched: Watched, refused: Answer) -> None:
    """A list or watch that fails in any way is tried again later. (Break: PermanentError is not caught.)"""
    # A GET whose connection was closed is repeated at once, so the script has the failure twice.
    twice = [refused, refused] if refused is hang_up else [refused]
    server = watched.run(
        answers=[*twice, page(web(1), version="5")],
        watches=[*twice, stream(event("DELETED", web(6)), then="hold")],
    )
    watched.until(lambda: watched.told == ["+web@1", "-web@1"])
    assert len(watched.clock.waits) == 2
    assert versions(server)[-1:] == ["5"]


def test_what_is_no_event_leads_to_a_list(watched: Watched) -> None:
    """A line that is no JSON means that something unknown was missed: list again. (Break: skip the line.)"""
    server = watched.run(
        answers=[page(version="5"), page(web(8), version="9")],
        watches=[stream(event("ADDED", web(7)), b"garbage\n", event("MODIFIED", web(8)), then="hold")],
    )
    watched.until(lambda: versions(server)[-1:] == ["9"])
    assert versions(server) == ["list", "5", "list", "9"]


def test_poisoned_object(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """An object that cannot be decoded is named once, stays as it was known, and harms no other.

    (Break: let the decoder's error end the watch; or leave `keep` out of replace.)
    """
    caplog.set_level(logging.ERROR)
    server = watched.run(
        answers=[
            page(web(1, "good"), web(2, "bad", host=7), version="5"),
            page(web(10, "good"), web(8, "turned", host=7), web(9, "bad", host=7), version="11"),
        ],
        watches=[
            stream(
                event("ADDED", web(6, "turned")),
                event("MODIFIED", web(7, "bad", host=8)),
                event("MODIFIED", web(8, "turned", host=7)),
                event("MODIFIED", web(9, "bad", host=7)),
                event("MODIFIED", web(10, "good")),
                event("ERROR", status_object(410)),
            )
        ],
    )
    watched.until(lambda: versions(server)[-1:] == ["11"])
    assert watched.told == ["+good@1", "+turned@6", "~good@10"]
    assert watched.store.get("shop/turned") is not None
    assert [record.getMessage().split(" cannot")[0] for record in caplog.records] == [
        "Ingress shop/bad",
        "Ingress shop/turned",
    ]


def test_poisoned_object_can_be_deleted(watched: Watched) -> None:
    """The deletion of an object that cannot be decoded any more is told. (Break: decode the whole DELETED object.)"""
    watched.run(
        answers=[page(web(1, "turned"), version="5")],
        watches=[stream(event("DELETED", web(7, "turned", host=7)), then="hold")],
    )
    watched.until(lambda: watched.told == ["+turned@1", "-turned@1"])


def test_a_decoder_that_raises_anything(watched: Watched) -> None:
    """A kind's own decoder may fail in any way without ending the watch. (Break: catch ValidationError alone.)"""

    def parse(raw: Any) -> Ingress:
        if b'"bad"' in bytes(raw):
            raise ZeroDivisionError
        return INGRESS.decode(raw)

    kind = Kind(INGRESS.group, INGRESS.version, INGRESS.plural, INGRESS.kind, Ingress, parse=parse)
    watched.run(answers=[page(web(1, "bad"), web(2, "good"), version="5")], watches=[], kind=kind)
    watched.until(lambda: watched.told == ["+good@2"])


def test_the_echo_of_an_own_write_is_not_read_again(watched: Watched) -> None:
    """What the store knows already, or knows to be gone, is passed over; what is newer is read.

    Mutations: every event is read; every event of a known object is passed over.
    """
    read: list[int] = []

    def decode(raw: bytes | msgspec.Raw) -> Ingress:
        found = INGRESS.decode(raw)
        read.append(int(found.metadata.resource_version))
        return found

    watched.store.put(INGRESS.decode(msgspec.json.encode(web(7))))
    watched.store.put(INGRESS.decode(msgspec.json.encode(web(1, "gone"))))
    watched.store.remove("shop/gone", "uid-gone", 9)
    events = (
        event("MODIFIED", web(6)),
        event("MODIFIED", web(7)),
        event("MODIFIED", web(8, "gone")),
        event("MODIFIED", web(10, host="new.example.test")),
    )
    kind = Kind(INGRESS.group, INGRESS.version, INGRESS.plural, INGRESS.kind, Ingress, parse=decode)
    watched.run(answers=[page(version="5")], watches=[stream(*events)], kind=kind)
    watched.until(lambda: read == [10])
    assert watched.told == ["+web@7", "+gone@1", "-gone@1", "~web@10"]


def test_an_endless_line_is_skipped(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line beyond all sizes is dropped to its end, and the next is read. (Break: the buffer grows on.)"""
    monkeypatch.setattr(watch, "LONGEST_LINE", 1000)
    watched.run(
        answers=[page(version="5")],
        watches=[stream(b"x" * 800, b"x" * 800, b"x" * 800, b"x\n" + event("ADDED", web(7)), then="hold")],
    )
    watched.until(lambda: watched.told == ["+web@7"])


def test_events_cut_anywhere(watched: Watched) -> None:
    """Events arrive whole however the stream is cut into pieces. (Break: treat each chunk as a line.)"""
    lines = b"".join(event("ADDED", web(number, f"web-{number}")) for number in range(6, 16))
    pieces = [lines[start : start + 37] for start in range(0, len(lines), 37)]
    watched.run(answers=[page(version="5")], watches=[stream(*pieces, then="hold")])
    watched.until(lambda: len(watched.told) == 10)


def test_a_quick_end_is_not_hammered(watched: Watched) -> None:
    """Watches that end at once, in order, are spaced out. (Break: a wait only after an error.)"""
    watched.run(answers=[page(version="5")], watches=[stream() for _ in range(5)])
    watched.until(lambda: len(watched.clock.waits) == 5)
    assert sum(watched.clock.waits) > 5


def test_a_healthy_watch_is_renewed_at_once(watched: Watched) -> None:
    """After a watch that lived, the next begins without a wait, and delays start small again.

    (Break: never reset the delay.)
    """

    def live() -> None:
        watched.until(lambda: watched.told == ["+web@6"])
        watched.clock.advance(400)

    lived = stream(event("ADDED", web(6)), then=live)
    server = watched.run(
        answers=[page(version="5")], watches=[stream(), stream(), stream(), lived, stream(), stream(then="hold")]
    )
    watched.until(lambda: len(versions(server)) == 7)
    assert len(watched.clock.waits) == 4
    assert watched.clock.waits[2] >= 0.8 * 4 / 2
    assert watched.clock.waits[3] <= 0.8


def test_a_silent_watch_is_given_up(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A watch that brings nothing more, without an end, is followed by one that begins where it was; no alarm is given.

    (Break: wait for the next byte as long as the server was asked to keep the watch open.)
    """
    monkeypatch.setattr(api, "SILENCE_SECONDS", 0.2)
    server = watched.run(
        answers=[page(version="5")],
        watches=[stream(event("ADDED", web(6)), then="hold"), stream(event("ADDED", web(7, "shop")), then="hold")],
    )
    watched.until(lambda: watched.told == ["+web@6", "+shop@7"])
    assert versions(server)[:3] == ["list", "5", "6"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_stop_cuts_an_open_watch(watched: Watched) -> None:
    """`stop` ends a silent watch at once, not when the server does. (Break: stop only sets the flag.)"""
    server = watched.run(answers=[page(version="5")], watches=[stream(then="hold")])
    watched.until(lambda: len(server.requests) == 2)


def test_a_bug_is_told(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """A thread that dies says so to who must end the process. (Break: on_death is not called.)"""

    def broken(_old: Resource | None, _new: Resource | None) -> None:
        raise RuntimeError("a bug in a handler")

    watched.store = ObjectStore(on_change=broken)
    watched.run(answers=[page(web(1), version="5")], watches=[], namespace="shop")
    watched.until(lambda: watched.deaths == ["the watch of ingresses in shop died"])
    assert "a bug in a handler" in caplog.text
    watched.deaths.clear()


def test_metadata_only(watched: Watched) -> None:
    """A kind of which only metadata is kept is asked for as metadata, so that no content travels.

    (Break: _accept always says JSON.)
    """
    kind = Kind("", "v1", "secrets", "Secret", Resource)
    server = ScriptedApiServer(answers=[page(web(1), version="5")])
    store: ObjectStore[Resource] = ObjectStore()
    reflector = Reflector(server.api(), kind, store, watched.clock, on_death=watched.deaths.append)
    reflector.start()
    watched.until(lambda: len(server.requests) == 2)
    reflector.stop()
    assert reflector.join(SECONDS)
    server.close()
    accepted = [request.headers["Accept"].split(";")[1] for request in server.requests]
    assert accepted == ["as=PartialObjectMetadataList", "as=PartialObjectMetadata"]
    assert len(store) == 1
