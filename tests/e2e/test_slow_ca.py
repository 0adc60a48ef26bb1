"""A CA that takes its time: orders that are processed for long, calls that are answered late or never.

CAs of institutions take 15 s for newOrder and over 45 s for finalize (tests/lab/presets.py; test_incommon.py runs them
at their own pace in the soak lane).
"""

from __future__ import annotations

import itertools
import statistics
import time
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.faults import FaultyCA, faulty_ca
from tests.lab.acme_proxy import document, held, kind_of, problem, to
from tests.lab.presets import names
from tests.lab.proxy import Fault, late
from tests.site import CERTIFICATES, Site, assert_plain, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.controller import Controller
    from tests.lab.lab import Lab
    from tests.lab.proxy import Request

WAIT = 2


@pytest.fixture
def ca(lab: Lab, site: Site, controller: Controller) -> Iterator[FaultyCA]:
    """An issuer whose CA is behind a proxy; whatever a test provokes is told in plain words."""
    with faulty_ca(lab) as faulty:
        yield faulty
        assert_plain(site.said())


def looks(ca: FaultyCA, since: int = 0) -> list[float]:
    """When the order was looked at."""
    return [each.moment for each in ca.proxy.asked(since) if kind_of(each) == "order"]


def is_after_finalize(ca: FaultyCA) -> Callable[[Request], bool]:
    """Looks at the order since finalize has reached the CA."""
    return lambda request: kind_of(request) == "order" and ca.proxy.count("finalize") > 0


def lagging(shown: dict[str, Any]) -> Fault:
    """An order that is valid, with another certificate URL than the CA's."""
    return document(lambda order: order | {"status": "valid"} | shown)


@pytest.mark.parametrize("seconds", [6, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(500)])])
def test_finalize_is_not_answered(site: Site, controller: Controller, ca: FaultyCA, suffix: str, seconds: int) -> None:
    """A finalize that the CA has heard and does not answer for minutes, with two restarts meanwhile: one order, one
    finalize, one certificate. In the soak lane the controller's own patience (180 s) ends before.

    Mutation: begin with Authorized in `_resume` whatever the state.
    """
    ca.proxy.inject(to("finalize"), Fault(answer_delay=seconds, respond=lambda _: None))
    with ca.proxy.inject(to("order"), held()):
        site.certificate("web", [f"web.{suffix}"], ca.issuer)
        wait_for(lambda: ca.proxy.count("finalize"), "finalize has reached the CA")
        if seconds > 180:
            site.condition("web", "Issuing", "True", "CAUnavailable", "no answer within 180 s", timeout=300)
        for _ in range(2):
            asked = len(ca.proxy.exchanges)
            controller.restart()
            controller.wait_ready()
            wait_for(lambda: looks(ca, asked), "the order is looked at after the restart")  # noqa: B023
        assert site.status("web")["issuance"]["state"] == "Finalizing"
    status = site.ready("web")
    site.nothing_left()
    counts = ca.counts()
    assert (counts["newOrder"], counts["finalize"], counts["certificate"], ca.issued()) == (1, 1, 1, 1)
    assert status.get("failedAttempts", 0) == 0
    assert status["revision"] == 1


def test_the_cas_pace_in_every_form(site: Site, ca: FaultyCA, suffix: str) -> None:
    """Retry-After sets the next look at an order in `processing`, as seconds and as a date, with whatever status.

    Mutation: leave `retry_after` out in `parse_order`.
    """
    forms: list[Fault | Callable[[Request], Fault]] = [
        held(str(WAIT)),
        lambda _: held(formatdate(time.time() + WAIT + 1, usegmt=True)),  # a date has whole seconds
        problem(503, "serverInternal", "busy", Retry_After=str(WAIT)),
        problem(429, "rateLimited", "slowly", Retry_After=str(WAIT)),
        problem(500, "serverInternal", "trouble", Retry_After=str(WAIT)),
    ]
    ca.proxy.inject(to("finalize"), held())
    for form in forms:
        ca.proxy.inject(is_after_finalize(ca), form, times=1)
    site.certificate("web", [f"web.{suffix}"], ca.issuer)
    site.ready("web")
    finalized = max(each.moment for each in ca.proxy.asked() if kind_of(each) == "finalize")
    seen = [moment for moment in looks(ca) if moment > finalized]
    gaps = [later - sooner for sooner, later in pairwise(seen)]
    print(f"\nlooks at the order, s between them: {[round(gap, 1) for gap in gaps]}")
    assert len(seen) == len(forms) + 1
    assert all(gap >= WAIT - 0.2 for gap in gaps)
    assert (ca.counts()["finalize"], ca.issued()) == (1, 1)


