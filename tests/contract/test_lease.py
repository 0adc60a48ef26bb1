"""The election against a real API server, on a clock that moves when the test says so."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from certbotk8s.kube.api import connect
from certbotk8s.kube.lease import NAME, Election
from tests.fakes.clock import FakeClock, soon

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.lab import Lab

DURATION = 15.0


class Replicas:
    """Replicas in one namespace, on one clock."""

    def __init__(self, lab: Lab, namespace: str) -> None:
        self.clock = FakeClock()
        self.lost: list[str] = []
        self._lab = lab
        self._namespace = namespace
        self._started: list[Election] = []

    def start(self, identity: str) -> Election:
        """One more replica, which stands for election."""
        election = Election(
            connect(kubeconfig=self._lab.controller_kubeconfig),
            self.clock,
            namespace=self._namespace,
            identity=identity,
            address=f"{identity}.example.test:8089",
            duration=DURATION,
            on_lost=self.lost.append,
        )
        election.start()
        self._started.append(election)
        return election

    def pass_time(self, seconds: float) -> None:
        """Let time pass, in steps in which every replica has its turns."""
        for _ in range(round(seconds * 2)):
            self.clock.advance(0.5)
            time.sleep(0.03)

    def close(self) -> None:
        for election in self._started:
            election.stop(release=False)

    @property
    def path(self) -> str:
        return f"/apis/coordination.k8s.io/v1/namespaces/{self._namespace}/leases/{NAME}"

    def spec(self) -> dict[str, Any]:
        """The Lease, as it is stored."""
        found: Any = self._lab.api(self.path)["spec"]
        return dict(found)

    def change(self, patch: dict[str, Any]) -> None:
        """Somebody else changes the Lease."""
        self._lab.kubectl("-n", self._namespace, "patch", "lease", NAME, "--type=merge", "-p", json.dumps(patch))

    def delete(self) -> None:
        """Somebody deletes the Lease."""
        self._lab.api(self.path, method="DELETE")


@pytest.fixture
def replicas(lab: Lab, namespace: str) -> Iterator[Replicas]:
    one = Replicas(lab, namespace)
    yield one
    one.close()


def test_one_leads_and_the_others_know_where_it_is(replicas: Replicas) -> None:
    """Of three replicas the first leads, for as long as it renews; the others stand by and know its responder.

    Mutation: take a Lease over without waiting for its end.
    """
    first = replicas.start("a")
    assert soon(first.is_leading)
    others = [replicas.start("b"), replicas.start("c")]
    assert all(soon(other.leader_address) for other in others)
    for _ in range(12):
        replicas.pass_time(5)
        assert first.is_leading()
        assert not any(other.is_leading() for other in others)
        assert first.leader_address() == ""
        assert {other.leader_address() for other in others} == {"a.example.test:8089"}
    assert replicas.spec()["leaseTransitions"] == 0
    assert replicas.spec()["leaseDurationSeconds"] == 15
    assert replicas.lost == []


def test_a_silent_leader_is_replaced_when_its_lease_has_ended(replicas: Replicas) -> None:
    """A leader that is gone without a word is replaced after the duration of its Lease, reckoned from when the other
    saw it last renewed, and not before; its own belief has ended by then.

    Mutation: reckon the end from the time that the Lease names, by a clock that runs ahead.
    """
    first = replicas.start("a")
    assert soon(first.is_leading)
    second = replicas.start("b")
    assert soon(second.leader_address)
    first.stop(release=False)
    replicas.pass_time(DURATION - 1)
    assert not second.is_leading()
    replicas.pass_time(4)
    assert soon(second.is_leading)
    assert replicas.spec()["holderIdentity"] == "b"
    assert replicas.spec()["leaseTransitions"] == 1


def test_a_released_lease_is_taken_at_the_next_look(replicas: Replicas) -> None:
    """A leader that ends in order gives the Lease up; nobody waits for its end.

    Mutation: stop without releasing.
    """
    first = replicas.start("a")
    assert soon(first.is_leading)
    second = replicas.start("b")
    assert soon(second.leader_address)
    first.stop(release=True)
    assert replicas.spec()["holderIdentity"] != "a"
    assert not first.is_leading()
    replicas.pass_time(7)
    assert soon(second.is_leading)


def test_a_replica_that_starts_again_has_its_lease_back(replicas: Replicas) -> None:
    """Under the same name nothing is waited for: a container that crashed leads as soon as it runs again.

    Mutation: wait for the end of a Lease whoever holds it.
    """
    first = replicas.start("a")
    assert soon(first.is_leading)
    first.stop(release=False)
    assert soon(replicas.start("a").is_leading)
    assert replicas.spec()["leaseTransitions"] == 0


def test_who_is_displaced_ends(replicas: Replicas) -> None:
    """When somebody else stands in the Lease, the leader stops at its next turn and says so, once.

    Mutation: write over a Lease that changed.
    """
    first = replicas.start("a")
    assert soon(first.is_leading)
    replicas.change({"spec": {"holderIdentity": "z"}})
    replicas.pass_time(6)
    assert soon(lambda: replicas.lost)
    assert not first.is_leading()
    replicas.pass_time(5)
    assert len(replicas.lost) == 1
    assert "z has taken the Lease" in replicas.lost[0]


def test_a_lease_that_somebody_deletes_is_made_again(replicas: Replicas) -> None:
    """The leader makes it again and goes on leading.

    Mutation: create no Lease after the first turn.
    """
    first = replicas.start("a")
    assert soon(first.is_leading)
    replicas.delete()
    replicas.pass_time(8)
    assert first.is_leading()
    assert replicas.spec()["holderIdentity"] == "a"
    assert replicas.lost == []
