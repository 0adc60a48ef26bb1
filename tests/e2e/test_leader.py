"""Two replicas: one works, the other stands by; whatever happens to the one, the other goes on where it was."""

import base64
import random
import secrets
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.lab.controller import Controller, install_crds
from tests.lab.kube_proxy import KubeProxy, kube_proxy, to
from tests.lab.lab import Lab
from tests.lab.proxy import late
from tests.site import CERTIFICATES, Site, wait_for

LEASE = 3  # seconds
FAULTS = ("killed", "stopped", "cut off")


class Replicas:
    """Two replicas, each with a way of its own to the API server."""

    def __init__(self, lab: Lab, stack: ExitStack, *arguments: str) -> None:
        self._lab = lab
        self.ways: dict[str, KubeProxy] = {}
        self.replicas: dict[str, Controller] = {}
        for _ in range(2):
            way = stack.enter_context(kube_proxy(lab))
            replica = Controller(
                lab,
                arguments=["--log-level=debug", "--log-format=text", f"--lease-duration={LEASE}", *arguments],
                environment=way.environment,
            )
            stack.enter_context(replica)
            self.ways[replica.name], self.replicas[replica.name] = way, replica
        for replica in self.replicas.values():
            replica.wait_ready()

    def holder(self) -> str:
        """Who stands in the Lease; "" for nobody."""
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self._lab.namespace}/leases/certbotk8s"
        found: Any = self._lab.api(path)["spec"]
        return str(found.get("holderIdentity", ""))

    def leader(self) -> Controller:
        """The replica that leads."""
        return self.replicas[wait_for(lambda: self.holder() if self.holder() in self.replicas else None, "a leader")]

    def strike(self, leader: Controller, fault: str) -> float:
        """Do that to the leader; the seconds until the other one leads. Afterwards both run again."""
        way, other = self.ways[leader.name], next(name for name in self.replicas if name != leader.name)
        began = time.monotonic()
        match fault:
            case "killed":
                leader.kill()
            case "stopped":
                leader.signal(signal.SIGSTOP)
            case "cut off":
                way.cut()
        wait_for(lambda: self.holder() == other, f"{other} takes over from {leader.name}, which was {fault}")
        seconds = time.monotonic() - began
        match fault:
            case "stopped":
                leader.signal(signal.SIGCONT)
                assert wait_for(leader.ended, f"{leader.name} sees that it leads no more") == 1
            case "cut off":
                assert wait_for(leader.ended, f"{leader.name} sees that it leads no more") == 1
                way.mend()
        leader.start()
        leader.wait_ready()
        return seconds


@pytest.fixture(scope="module")
def replicas(lab: Lab) -> Iterator[Replicas]:
    install_crds(lab)
    with ExitStack() as stack:
        yield Replicas(lab, stack)


@pytest.fixture(scope="module")
def issuer(lab: Lab, replicas: Replicas) -> Iterator[str]:
    replicas.leader()
    admin = Site(lab, lab.namespace)
    name = admin.cluster_issuer(f"ca-{secrets.token_hex(3)}")
    yield name
    admin.delete(f"{CERTIFICATES}/clusterissuers/{name}")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rounds", [6, pytest.param(30, marks=pytest.mark.soak)])
def test_leaders_come_and_go(lab: Lab, site: Site, replicas: Replicas, issuer: str, suffix: str, rounds: int) -> None:
    """Leaders are killed, stopped for longer than their Lease and continued, and cut off from the API server, each in
    the midst of two issuances: every Certificate gets one certificate from one finalized order, and no authorization
    fails. A replica that was stopped or cut off ends by itself.

    Mutation: give up the order of another leader instead of fetching it; answer 404 for a token that the cache does not
    have yet.
    """
    seed = secrets.randbits(32)
    moments, seconds = random.Random(seed), dict[str, list[float]]()
    mark, since = lab.mark(), lab.acme.mark()
    names = []
    for number in range(rounds):
        leader, fault = replicas.leader(), FAULTS[number % len(FAULTS)]
        if fault != "cut off":
            leader.withdraw()
        for part in "ab":
            names.append(f"web{number}{part}")
            site.certificate(names[-1], [f"{names[-1]}.{suffix}"], issuer)
        time.sleep(moments.uniform(0, 0.5))
        seconds.setdefault(fault, []).append(replicas.strike(leader, fault))
    for name in names:
        status = site.ready(name)
        assert [order["outcome"] for order in status["recentOrders"]] == ["Issued"], (seed, name, status)
        assert status["revision"] == 1
        assert f"{site.leaf(name).serial_number:x}" == status["serialNumber"]
    site.nothing_left()
    taken = sorted(second for each in seconds.values() for second in each)
    print(
        f"\nseed {seed}: {rounds} faults, {len(names)} issuances: {lab.acme.issued(since)} certificates, "
        f"{lab.orders(mark)} orders; take-over p50 {statistics.median(taken):.1f} s, worst {taken[-1]:.1f} s "
        f"with a Lease of {LEASE} s ({ {fault: round(max(each), 1) for fault, each in seconds.items()} })"
    )
    assert lab.acme.issued(since) == len(names)