def test_the_cas_pace_over_a_restart(site: Site, controller: Controller, ca: FaultyCA, suffix: str) -> None:
    """What a CA says with an order, to be asked again in so long, holds for a controller that was started meanwhile.

    Mutation: leave `until` out in `_look_again`.
    """
    pace = 12
    with ca.proxy.inject(to("finalize", "order"), held(str(pace))):
        site.certificate("web", [f"web.{suffix}"], ca.issuer)
        wait_for(lambda: site.status("web").get("nextAttemptTime"), "when to look again stands in status")
        asked = len(ca.proxy.exchanges)
        (finalized,) = [each.moment for each in ca.proxy.asked() if kind_of(each) == "finalize"]
        controller.restart()
        wait_for(lambda: looks(ca, asked), "the order is looked at after the restart")
    first = looks(ca, asked)[0] - finalized
    print(f"\nlooked at {first:.1f} s after finalize, which asked for {pace} s")
    assert first >= pace
    site.ready("web")
    assert (ca.counts()["newOrder"], ca.counts()["finalize"], ca.issued()) == (1, 1, 1)


def test_an_order_that_is_never_finished(site: Site, ca: FaultyCA, suffix: str) -> None:
    """An order that stays in `processing` is waited for until the CA's own deadline, and then told as such.

    Mutation: take no notice of the deadline in `_look_again`.
    """
    end = (datetime.now(UTC) + timedelta(seconds=8)).isoformat(timespec="seconds")
    ca.proxy.inject(to("newOrder"), document(lambda order: order | {"expires": end}))
    with ca.proxy.inject(to("finalize", "order"), held("1")):
        site.certificate("web", [f"web.{suffix}"], ca.issuer)
        message = site.condition("web", "Issuing", "False", "OrderUnfinished")["message"]
    print(f"\n{message}")
    assert "though its order was finalized, and waited for until" in message
    assert (ca.counts()["newOrder"], ca.counts()["finalize"]) == (1, 1)


def test_valid_and_no_certificate_yet(site: Site, ca: FaultyCA, suffix: str) -> None:
    """An order that is valid before its certificate can be fetched is looked at until it names one.

    Mutation: end the attempt in `_collect` when a valid order names no certificate.
    """
    without: list[dict[str, Any]] = [{"certificate": None}, {"certificate": ""}, {"certificate": 4}]
    for each in without:
        ca.proxy.inject(is_after_finalize(ca), lagging(each), times=1)
    site.certificate("web", [f"web.{suffix}"], ca.issuer)
    assert site.ready("web").get("failedAttempts", 0) == 0
    counts = ca.counts()
    assert (counts["newOrder"], counts["finalize"], counts["certificate"], ca.issued()) == (1, 1, 1, 1)
    assert len(looks(ca)) >= len(without) + 1


# --- a slow CA beside a quick one -------------------------------------------------------------------------------------


def readiness(site: Site, wanted: list[str], issuer: str, suffix: str) -> list[float]:
    """Seconds from the creation of each Certificate until it is seen to be Ready."""
    begun = {}
    for name in wanted:
        begun[name] = time.monotonic()
        site.certificate(name, [f"{name}.{suffix}"], issuer)
    done: dict[str, float] = {}

    def look() -> bool:
        now = time.monotonic()
        for each in site._items(site.certificate_path("").rstrip("/")):
            name, conditions = each["metadata"]["name"], each.get("status", {}).get("conditions", [])
            if name in begun and any(one["type"] == "Ready" and one["status"] == "True" for one in conditions):
                done.setdefault(name, now - begun[name])
        return len(done) == len(begun)

    wait_for(look, f"{len(wanted)} quick Certificates Ready", timeout=300)
    return list(done.values())


def figures(seconds: list[float]) -> str:
    return f"p50 {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s"


