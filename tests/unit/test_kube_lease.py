"""The election in trouble: what a real API server does only on bad days."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from certbotk8s.clock import SystemClock
from certbotk8s.domain.errors import TemporaryError
from certbotk8s.kube.lease import Election
from tests.fakes.apiserver import Answer, ScriptedApiServer, hang_up, json, status
from tests.fakes.clock import FakeClock, HurryingClock, soon

if TYPE_CHECKING:
    from certbotk8s.ports import Clock

SECONDS = 10.0
NOT_FOUND = status(404, "not found", reason="NotFound", details={"name": "certbotk8s"})


def lease(holder: str, version: int = 1, duration: int = 15) -> Answer:
    spec: dict[str, Any] = {"holderIdentity": holder, "leaseDurationSeconds": duration, "leaseTransitions": 3}
    metadata = {"name": "certbotk8s", "namespace": "home", "uid": "u", "resourceVersion": str(version)}
    return json({"metadata": metadata, "spec": spec})


def election(server: ScriptedApiServer, clock: Clock, lost: Callable[[str], None], duration: float = 15.0) -> Election:
    return Election(server.api(), clock, namespace="home", identity="a", address="", duration=duration, on_lost=lost)


@pytest.mark.parametrize("trouble", ["hangs", "hangs up", "answers 500"])
def test_a_leader_that_cannot_renew_ends_in_time(trouble: str) -> None:
    """With an API server that hangs, hangs up or fails, a leader stops acting at its deadline and says why, once.

    Mutation: send the renewal without a time limit; catch no error of the connection.
    """
    lost: list[str] = []
    hanging = threading.Event()

    def hang(_handler: object) -> None:
        hanging.wait(SECONDS)

    answers: dict[str, Answer] = {
        "hangs": hang,
        "hangs up": hang_up,
        "answers 500": status(500, "no leader"),
    }
    with ScriptedApiServer(answers=[NOT_FOUND, lease("a"), *[answers[trouble]] * 50]) as server:
        one = election(server, SystemClock(), lost.append, duration=1.0)
        one.start()
        assert soon(one.is_leading)
        one.fence()
        assert soon(lambda: lost)
        assert not one.is_leading()
        with pytest.raises(TemporaryError, match="does not lead"):
            one.fence()
        one.stop(release=False)
        hanging.set()
    assert len(lost) == 1
    assert lost[0].startswith("This replica, a, leads no more: the API server at ")


def test_the_deadline_counts_from_the_start_of_the_request() -> None:
    """An answer that took long gives the less time to act: another replica reckons from when it was written.

    Mutation: count from the answer.
    """
    clock = FakeClock()

    def slow(handler: Any) -> None:
        clock.advance(8)
        lease("a")(handler)

    with ScriptedApiServer(answers=[NOT_FOUND, slow]) as server:
        one = election(server, clock, lambda _: None)
        one.start()
        assert soon(one.is_leading)
        clock.advance(1.9)
        assert one.is_leading()
        clock.advance(0.2)
        assert not one.is_leading()
        one.stop(release=False)


def test_of_two_that_reach_for_a_lease_one_has_it() -> None:
    """Refused because the other was faster, a replica reads what stands there, and stands by.

    Mutation: take a Conflict for success.
    """
    clock = FakeClock()
    conflict = status(409, "the object has been modified", reason="Conflict")
    with ScriptedApiServer(answers=[lease("", 1), conflict, *[lease("b", 2)] * 20]) as server:
        one = election(server, clock, lambda _: None)
        one.start()
        for _ in range(20):
            clock.advance(0.5)
            time.sleep(0.02)
        assert not one.is_leading()
        one.stop(release=False)
        assert [request.method for request in server.requests[:3]] == ["GET", "PATCH", "GET"]


def test_trouble_causes_no_storm_of_requests() -> None:
    """A standby to whom the API server does not talk asks a few times in the time of a Lease.

    Mutation: wait no time after an error.
    """
    clock = HurryingClock()
    with ScriptedApiServer(answers=[status(500, "no leader")] * 1000) as server:
        one = election(server, clock, lambda _: None)
        one.start()
        assert soon(lambda: clock.monotonic() >= 60 or len(server.requests) > 90)
        asked, seconds = len(server.requests), clock.monotonic()
        one.stop(release=False)
    assert seconds >= 60
    assert asked >= 5
