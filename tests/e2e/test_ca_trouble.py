"""A CA that limits, stalls, loses answers or takes its time costs patience and no certificate: counted at the CA.

The trouble is made by a proxy in front of the lab's Pebble (tests/lab/acme_proxy.py).
"""

from __future__ import annotations

import time
from email.utils import formatdate
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from tests.e2e.faults import FaultyCA, faulty_ca
from tests.lab.acme_proxy import held, kind_of, problem, to
from tests.lab.proxy import answered, dropped
from tests.site import Site, assert_plain, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.controller import Controller
    from tests.lab.lab import Lab


@pytest.fixture
def ca(lab: Lab, site: Site, controller: Controller) -> Iterator[FaultyCA]:
    """An issuer whose CA is behind a proxy; whatever a test provokes is told in plain words."""
    with faulty_ca(lab) as faulty:
        yield faulty
        assert_plain(site.said())


@pytest.mark.parametrize(("status", "kind", "form"), [(429, "rateLimited", "seconds"), (503, "serverInternal", "date")])
def test_a_limit_on_new_orders(
    site: Site, ca: FaultyCA, issuer: str, suffix: str, status: int, kind: str, form: str
) -> None:
    """A CA that asks to wait is asked again when it said, not sooner; other issuers go on; no attempt is lost.

    Mutation: give `Answer.retry_after` as None, and the next request comes after 2 s.
    """
    after = 5
    value = str(after) if form == "seconds" else formatdate(time.time() + after, usegmt=True)
    ca.proxy.inject(to("newOrder"), problem(status, kind, "too many new orders", Retry_After=value), times=1)
    site.certificate("held", [f"held.{suffix}"], ca.issuer)
    found = site.condition("held", "Issuing", "True", "RateLimited", "too many new orders")
    assert "Next attempt" in found["message"]
    site.certificate("other", [f"other.{suffix}"], issuer)
    site.ready("other")
    assert site.ready("held").get("failedAttempts", 0) == 0
    asked = [each for each in ca.proxy.asked() if kind_of(each) == "newOrder"]
    assert [each.status for each in asked] == [status, 201]
    assert asked[1].moment - asked[0].moment >= after - 1.5  # a date has whole seconds


def test_an_order_that_is_processed_for_long(
    lab: Lab, site: Site, controller: Controller, ca: FaultyCA, suffix: str
) -> None:
    """An order that the CA keeps in `processing` is waited for at the CA's pace, over a restart too, and collected.

    Mutation: take no notice of Finalizing in `_resume`, or treat `processing` as invalid.
    """
    with ca.proxy.inject(to("order", "finalize"), held("1")):
        site.certificate("web", [f"web.{suffix}"], ca.issuer)
        site.condition("web", "Issuing", "True", "OrderPending", "order processing since")
        controller.restart()
        asked = len(ca.proxy.exchanges)
        wait_for(lambda: ca.proxy.count("order", asked) >= 3, "the order is looked at after the restart")
        looks = [each.moment for each in ca.proxy.exchanges[asked:] if kind_of(each) == "order"]
        assert site.status("web")["issuance"]["state"] == "Finalizing"
    assert all(later - sooner >= 0.9 for sooner, later in pairwise(looks))
    site.ready("web")
    site.nothing_left()
    counts = ca.counts()
    assert (counts["newOrder"], counts["finalize"], counts["certificate"], ca.issued()) == (1, 1, 1, 1)


def test_the_answer_to_new_order_is_lost(site: Site, ca: FaultyCA, suffix: str) -> None:
    """The CA has an order of which nobody heard: another one is placed, and only that one is finalized.

    Mutation: end the attempt as failed when newOrder is not answered.
    """
    ca.proxy.inject(to("newOrder"), dropped(), times=1)
    site.certificate("web", [f"web.{suffix}"], ca.issuer)
    assert site.ready("web").get("failedAttempts", 0) == 0
    site.nothing_left()
    counts = ca.counts()
    assert (counts["newOrder"], counts["finalize"], ca.issued()) == (2, 1, 1)


def test_the_answer_to_finalize_is_lost(site: Site, ca: FaultyCA, suffix: str) -> None:
    """After finalize nothing is sent blindly again: the order is looked at, and its certificate is collected.

    Mutation: stay in Authorized until finalize is answered.
    """
    ca.proxy.inject(to("finalize"), dropped(), times=1)
    site.certificate("web", [f"web.{suffix}"], ca.issuer)
    assert site.ready("web").get("failedAttempts", 0) == 0
    counts = ca.counts()
    assert (counts["newOrder"], counts["finalize"], ca.issued()) == (1, 1, 1)


@pytest.mark.parametrize(
    "passed_on", [pytest.param(True, id="after"), pytest.param(False, id="before", marks=pytest.mark.soak)]
)
def test_every_answer_is_lost_once(site: Site, ca: FaultyCA, suffix: str, *, passed_on: bool) -> None:
    """One lost answer of every other kind, after the CA acted or before it heard: one order, no failure.

    Mutation: send the answers to the challenges again without asking which are still wanted.
    """
    for kind in ("authorization", "challenge", "order", "certificate"):
        ca.proxy.inject(to(kind), dropped(passed_on=passed_on), times=1)
    site.certificate("web", [f"web.{suffix}"], ca.issuer)
    assert site.ready("web").get("failedAttempts", 0) == 0
    site.nothing_left()
    assert (ca.counts()["newOrder"], ca.issued()) == (1, 1)


def test_a_certificate_that_cannot_be_fetched_at_once(lab: Lab, site: Site, ca: FaultyCA, suffix: str) -> None:
    """The certificate of a finished order is asked for until it comes, whatever stands in between: it is issued once.

    Mutation: take any answer for a certificate, and the page of the web server ends the attempt.
    """
    page = b"<html><body>We will be back soon</body></html>"
    for status in (503, 200):
        ca.proxy.inject(to("certificate"), answered(status, page, Content_Type="text/html"), times=1)
    site.certificate("web", [f"web.{suffix}"], ca.issuer)
    assert site.ready("web").get("failedAttempts", 0) == 0
    counts = ca.counts()
    assert (counts["newOrder"], counts["finalize"], ca.issued()) == (1, 1, 1)


def test_a_limit_outlives_a_restart(site: Site, controller: Controller, ca: FaultyCA, suffix: str) -> None:
    """What the CA asked to wait holds for the next controller too; its end is told by the time of the next attempt.

    Mutation: do not keep in status until when the CA asked to wait.
    """
    ca.proxy.inject(to("newOrder"), problem(429, "rateLimited", "too many new orders", Retry_After="10"), times=1)
    site.certificate("web", [f"web.{suffix}"], ca.issuer)
    site.condition("web", "Issuing", "True", "RateLimited", "too many new orders")
    assert site.status("web")["nextAttemptTime"]
    controller.restart()
    assert site.ready("web").get("failedAttempts", 0) == 0
    asked = [each.moment for each in ca.proxy.asked() if kind_of(each) == "newOrder"]
    assert len(asked) == 2
    assert asked[1] - asked[0] >= 8.5  # whole seconds are kept