@pytest.mark.parametrize(
    ("slow", "quick"), [(40, 10), pytest.param(200, 50, marks=[pytest.mark.soak, pytest.mark.timeout(500)])]
)
def test_a_slow_ca_beside_a_quick_one(
    site: Site, ca: FaultyCA, issuer: str, suffix: str, slow: int, quick: int
) -> None:
    """Orders that a CA does not answer hold no worker: those of another issuer go on as if they were alone, the slow CA
    is asked for at most ten orders at once, and one that it has taken is finished before it has taken all.

    Mutation: make the calls of all issuers in one pool, and no quick one becomes Ready; place orders in the pool of the
    other calls, and no slow one does.
    """
    numbers = itertools.count()

    def some(count: int) -> list[str]:
        return [f"quick-{next(numbers)}" for _ in range(count)]

    alone = readiness(site, some(quick), issuer, suffix)

    def pace(request: Request) -> Fault:
        """In the soak lane all of them are answered, 30 s late; else one soon and the others never."""
        return late(30 if slow > 40 else 1 if names(request) == [f"slow-0.{suffix}"] else 3600)

    answered_late = ca.proxy.inject(to("newOrder"), pace)
    for number in range(slow):
        site.certificate(f"slow-{number}", [f"slow-{number}.{suffix}"], ca.issuer)
    wait_for(lambda: answered_late.hits >= 8, "the slow CA is asked")
    beside = readiness(site, some(quick), issuer, suffix)
    print(f"\n{quick} quick alone: {figures(alone)}; beside {slow} slow: {figures(beside)}")
    assert sum(kind_of(each) == "newOrder" and each.status == 0 for each in ca.proxy.asked()) <= 10
    site.ready("slow-0", timeout=120)
    for number in range(slow):
        site.lab.api(site.certificate_path(f"slow-{number}"), method="DELETE")


# --- as many orders at once as a CA bears -----------------------------------------------------------------------------


def most_at_once(ca: FaultyCA) -> int:
    """How many orders were under way at most: placed, and their certificates not yet fetched."""
    now = most = 0
    for each in ca.proxy.asked():
        now += {"newOrder": 1, "certificate": -1}.get(kind_of(each), 0)
        most = max(most, now)
    return most


def test_no_more_orders_at_once_than_the_issuer_allows(
    site: Site, lab: Lab, controller: Controller, ca: FaultyCA, suffix: str
) -> None:
    """Of twelve orders that a CA takes its time for, three are under way at once, over a restart too; the others say
    what they wait for and go on by themselves, and a renewal goes before those that have no certificate yet.

    Mutation: let `take` give a place to everybody; let renewals wait for those that have no certificate yet.
    """
    admin, most = Site(lab, lab.namespace), 3
    admin.patch("clusterissuers.certbotk8s.io", ca.issuer, {"spec": {"acme": {"maxConcurrentOrders": most}}})

    def is_looked_at() -> bool:
        found = admin.get(f"{CERTIFICATES}/clusterissuers/{ca.issuer}") or {}
        return bool(found["status"].get("observedGeneration") == found["metadata"]["generation"])

    wait_for(is_looked_at, "the issuer is ready with its limit")
    site.certificate("web", [f"web.{suffix}"], ca.issuer)
    site.ready("web")
    placed: list[list[str]] = []
    seen: dict[str, float] = {}

    def note(request: Request) -> Fault:
        placed.append(names(request))
        return Fault()

    def a_second_later(request: Request) -> Fault:
        order, now = request.path.rpartition("/")[2], time.monotonic()
        return held() if now < seen.setdefault(order, now) + 1 else Fault()

    ca.proxy.inject(to("newOrder"), note)
    slow = [f"slow-{number:02}" for number in range(12)]
    with ca.proxy.inject(to("finalize", "order"), held("1")):
        for name in slow:
            site.certificate(name, [f"{name}.{suffix}"], ca.issuer)
        message = site.condition(slow[-1], "Issuing", "False", "OrdersLimited")["message"]
        print(f"\n{message}")
        assert f"it has as many under way as its spec.acme.maxConcurrentOrders allows ({most})" in message
        wait_for(lambda: ca.counts()["finalize"] == most + 1, "three are finalized")
        asked = len(ca.proxy.exchanges)
        controller.restart()
        site.annotate("web", renew_now="1")
        wait_for(lambda: len(looks(ca, asked)) >= most, "the orders are looked at after the restart")
        site.condition("web", "Issuing", "False", "OrdersLimited")
        assert len(placed) == most
        ca.proxy.inject(to("finalize", "order"), a_second_later)
    site.ready("web", revision=2)
    before = placed.index([f"web.{suffix}"])
    for name in slow:
        site.ready(name)
    print(f"{most_at_once(ca)} orders at once; the renewal was number {before + 1} of {len(placed)}")
    assert most_at_once(ca) == most
    assert len(placed) == len(slow) + 1
    assert before < 2 * most  # those that get a place at the same moment order in any order
