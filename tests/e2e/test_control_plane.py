"""The control plane itself in trouble: etcd is full, forgets old revisions, or the API server stands still.

In a lab of this module's own, since every other user of it would be in the same trouble. Certificates are counted at
the CA, refused writes in the API server's audit log. What the control plane does not do by itself is in
test_api_trouble.py.
"""

from __future__ import annotations

import secrets
import signal
import time
import urllib.error
from typing import TYPE_CHECKING

import pytest

from tests.e2e.faults import PER_SECOND, in_trouble, keep_running, kept_running, proxied_controller
from tests.lab.etcd import Etcd
from tests.lab.kube_proxy import is_watch
from tests.lab.lab import running_lab
from tests.site import Site, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.controller import Controller
    from tests.lab.kube_proxy import KubeProxy
    from tests.lab.lab import Lab, Mark, RunningLab

MIB = 1 << 20
QUOTA = 32 * MIB
PIECE = 900_000  # bytes of one ConfigMap, which may have 1 MiB


@pytest.fixture(scope="module")
def own() -> Iterator[RunningLab]:
    """A lab of this module's own, with a small etcd."""
    with running_lab(etcd_arguments=[f"--quota-backend-bytes={QUOTA}"]) as running:
        yield running


@pytest.fixture(scope="module")
def proxied(own: RunningLab) -> Iterator[tuple[Controller, KubeProxy]]:
    """Its controller, and that one's way to the API server."""
    with proxied_controller(own.lab) as both:
        yield both


@pytest.fixture(scope="module")
def controller(proxied: tuple[Controller, KubeProxy]) -> Controller:
    """Its controller."""
    return proxied[0]


@pytest.fixture(scope="module")
def issuer(own: RunningLab, controller: Controller) -> str:
    """A ClusterIssuer there."""
    return Site(own.lab, own.lab.namespace).cluster_issuer("ca")


@pytest.fixture
def site(own: RunningLab) -> Site:
    """The test's own namespace there."""
    name = f"test-{secrets.token_hex(4)}"
    own.lab.api("/api/v1/namespaces", body={"metadata": {"name": name}})
    return Site(own.lab, name)


pytestmark = pytest.mark.usefixtures("plain")


class Ballast:
    """What fills etcd: large ConfigMaps, through the API server."""

    def __init__(self, site: Site, etcd: Etcd) -> None:
        self._lab = site.lab
        self._path = f"/api/v1/namespaces/{site.namespace}/configmaps"
        self._etcd = etcd

    def load(self) -> None:
        """Fill it until a few more pieces raise the alarm."""
        while self._etcd.left() > 4 * PIECE:
            self._add()
            time.sleep(0.12)  # its file grows by batches, ten a second

    def overload(self) -> None:
        """Fill it until it refuses."""
        try:
            for _ in range(20):
                self._add()
        except urllib.error.HTTPError as error:
            assert "database space exceeded" in str(error)  # noqa: PT017 - one of the requests, it matters not which
        assert self._etcd.is_full()

    def unload(self) -> None:
        """Delete all of it, which etcd allows when it is full, and take the alarm back."""
        self._lab.api(self._path, method="DELETE")
        self._etcd.make_room()

    def _add(self) -> None:
        self._lab.api(self._path, body={"metadata": {"generateName": "ballast-"}, "data": {"x": "x" * PIECE}})


def refused_writes(lab: Lab, mark: Mark) -> int:
    """How many of the controller's writes the API server could not make since then, the Lease apart."""
    return sum(
        each.verb not in {"get", "list", "watch"}
        and each.response_status.code >= 500
        and each.object_ref.resource != "leases"
        for each in lab.kube_requests(mark)
    )


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [2.0, pytest.param(60.0, marks=pytest.mark.soak)])
def test_etcd_out_of_space(
    own: RunningLab, site: Site, way: KubeProxy, controller: Controller, issuer: str, suffix: str, seconds: float
) -> None:
    """An etcd that is full refuses every write, and is not stormed; when it has room again, orders go on where they
    were.

    Mutation: try again at once after a refused write.
    """
    lab, etcd, count = own.lab, Etcd(own.lab.etcd), 20
    ballast = Ballast(site, etcd)
    ballast.load()
    with in_trouble(lab, site, way, controller, issuer, suffix, count=count):
        controller.signal(signal.SIGSTOP)  # so that the orders last until etcd is full
        ballast.overload()
        mark, start = lab.mark(), time.monotonic()
        controller.signal(signal.SIGCONT)
        keep_running(controller, seconds)
        tries, lasted = refused_writes(lab, mark), time.monotonic() - start
        ballast.unload()
        print(f"\n{tries} writes refused in {lasted:.1f} s")
        # Each key after 0, 2 and 12 s; and from the start again when the controller has lost its Lease meanwhile.
        assert 0 < tries <= (6 if seconds > 10 else 3) * count
    assert not etcd.is_full()


def test_versions_that_etcd_has_compacted(
    own: RunningLab, site: Site, way: KubeProxy, controller: Controller, issuer: str, suffix: str
) -> None:
    """Watches whose version is nowhere any more, since etcd forgot it and a new API server never knew it, list again
    and miss nothing.

    Mutation: go on watching from the old version after a 410.
    """
    lab = own.lab
    site.certificate("web", [f"web.{suffix}"], issuer)
    site.ready("web")
    site.nothing_left()
    mark, asked, start = lab.mark(), len(way.exchanges), time.monotonic()
    way.cut()
    site.delete(site.secret_path("web"))  # while nobody watches
    Etcd(lab.etcd).compact()
    own.restart_api_server()
    watched = {each.path for each in way.exchanges[:asked] if is_watch(each)}
    way.mend()
    wait_for(lambda: kept_running(controller), "the controller is ready")
    site.condition("web", "Ready", "False", "BackingOff")
    assert lab.orders(mark) == 0
    listed = wait_for(
        lambda: watched <= {each.path for each in way.exchanges[asked:] if "limit=" in each.target}, "all listed again"
    )
    assert listed
    site.certificate("next", [f"next.{suffix}"], issuer)
    site.ready("next")
    site.nothing_left()
    requests = way.requests(asked)
    print(f"\n{len(requests)} requests to the API server in {time.monotonic() - start:.1f} s")
    assert len(requests) <= 60 + PER_SECOND * (time.monotonic() - start)
    assert lab.orders(mark) == 1


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [12.0, pytest.param(60.0, marks=pytest.mark.soak)])
def test_an_api_server_that_stands_still(
    own: RunningLab, site: Site, way: KubeProxy, controller: Controller, issuer: str, suffix: str, seconds: float
) -> None:
    """An API server that is stopped in the midst of orders, for longer than the Lease, and then goes on: also with what
    it was asked before.

    Mutation: start anew instead of fetching the order in `_resume`.
    """
    server = own.children["kube-apiserver"]
    with in_trouble(own.lab, site, way, controller, issuer, suffix, count=20):
        server.signal(signal.SIGSTOP)
        try:
            keep_running(controller, seconds)
        finally:
            server.signal(signal.SIGCONT)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [0.0, pytest.param(120.0, marks=pytest.mark.soak)])
def test_an_api_server_that_dies(
    own: RunningLab, site: Site, way: KubeProxy, controller: Controller, issuer: str, suffix: str, seconds: float
) -> None:
    """An API server that is killed in the midst of orders, and started again at once or after two minutes.

    Mutation: let a reflector end when the API server cannot be reached.
    """
    with in_trouble(own.lab, site, way, controller, issuer, suffix, count=20):
        own.children["kube-apiserver"].kill()
        keep_running(controller, seconds)
        own.restart_api_server()
