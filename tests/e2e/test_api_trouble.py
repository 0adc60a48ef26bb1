"""An API server that is away, slow, throttled, or shows old news: work resumes, and nothing is issued twice.

What API server and etcd can be brought to by themselves is in test_control_plane.py. Here the controller's way to the
API server leads through a proxy (tests/lab/kube_proxy.py); what the test itself asks goes directly.
Certificates are counted at the CA, the controller's requests at the proxy.
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.faults import in_trouble, keep_running
from tests.lab.kube_proxy import is_watch, refused, to
from tests.lab.proxy import Fault
from tests.site import CERTIFICATES, Site, assert_plain, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.controller import Controller
    from tests.lab.kube_proxy import KubeProxy
    from tests.lab.lab import Lab
    from tests.lab.proxy import Request


@pytest.fixture(scope="module")
def controller(proxied: tuple[Controller, KubeProxy]) -> Controller:
    """The controller, in place of the one that others share."""
    return proxied[0]


@pytest.fixture(autouse=True)
def _plain(site: Site, controller: Controller) -> Iterator[None]:
    """Whatever a test provokes is told in plain words, and nothing broke inside."""
    already = controller.log.stat().st_size
    yield
    assert_plain(site.said())
    said = controller.log.read_bytes()[already:].decode()
    assert "Traceback" not in said
    assert "a bug in the controller" not in said.lower()


def write(request: Request) -> bool:
    """Every change, but for the lease."""
    return request.method != "GET" and "/leases" not in request.path


def all_ready(site: Site, count: int, timeout: float) -> list[dict[str, Any]]:
    """The statuses of the namespace's Certificates once that many are Ready and nothing is under way."""

    def look() -> list[dict[str, Any]] | None:
        found: Any = site.lab.api(f"{CERTIFICATES}/namespaces/{site.namespace}/certificates")["items"]
        done = [
            each["status"]
            for each in found
            if each.get("status", {}).get("revision") and "issuance" not in each["status"]
        ]
        return done if len(done) == count else None

    return wait_for(look, f"{count} Certificates issued", timeout=timeout, pause=0.5)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.soak)])
def test_many_while_the_watches_lag(lab: Lab, site: Site, way: KubeProxy, issuer: str, suffix: str, count: int) -> None:
    """With watches that tell everything two seconds late, each Certificate costs one order and one certificate.

    Mutation: let the caches not show own writes in `KubeCluster._absorb`.
    """
    since, mark, asked = lab.acme.mark(), lab.mark(), len(way.exchanges)
    way.lag = 2.0
    start = time.monotonic()
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [
                pool.submit(site.certificate, f"web{number}", [f"web{number}.{suffix}"], issuer)
                for number in range(count)
            ]:
                done.result()
        statuses = all_ready(site, count, timeout=30 + count * 0.6)
        seconds = time.monotonic() - start
        time.sleep(3)  # what the watches still have to tell
    finally:
        way.lag = 0.0
    site.nothing_left()
    issued, orders, requests = lab.acme.issued(since), lab.orders(mark), len(way.requests(asked))
    print(f"\n{count} Certificates: {issued} certificates, {orders} orders, {requests} requests, {seconds:.1f} s")
    assert [status["revision"] for status in statuses] == [1] * count
    assert not any(status.get("failedAttempts") for status in statuses)
    assert (issued, orders) == (count, count)


def test_away(lab: Lab, site: Site, way: KubeProxy, controller: Controller, issuer: str, suffix: str) -> None:
    """An API server to which the way is cut for a second in the midst of orders delays them.

    Mutation: let a reflector end when the API server cannot be reached.
    """
    with in_trouble(lab, site, way, controller, issuer, suffix):
        time.sleep(0.2)
        way.cut()
        keep_running(controller, 1.0)
        way.mend()


def test_a_version_that_has_expired(lab: Lab, site: Site, way: KubeProxy, issuer: str, suffix: str) -> None:
    """Watches that are told by status that their version is gone list again and miss nothing. API servers of today tell
    it by an event (test_control_plane.py); a client has to know both.

    Mutation: go on watching from the old version after a 410.
    """
    site.certificate("web", [f"web.{suffix}"], issuer)
    site.ready("web")
    site.nothing_left()
    mark, asked, start = lab.mark(), len(way.exchanges), time.monotonic()
    refused_once: set[str] = set()

    def first(request: Request) -> bool:
        fits = is_watch(request) and request.path not in refused_once
        refused_once.update({request.path} if fits else ())
        return fits

    with way.inject(first, refused(410, "Expired", "too old resource version")):
        way.cut_streams()
        site.delete(site.secret_path("web"))  # while nobody watches
        wait_for(lambda: len(refused_once) >= 7, "every watch is refused")
    site.condition("web", "Ready", "False", "BackingOff")
    assert lab.orders(mark) == 0
    wait_for(
        lambda: refused_once <= {each.path for each in way.exchanges[asked:] if "limit=" in each.target},
        "all are listed again",
    )
    site.certificate("next", [f"next.{suffix}"], issuer)
    site.ready("next")
    seconds = time.monotonic() - start
    requests = [each for each in way.exchanges[asked:] if is_watch(each) or "limit=" in each.target]
    print(f"\n{len(requests)} lists and watches in {seconds:.1f} s")
    assert len(requests) <= 5 * len(refused_once) + 5 * seconds


