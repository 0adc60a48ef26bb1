"""The log as an audit reads it: one line for each order that the CA took, and an Event with the same sentence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.faults import FaultyCA, faulty_ca
from tests.lab.acme import BLOCKED_NAME
from tests.lab.acme_proxy import held, problem, to
from tests.lab.controller import Controller, install_crds
from tests.lab.proxy import Answer, changed
from tests.site import Site, assert_plain, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.lab import Lab


@pytest.fixture(scope="module")
def controller(lab: Lab) -> Iterator[Controller]:
    """A controller that logs as it does where nothing is set."""
    install_crds(lab)
    with Controller(lab) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def ca(lab: Lab, site: Site, controller: Controller) -> Iterator[FaultyCA]:
    with faulty_ca(lab) as faulty:
        yield faulty
        assert_plain(site.said())


@pytest.fixture
def orders(ca: FaultyCA) -> list[str]:
    """The URLs of all orders that the CA takes, as it gives them."""
    taken: list[str] = []

    def keep(answer: Answer) -> Answer:
        if answer.status < 400:
            taken.append(answer.header("Location"))
        return answer

    ca.proxy.inject(to("newOrder"), changed(keep))
    return taken


def lines(controller: Controller, site: Site) -> list[dict[str, Any]]:
    """The lines about orders of the test's namespace."""
    logged = [json.loads(line) for line in controller.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in logged if line.get("namespace") == site.namespace and "order" in line]


def test_every_order_has_one_line(
    lab: Lab, site: Site, controller: Controller, ca: FaultyCA, orders: list[str], suffix: str
) -> None:
    """Issued, failed, abandoned for another name and with a deleted Certificate, and one that a restart comes between:
    the orders in the log are those that the CA has taken, each once, with what an audit asks for.

    Mutation: tell nothing in `_leave_order`.
    """
    nowhere = [f"{name}.{suffix}" for name in ("changed", "deleted")]
    for name in nowhere:
        lab.set_dns(name, addresses=["127.0.0.2"])
    try:
        site.certificate("issued", [f"issued.{suffix}", f"www.{suffix}"], ca.issuer)
        site.ready("issued")
        with ca.proxy.inject(to("finalize"), problem(400, "badCSR", "no such key here")):
            site.certificate("failed", [f"failed.{suffix}"], ca.issuer)
            site.condition("failed", "Issuing", "False", "CSRRefused")
        site.certificate("refused", [BLOCKED_NAME], ca.issuer)
        site.condition("refused", "Issuing", "False", "RejectedIdentifier")
        for name in ("changed", "deleted"):
            site.certificate(name, [f"{name}.{suffix}"], ca.issuer)
            wait_for(lambda: site.challenge_ingresses(name), f"the challenge of {name} stands")  # noqa: B023
        site.patch_certificate("changed", {"spec": {"dnsNames": [f"other.{suffix}"]}})
        site.delete(site.certificate_path("deleted"))
        site.ready("changed")
        with ca.proxy.inject(to("order", "finalize"), held("1")):
            site.certificate("restarted", [f"restarted.{suffix}"], ca.issuer)
            site.condition("restarted", "Issuing", "True", "OrderPending", "order processing since")
            controller.restart()
            controller.wait_ready()
        site.ready("restarted")
    finally:
        for name in nowhere:
            lab.clear_dns(name)
    site.nothing_left()
    controller.restart()
    controller.wait_ready()
    wait_for(lambda: len(lines(controller, site)) >= len(orders), "a line for each order")
    told = lines(controller, site)
    print("".join(f"\n{json.dumps(line)}" for line in told))
    assert sorted(line["order"] for line in told) == sorted(orders)
    endings = {
        (f"{site.namespace}/issued", "issued", "Issued"): [f"issued.{suffix}", f"www.{suffix}"],
        (f"{site.namespace}/failed", "failed", "CSRRefused"): [f"failed.{suffix}"],
        (f"{site.namespace}/changed", "abandoned", "OrderAbandoned"): [f"changed.{suffix}"],
        (f"{site.namespace}/changed", "issued", "Issued"): [f"other.{suffix}"],
        (f"{site.namespace}/deleted", "abandoned", "OrderAbandoned"): [f"deleted.{suffix}"],
        (f"{site.namespace}/restarted", "issued", "Issued"): [f"restarted.{suffix}"],
    }
    assert {(line["object"], line["outcome"], line["reason"]): line["names"] for line in told} == endings
    account = site.status("issued")["accountURI"]
    for line in told:
        assert (line["kind"], line["issuer"], line["account"]) == ("Certificate", f"ClusterIssuer {ca.issuer}", account)
        assert site.event(line["object"].partition("/")[2], line["reason"], line["message"])
