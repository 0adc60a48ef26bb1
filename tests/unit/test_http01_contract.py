"""The contract of solvers, on an API server in memory: for `http01-ingress`, and for the fake of other tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from certbotk8s.domain.api import INGRESS, INGRESS_CLASS, SolverSpec
from tests.contract.test_solver_contract import IngressSolverContract, SolverContract
from tests.fakes.cluster import ApiServer, FakeCluster
from tests.fakes.solver import FakeSolver

if TYPE_CHECKING:
    from certbotk8s.ports import Cluster, Solver


@pytest.fixture
def home() -> str:
    return "certbotk8s"


@pytest.fixture
def cluster() -> FakeCluster:
    cluster = FakeCluster(ApiServer())
    cluster.watch(INGRESS)
    cluster.watch(INGRESS_CLASS)
    return cluster


class TestIngressSolverInMemory(IngressSolverContract):
    """`http01-ingress`."""


class TestFakeSolver(SolverContract):
    """The solver of tests that are about something else."""

    spec = SolverSpec()

    def solver(self, cluster: Cluster, namespace: str) -> Solver:
        return FakeSolver(cluster, namespace)
