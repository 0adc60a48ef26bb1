"""Events: counted, cut to size, dropped rather than waited for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from certbotk8s.domain.reasons import Reason
from certbotk8s.kube.events import EventRecorder
from certbotk8s.ports import Reference
from tests.fakes.apiserver import Request, ScriptedApiServer, hang_up, json, status
from tests.fakes.clock import FakeClock

SECONDS = 20.0
ABOUT = Reference("certbotk8s.io/v1", "Certificate", "shop", "web-tls", "u-1")


class Recording:
    """A recorder on a script; the answers are given by the test."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.server = ScriptedApiServer()
        self.recorder = EventRecorder(self.server.api(), self.clock)

    def record(self, message: str = "Issued", about: Reference = ABOUT, *, warning: bool = False) -> None:
        self.recorder.record(about, Reason.ISSUED, message, warning=warning)
        self.flush()

    def flush(self) -> None:
        assert self.recorder.flush(SECONDS)

    def sent(self) -> list[tuple[str, dict[str, Any]]]:
        return [(request.method, body(request)) for request in self.server.requests]


def body(request: Request) -> dict[str, Any]:
    return msgspec.json.decode(request.body, type=dict[str, Any])


@pytest.fixture
def recording() -> Iterator[Recording]:
    one = Recording()
    one.recorder.start()
    yield one
    one.recorder.stop()
    one.server.close()


def test_same_words_are_counted(recording: Recording) -> None:
    """The same words within ten minutes are one Event with a count; later a new one. (Break: always create.)"""
    recording.server.answers += [json({}) for _ in range(4)]
    recording.record()
    recording.clock.advance(60)
    recording.record()
    recording.record("Other words")
    recording.clock.advance(600)
    recording.record()
    methods = [method for method, _ in recording.sent()]
    assert methods == ["POST", "PATCH", "POST", "POST"]
    first, second = recording.sent()[0][1], recording.sent()[1][1]
    assert first["involvedObject"] == {
        "apiVersion": "certbotk8s.io/v1",
        "kind": "Certificate",
        "namespace": "shop",
        "name": "web-tls",
        "uid": "u-1",
    }
    assert first["type"] == "Normal"
    assert second == {"count": 2, "lastTimestamp": "2026-11-20T09:01:00Z"}


def test_an_event_that_is_gone_is_made_anew(recording: Recording) -> None:
    """Counting up an Event that expired makes a new one. (Break: NotFound ends the attempt.)"""
    recording.server.answers += [json({}), status(404, "gone", details={"name": "x"}), json({})]
    recording.record()
    recording.record()
    assert [method for method, _ in recording.sent()] == ["POST", "PATCH", "POST"]


def test_messages_and_names_fit(recording: Recording) -> None:
    """A message is cut to 1024 bytes between characters, a name to 253. (Break: cut at 1024 characters.)"""
    recording.server.answers += [json({})]
    recording.record("ü" * 2000, ABOUT._replace(name="a" * 253))
    written = recording.sent()[0][1]
    assert len(written["message"].encode()) <= 1024
    assert written["message"].endswith("ü…")
    assert len(written["metadata"]["name"]) <= 253


def test_a_failure_harms_nobody(recording: Recording, caplog: pytest.LogCaptureFixture) -> None:
    """An outage costs the Events of its time and one line in the log. (Break: the thread ends by the error.)"""
    recording.server.answers += [hang_up, hang_up, hang_up, json({})]
    for number in range(4):
        recording.record(f"words {number}")
    assert len(recording.sent()) == 4
    assert len(caplog.records) == 1


def test_a_full_queue_drops(recording: Recording) -> None:
    """Recording never waits: what does not fit is dropped. (Break: the queue has no bound.)"""
    idle = EventRecorder(recording.server.api(), recording.clock)
    for number in range(3000):
        idle.record(ABOUT, Reason.ISSUED, f"words {number}")
    assert len(idle._queue) == 1000
    idle.stop()
    idle.record(ABOUT, Reason.ISSUED, "after the end")
    assert len(idle._queue) == 0
