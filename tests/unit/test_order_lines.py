"""Each order that a CA took is told once, when it has ended: in the log, for audits, and as an Event."""

from __future__ import annotations

import json
import logging
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from certbotk8s import logs
from certbotk8s.domain import api
from certbotk8s.domain.errors import Problem, TemporaryError
from tests.unit.reconciling import NAME, SHOP, World, at_every_effect, crash, lose, refuse
from tests.unit.test_reconcile_certificate import OTHER, each_beginning, first, other_key

if TYPE_CHECKING:
    from collections.abc import Callable


Line = tuple[str, str, str]


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "certbotk8s")


def lines(caplog: pytest.LogCaptureFixture) -> list[Line]:
    """(order, outcome, reason) of each line about an order."""
    return [
        (record.__dict__["order"], record.__dict__["outcome"], record.__dict__["reason"])
        for record in caplog.records
        if "order" in record.__dict__
    ]


def test_the_line_of_an_order(caplog: pytest.LogCaptureFixture) -> None:
    """It names the object, the names, the issuer, the account and the order, in both forms of the log; the Event says
    the same sentence, and nothing else is told of the issuance.

    Mutation: leave a key out of KEYS, or one out of report_order.
    """
    world = first()
    world.settle()
    (order,) = world.ca.orders
    assert lines(caplog) == [(order, "issued", "Issued")]
    (record,) = [each for each in caplog.records if "order" in each.__dict__]
    line = json.loads(logs.JsonFormatter().format(record))
    assert {key: line[key] for key in logs.KEYS} == {
        "kind": "Certificate",
        "object": "shop/web-tls",
        "reason": "Issued",
        "outcome": "issued",
        "namespace": SHOP,
        "names": [NAME],
        "issuer": "Issuer shop/ca",
        "account": world.status().account_uri,
        "order": order,
    }
    assert [event.message for event in world.cluster.events if event.about.name == "web-tls"] == [line["message"]]
    assert (
        logs.TextFormatter()
        .format(record)
        .endswith(
            f"[Certificate shop/web-tls Issued outcome=issued namespace=shop names={NAME} issuer=Issuer shop/ca "
            f"account={world.status().account_uri} order={order}]"
        )
    )
    assert world.status().recent_orders[-1].order_url == order


def rename(world: World) -> None:
    """The Certificate asks for another name."""
    world.certificate(names=(OTHER,))


def delete(world: World) -> None:
    """The Certificate is deleted."""
    world.delete(api.CERTIFICATE, "web-tls")


def forget(world: World) -> None:
    """The CA loses its orders."""
    world.ca.forget_orders()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("act", [crash, refuse, lose, rename, delete, forget])
@each_beginning
def test_each_order_is_told_once(
    caplog: pytest.LogCaptureFixture, begin: Callable[[], World], issued: int, act: Callable[[World], None], when: str
) -> None:
    """Whatever happens at any effect, each order that the CA took is told once, and those that issued as such. Only a
    crash right after the last record keeps the line from being written: the record names the order then.

    Mutation: tell before the record is written, or not what another process recorded (`_part_with_orders`); tell
    nothing in `_gone`, or in `_leave_order`.
    """
    assert issued
    taken: list[str] = []

    def beginning() -> World:
        world = begin()
        taken[:] = world.ca.orders
        for url in taken:
            world.ca.orders.pop(url)  # renewals: what came before does not count
        taken.clear()
        caplog.clear()
        world.ca.ordered = lambda order: taken.append(order.url)
        return world

    for world, label in at_every_effect(beginning, when, act):
        world.settle(300)
        told = Counter(order for order, _, _ in lines(caplog))
        assert set(told.values()) <= {1}, (label, lines(caplog))
        found = world.api.get(api.CERTIFICATE, SHOP, "web-tls")
        killed = act is crash and label.startswith("after") and "Certificate/status" in label
        recorded = {one.order_url for one in found.status.recent_orders} if found and killed else set()
        assert set(told) <= set(taken), label
        assert set(taken) - recorded <= set(told), (label, lines(caplog))


def failing(world: World) -> None:
    world.ca.validate = lambda _name, _token: Problem("unauthorized", "Invalid response", 403)
    world.settle(10)


def refused(world: World) -> None:
    world.ca.refused = {NAME}
    world.settle(10)


def changed(world: World) -> None:
    world.ca.holds_validation = True
    world.settle(10)
    rename(world)
    world.ca.go_on()
    world.settle()


def changed_late(world: World) -> None:
    world.ca.holds_issuance = True
    world.settle(10)
    rename(world)
    world.ca.go_on()
    world.settle()


def withdrawn(world: World) -> None:
    world.ca.holds_validation = True
    world.settle(10)
    world.delete(api.ISSUER, "ca")
    world.settle(10)


def deleted(world: World) -> None:
    world.ca.holds_validation = True
    world.settle(10)
    delete(world)
    world.settle(10)


def lost(world: World) -> None:
    world.ca.holds_validation = True
    world.settle(10)
    forget(world)
    world.ca.go_on()
    world.settle()


def taken_by_another(world: World) -> None:
    alter = [other_key]
    world.ca.alter = lambda leaf: alter.pop()(leaf) if alter else leaf
    world.settle(10)


def not_stored(world: World) -> None:
    """The first order's URL cannot be stored, and the CA makes a second one."""
    world.ca.reuses_orders = False
    away = [TemporaryError("no answer")]

    def lose_status(_verb: str, kind: str, _namespace: str, _name: str) -> None:
        if kind == "Certificate/status" and world.ca.orders and away:
            raise away.pop()

    world.cluster.before = lose_status
    world.settle()


@pytest.mark.parametrize(
    ("happens", "endings"),
    [
        (failing, [("failed", "ChallengeFailed")]),
        (refused, []),
        (changed, [("abandoned", "OrderAbandoned"), ("issued", "Issued")]),
        (changed_late, [("discarded", "CertificateDiscarded"), ("issued", "Issued")]),
        (withdrawn, [("abandoned", "OrderAbandoned")]),
        (deleted, [("abandoned", "OrderAbandoned")]),
        (lost, [("failed", "OrderGone"), ("issued", "Issued")]),
        (taken_by_another, [("discarded", "CertificateRejected"), ("issued", "Issued")]),
        (not_stored, [("abandoned", "OrderAbandoned"), ("issued", "Issued")]),
    ],
)
def test_how_an_order_ended(
    caplog: pytest.LogCaptureFixture, happens: Callable[[World], None], endings: list[tuple[str, str]]
) -> None:
    """Each way in which an order ends has its outcome, its reason and its Event; what was never taken has no line.

    Mutation: tell every order that is left as abandoned, whatever its state; keep no orders but the stored one in mind.
    """
    world = first()
    happens(world)
    assert [(outcome, reason) for _, outcome, reason in lines(caplog)] == endings
    reasons = [str(event.reason) for event in world.cluster.events if event.about.name == "web-tls"]
    assert [reason for reason in reasons if reason in {why for _, why in endings}] == [why for _, why in endings]
    for record in caplog.records:
        if "order" in record.__dict__:
            print(record.getMessage())
            assert record.__dict__["names"] in {(NAME,), (OTHER,)}
            assert record.__dict__["order"].startswith("https://ca.example.test/order/")
