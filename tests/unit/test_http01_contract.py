"""The contract of solvers for `http01-ingress`, on an API server in memory."""

from __future__ import annotations

import pytest

from certbotk8s.domain.api import INGRESS, INGRESS_CLASS
from tests.contract.test_solver_contract import IngressSolverContract
from tests.fakes.cluster import ApiServer, FakeCluster


class TestIngressSolverInMemory(IngressSolverContract):
    """`http01-ingress` on the fake."""

    @pytest.fixture
    def home(self) -> str:
        return "certbotk8s"

    @pytest.fixture
    def cluster(self) -> FakeCluster:
        cluster = FakeCluster(ApiServer())
        cluster.watch(INGRESS)
        cluster.watch(INGRESS_CLASS)
        return cluster