def test_a_standby_answers_challenges(lab: Lab, site: Site, replicas: Replicas, issuer: str, suffix: str) -> None:
    """The CA's look at a challenge may reach the replica that does not lead, before its own cache has the token: here
    it always does, with a cache 3 s behind.

    Mutation: do not ask the leader.
    """
    leader = replicas.leader()
    other = next(replica for replica in replicas.replicas.values() if replica is not leader)
    leader.withdraw()
    way = replicas.ways[other.name]
    way.lag = 3.0
    try:
        site.certificate("web", [f"web.{suffix}"], issuer)
        site.ready("web")
        assert replicas.leader() is leader
        assert site.status("web")["recentOrders"][0]["outcome"] == "Issued"
    finally:
        way.lag = 0.0
        leader.restart()
        leader.wait_ready()


def test_a_leader_that_is_told_to_end_hands_over(
    lab: Lab, site: Site, replicas: Replicas, issuer: str, suffix: str
) -> None:
    """SIGTERM in the midst of ten issuances: the leader ends with status 0 and releases its Lease when its workers have
    ended, the other takes over without waiting for its end, and each gets one certificate.

    Mutation: keep the Lease on SIGTERM.
    """
    leader, since = replicas.leader(), lab.acme.mark()
    names = [f"web{number}" for number in range(10)]
    leader.withdraw()
    for name in names:
        site.certificate(name, [f"{name}.{suffix}"], issuer)
    time.sleep(0.3)
    began = time.monotonic()
    assert leader.stop() == 0
    stopped = time.monotonic()
    wait_for(lambda: replicas.holder() not in {"", leader.name}, "the other replica leads")
    print(f"\nended after {stopped - began:.2f} s; the other led {time.monotonic() - stopped:.2f} s later")
    for name in names:
        assert [order["outcome"] for order in site.ready(name)["recentOrders"]] == ["Issued"]
    assert lab.acme.issued(since) == len(names)
    leader.start()
    leader.wait_ready()


def test_a_late_verdict_about_an_issuer(lab: Lab, site: Site, replicas: Replicas, suffix: str) -> None:
    """What a leader writes of an Issuer may arrive when it is dead, another one leads, and the reason is gone: that one
    says again how the Issuer is, and Certificates come.

    Mutation: look at an Issuer only when its generation has changed.
    """
    admin, leader = Site(lab, lab.namespace), replicas.leader()
    way, (other,) = replicas.ways[leader.name], [name for name in replicas.replicas if name != leader.name]
    name = admin.cluster_issuer(f"ca-{secrets.token_hex(3)}")
    path, key = f"{CERTIFICATES}/clusterissuers/{name}", admin.secret_path(f"{name}-account")
    good = admin.secret(f"{name}-account")
    assert good
    verdict = f"{path}/status"
    with way.inject(to("PUT", verdict), late(10.0), times=1) as held:
        admin.patch("secret", f"{name}-account", {"data": {"tls.key": base64.b64encode(b"no key").decode()}})
        wait_for(lambda: held.hits, "the verdict is on its way")
        leader.kill()
        good["metadata"].pop("resourceVersion")
        lab.api(key, method="PUT", body=good)
        wait_for(lambda: replicas.holder() == other, f"{other} leads")
        site.certificate("before", [f"before.{suffix}"], name)
        site.ready("before")
        (late_one,) = [each for each in way.exchanges if each.method == "PUT" and each.path == verdict][-1:]
        assert late_one.status == 0
        assert admin.issuer_condition("ClusterIssuer", name, "True")
        mark = lab.mark()
        wait_for(lambda: late_one.status, "the verdict arrives")
    assert late_one.status == 200
    wait_for(lambda: [each.resource for each in lab.kube_writes(mark)].count("clusterissuers") >= 2, "it is answered")
    admin.issuer_condition("ClusterIssuer", name, "True", "AccountRegistered")
    site.certificate("after", [f"after.{suffix}"], name)
    site.ready("after")
    leader.start()
    leader.wait_ready()
    admin.delete(path)