def test_watches_that_are_cut(
    lab: Lab, site: Site, way: KubeProxy, controller: Controller, issuer: str, suffix: str
) -> None:
    """Watches that are cut again and again in the midst of orders go on where they were.

    Mutation: let a reflector end when its watch is cut.
    """
    with in_trouble(lab, site, way, controller, issuer, suffix, count=10):
        for _ in range(10):
            way.cut_streams()
            time.sleep(0.3)


def test_somebody_annotates_all_the_time(lab: Lab, site: Site, way: KubeProxy, issuer: str, suffix: str) -> None:
    """A second writer of the Certificate's metadata, who comes before every write of its status, costs repeated writes
    and no order.

    Mutation: do not repeat a refused write on top of a mere change of metadata.
    """
    since, mark, asked, turns = lab.acme.mark(), lab.mark(), len(way.exchanges), itertools.count()
    path = site.certificate_path("web")

    def annotate(_: Request) -> Fault:
        turn = next(turns)
        if turn % 2 == 0:  # and not before its repetition
            found = lab.api(path)
            found["metadata"]["annotations"] = {"example.test/n": str(turn)}  # type: ignore[index]
            lab.api(path, method="PUT", body=found)
        return Fault()

    with way.inject(to("PUT", f"{path}/status"), annotate):
        site.certificate("web", [f"web.{suffix}"], issuer)
        site.ready("web")
        site.nothing_left()
    answers = [each.status for each in way.exchanges[asked:] if each.method == "PUT" and each.path == f"{path}/status"]
    print(f"\n{answers} to writes of status, {lab.orders(mark)} orders, {len(way.requests(asked))} requests")
    assert answers[:6] == [409, 200] * 3
    assert (lab.acme.issued(since), lab.orders(mark)) == (1, 1)


def test_somebody_writes_the_status_all_the_time(
    lab: Lab, site: Site, way: KubeProxy, issuer: str, suffix: str
) -> None:
    """While somebody else rewrites the status before every write of it, no order can be remembered: few are placed, and
    none is finalized; afterwards one is.

    Mutations: go on after a refused write of status as if it had been made; place the next order at once.
    """
    since, mark, asked, turns = lab.acme.mark(), lab.mark(), len(way.exchanges), itertools.count()
    path = site.certificate_path("web")

    def rewrite(_: Request) -> Fault:
        found = lab.api(path)
        found["status"] = found.get("status", {}) | {"failedAttempts": next(turns) % 2}  # type: ignore[operator]
        lab.api(f"{path}/status", method="PUT", body=found)
        return Fault()

    with way.inject(to("PUT", f"{path}/status"), rewrite) as fight:
        site.certificate("web", [f"web.{suffix}"], issuer)
        time.sleep(5)
        orders = lab.orders(mark)
        assert lab.acme.issued(since) == 0
    site.ready("web")
    site.nothing_left()
    print(f"\n{fight.hits} writes of another, {orders} orders, {len(way.requests(asked))} requests")
    assert 0 < orders <= 6
    assert lab.acme.issued(since) == 1


def test_nothing_can_be_written(
    lab: Lab, site: Site, way: KubeProxy, controller: Controller, issuer: str, suffix: str
) -> None:
    """An API server that refuses every write for a while, and says when to come back, is not stormed, and orders go on
    where they were.

    Mutation: read Retry-After as no time at all.
    """
    with in_trouble(lab, site, way, controller, issuer, suffix):
        time.sleep(0.2)
        with way.inject(
            write, refused(429, "TooManyRequests", "too many requests, please try again later", Retry_After="1")
        ) as injected:
            time.sleep(1.5)
            tries = injected.hits
        print(f"\n{tries} writes refused in 1.5 s")
        assert 0 < tries <= 30


@pytest.mark.soak
def test_a_watch_that_falls_silent(lab: Lab, site: Site, way: KubeProxy, issuer: str, suffix: str) -> None:
    """Watches that stay open and bring nothing more are noticed by the missing bookmark, and begin anew.

    Mutation: wait for the next byte as long as the server was asked to keep the watch open.
    """
    asked = len(way.exchanges)
    way.silence_streams()
    site.certificate("web", [f"web.{suffix}"], issuer)
    site.ready("web", timeout=200)
    assert len([each for each in way.requests(asked) if "limit=" in each.target]) == 0
