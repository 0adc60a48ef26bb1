"""What every solver keeps to, whatever it presents and wherever: the contract of `ports.Solver`.

A suite is a subclass of SolverContract with a `cluster` to work in and a way to make the solver. Here they work
against the lab's API server; tests/unit has the same suites on an API server in memory.
"""

from __future__ import annotations

from datetime import UTC, datetime
from threading import Event
from typing import TYPE_CHECKING, Any, cast

import pytest

from certbotk8s.clock import SystemClock
from certbotk8s.domain.api import (
    INGRESS,
    INGRESS_CLASS,
    Certificate,
    CertificateSpec,
    Http01Spec,
    IngressSolverSpec,
    IssuerRef,
    ObjectMeta,
    PendingChallenge,
    SolverSpec,
)
from certbotk8s.domain.errors import TemporaryError
from certbotk8s.kube.api import connect
from certbotk8s.kube.cluster import KubeCluster
from certbotk8s.ports import Presentation, SolverContext
from solvers.http01_ingress import IngressSolver

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from certbotk8s.domain.api import Kind, Resource
    from certbotk8s.ports import Cluster, Solver
    from tests.lab.lab import Lab


def presentation(ident: str, *names: str, kind: str = "http-01", spec: SolverSpec | None = None) -> Presentation:
    """Challenges of an order for these names, of Certificate shop/web-tls."""
    challenges = tuple(
        PendingChallenge(
            identifier=name,
            type=kind,
            url=f"https://ca.example.test/challenge/{ident}/{number}",
            token=f"{ident}-{number}".ljust(43, "t"),
            key_authorization=f"{ident}-{number}".ljust(43, "t") + ".thumbprint",
            solver="under-test",
        )
        for number, name in enumerate(names)
    )
    certificate = Certificate(
        metadata=ObjectMeta(name="web-tls", namespace="shop", uid="uid-1", creation_timestamp=datetime.now(UTC)),
        spec=CertificateSpec(secret_name="web-tls", issuer_ref=IssuerRef(name="ca"), dns_names=names),
    )
    return Presentation(ident, certificate, spec or SolverSpec(), challenges)


class AnswerLost:
    """`ports.Cluster` of which the first create is done, but its answer does not arrive."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def create(self, kind: Kind[Any], manifest: Mapping[str, Any]) -> Resource:
        self._cluster.create(kind, manifest)
        raise TemporaryError("the API server cannot be reached: the connection was cut")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cluster, name)


class SolverContract:
    """The suite. A solver is made anew for each use, as after a restart: it remembers nothing."""

    spec: SolverSpec

    def solver(self, cluster: Cluster, namespace: str) -> Solver:
        raise NotImplementedError

    def show(self, ident: str, *names: str) -> Presentation:
        return presentation(ident, *names, spec=self.spec)

    def test_presenting_twice_is_presenting_once(self, cluster: Cluster, home: str) -> None:
        """A second present changes nothing and fails in nothing; fails when AlreadyExists is not caught."""
        shown = self.show("twice", "a.example.test", "b.example.test")
        self.solver(cluster, home).present(shown)
        self.solver(cluster, home).present(shown)
        assert list(self.solver(cluster, home).leftovers()) == ["twice"]

    def test_present_completes_one_that_was_cut_off(self, cluster: Cluster, home: str) -> None:
        """After a create without an answer, present succeeds and nothing is there twice; fails with generateName."""
        shown = self.show("cut-off", "a.example.test")
        with pytest.raises(TemporaryError, match="cut"):
            self.solver(cast("Cluster", AnswerLost(cluster)), home).present(shown)
        self.solver(cluster, home).present(shown)
        assert list(self.solver(cluster, home).leftovers()) == ["cut-off"]

    def test_clean_up_needs_the_id_alone(self, cluster: Cluster, home: str) -> None:
        """Another instance removes it all, twice without an error; fails when what was presented is kept in memory."""
        self.solver(cluster, home).present(self.show("gone", "a.example.test"))
        self.solver(cluster, home).clean_up("gone")
        self.solver(cluster, home).clean_up("gone")
        assert list(self.solver(cluster, home).leftovers()) == []

    def test_clean_up_without_present_is_no_error(self, cluster: Cluster, home: str) -> None:
        """It is idempotent from the start; fails when a missing object is an error."""
        self.solver(cluster, home).clean_up("never-was")
        assert list(self.solver(cluster, home).leftovers()) == []

    def test_presentations_do_not_touch_each_other(self, cluster: Cluster, home: str) -> None:
        """Two orders for the same name stand side by side; fails when the name is made from anything but the id."""
        solver = self.solver(cluster, home)
        solver.present(self.show("one", "a.example.test"))
        solver.present(self.show("other", "a.example.test"))
        assert sorted(solver.leftovers()) == ["one", "other"]
        solver.clean_up("one")
        assert list(solver.leftovers()) == ["other"]

    def test_presents_again_after_clean_up(self, cluster: Cluster, home: str) -> None:
        """What was cleaned up can be presented again; fails when an id is used up."""
        solver = self.solver(cluster, home)
        solver.present(self.show("again", "a.example.test"))
        solver.clean_up("again")
        solver.present(self.show("again", "a.example.test"))
        assert list(solver.leftovers()) == ["again"]


class IngressSolverContract(SolverContract):
    """The suite for `http01-ingress`."""

    spec = SolverSpec(http01=Http01Spec(ingress=IngressSolverSpec(ingress_class_name="traefik")))

    def solver(self, cluster: Cluster, namespace: str) -> Solver:
        return IngressSolver(SolverContext(cluster, SystemClock(), namespace, 80, ("127.0.0.1:1",)))


class TestIngressSolverOnTheApiServer(IngressSolverContract):
    """`http01-ingress` on the lab's API server, with the rights that the controller has."""

    @pytest.fixture
    def home(self, namespace: str) -> str:
        return namespace

    @pytest.fixture
    def cluster(self, lab: Lab, namespace: str) -> Iterator[Cluster]:
        deaths: list[str] = []
        cluster = KubeCluster(connect(kubeconfig=lab.controller_kubeconfig), SystemClock(), on_death=deaths.append)
        cluster.watch(INGRESS, namespaces=(namespace,))
        cluster.watch(INGRESS_CLASS)
        cluster.start()
        assert cluster.wait_synced(Event())
        yield cluster
        cluster.stop()
        assert deaths == []
