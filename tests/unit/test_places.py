"""At most so many orders of an issuer are under way at once; who waits says so, and goes on in its turn."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from certbotk8s.domain import api
from certbotk8s.domain.errors import Problem, TemporaryError
from certbotk8s.domain.problems import judge
from certbotk8s.ports import Key
from certbotk8s.reconcile.places import Places, Turn
from tests.unit.reconciling import SHOP, World, at_every_effect, crash, lose, refuse

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fakes.ca import FakeOrder

DAY = 86400.0
CA, OTHER_CA = Key("Issuer", SHOP, "ca"), Key("Issuer", SHOP, "other")
NEW, RENEWED = Turn(first_issuance=True, moment=0), Turn(first_issuance=False, moment=9)


def key(name: str) -> Key:
    return Key("Certificate", SHOP, name)


def limited(limit: int) -> World:
    """A world whose CA finishes no order, and whose issuer has at most that many under way."""
    world = World()
    world.issuer(maxConcurrentOrders=limit)
    world.settle()
    world.ca.holds_issuance = True
    return world


def certificates(world: World, *names: str) -> None:
    for name in names:
        world.certificate(name, names=(f"{name}.example.test",))
        world.settle(20)


def placed(world: World) -> list[str]:
    """The first labels of the names for which orders were placed, in order."""
    return [order.identifiers[0].value.partition(".")[0] for order in world.ca.orders.values()]


def under_way(world: World) -> list[str]:
    return [each.metadata.name for each in world.api.all(api.CERTIFICATE) if each.status.issuance]


def finish(world: World, name: str) -> None:
    """The CA finishes the orders for that name alone."""
    for order in world.ca.orders.values():
        if order.identifiers[0].value.startswith(f"{name}."):
            order.processing = False
            order.looks = 1000
    world.settle(60)


def waits(world: World, name: str) -> bool:
    condition = api.find_condition(world.status(name).conditions, "Issuing")
    return bool(condition and condition.reason == "OrdersLimited")


def test_no_more_than_so_many() -> None:
    """Of five Certificates two are ordered, the others say what they wait for, and each that ends lets one go on.

    Mutation: let `take` give a place to everybody, or wake nobody in `release`.
    """
    world = limited(2)
    certificates(world, "a", "b", "c", "d", "e")
    assert placed(world) == under_way(world) == ["a", "b"]
    for name in ("c", "d", "e"):
        condition = world.condition("Issuing", name)
        assert (condition.status, condition.reason) == ("False", "OrdersLimited")
        assert condition.message == (
            "Waiting for other orders of Issuer shop/ca to end: it has as many under way as its "
            "spec.acme.maxConcurrentOrders allows (2). This goes on by itself"
        )
        assert world.condition("Ready", name).message == condition.message
    finish(world, "b")
    assert under_way(world) == ["a", "c"]
    world.ca.go_on()
    world.settle()
    assert [world.condition("Ready", name).status for name in "abcde"] == ["True"] * 5
    assert sorted(placed(world)) == ["a", "b", "c", "d", "e"]
    world.nothing_left()


def test_a_free_place_wakes_one() -> None:
    """Of all that wait only the first is woken by a free place, so that no other can come before it.

    Mutation: let a Certificate lose its turn when it is looked at.
    """
    world = limited(1)
    certificates(world, "a", "b", "c", "d")
    places, woken = world.process.certificates._places, list[str]()

    def enqueue(one: Key) -> None:
        woken.append(one.name)
        world.process.queue.add(one)

    places._enqueue = enqueue
    finish(world, "a")
    assert under_way(world) == ["b"]
    assert set(woken) == {"b"}


def test_who_goes_first() -> None:
    """What expires first goes first, then what is wanted for the first time, the oldest first.

    Mutation: let first issuances go by their age among renewals.
    """
    world = limited(1)
    world.ca.holds_issuance = False
    certificates(world, "late")
    world.clock.advance(5 * DAY)
    certificates(world, "later")
    world.ca.holds_issuance = True
    certificates(world, "busy")
    assert under_way(world) == ["busy"]
    certificates(world, "z-older", "a-newer")
    world.annotate("later", renew_now="1")
    world.settle(20)
    world.annotate("late", renew_now="1")
    world.settle(20)
    assert all(waits(world, name) for name in ("late", "later", "z-older", "a-newer"))
    before = len(placed(world))
    for name in ("busy", "late", "later", "z-older", "a-newer"):
        finish(world, name)
    assert placed(world)[before:] == ["late", "later", "z-older", "a-newer"]
    world.nothing_left()


def test_a_restart_places_no_more() -> None:
    """Orders in status hold their places after a restart, before the first look at them.

    Mutation: count what is in memory alone.
    """
    world = limited(2)
    certificates(world, "x", "y", "a", "b")
    for _ in range(3):
        world.start()
        world.settle(20)
        assert sorted(under_way(world)) == ["x", "y"]
        assert len(world.ca.orders) == 2
    finish(world, "x")
    assert sorted(under_way(world)) == ["a", "y"]


def withdraw(world: World) -> None:
    world.delete(api.CERTIFICATE, "a")


def raise_limit(world: World) -> None:
    world.issuer(maxConcurrentOrders=2)


def fail(world: World) -> None:
    for order in world.ca.orders.values():
        order.error = Problem("serverInternal", "It came to nothing.")


def ask_elsewhere(world: World) -> None:
    world.issuer("other")
    world.certificate("a", names=("a.example.test",), issuerRef={"name": "other"})
    world.ca.go_on()


@pytest.mark.parametrize("free", [withdraw, raise_limit, fail, ask_elsewhere])
def test_a_place_that_becomes_free(free: Callable[[World], None]) -> None:
    """The next one goes on when an order ends badly or is no longer wanted, and when the limit is raised.

    Mutation: give a place back in `_move` alone, not in `_gone`.
    """
    world = limited(1)
    certificates(world, "a", "b")
    assert waits(world, "b")
    free(world)
    world.settle(60)
    assert "b" in placed(world)


def test_who_waits_and_is_gone_holds_up_nobody() -> None:
    """The first in the queue is deleted, and the next one goes on.

    Mutation: keep the turn of a Certificate that is gone.
    """
    world = limited(1)
    certificates(world, "a", "b", "c")
    world.delete(api.CERTIFICATE, "b")
    world.settle(20)
    finish(world, "a")
    assert under_way(world) == ["c"]


def test_an_order_that_the_ca_does_not_take_holds_no_place() -> None:
    """A CA that asks to wait a day with one order is asked for the next one meanwhile.

    Mutation: keep the place of an order that was not placed.
    """
    world = limited(1)
    limited_rate = judge(Problem("rateLimited", "too many", 429), retry_after=timedelta(days=1), doing="asking")
    world.ca.fail("newOrder", limited_rate)
    certificates(world, "a", "b")
    assert world.condition("Issuing", "a").reason == "RateLimited"
    assert under_way(world) == ["b"]


@pytest.mark.parametrize("act", [crash, lose, refuse])
@pytest.mark.parametrize("when", ["before", "after"])
def test_whatever_breaks_at_any_effect(act: Callable[[World], None], when: str) -> None:
    """With a limit of one, three Certificates get theirs one after the other, whatever breaks, and never two at once.

    Mutation: let `take` give a place to everybody.
    """
    most: list[int] = []

    def begin() -> World:
        world = World()
        world.issuer(maxConcurrentOrders=1)
        world.settle()

        def ordered(_: FakeOrder) -> None:
            most.append(len(under_way(world)))

        world.ca.ordered = ordered
        for name in ("a", "b", "c"):
            world.certificate(name, names=(f"{name}.example.test",))
        return world

    for world, label in at_every_effect(begin, when, act):
        world.settle(600)
        assert [world.condition("Ready", name).status for name in "abc"] == ["True"] * 3, label
        world.nothing_left()
    assert set(most) == {0}


def test_places_of_one_issuer_are_no_others() -> None:
    """Each issuer has its own places, and a free one is for the first in the queue, whoever comes sooner.

    Mutation: take no notice in `take` of who waits.
    """
    woken: list[Key] = []
    places = Places(woken.append)
    assert places.take(key("a"), CA, 1, NEW)
    assert places.take(key("b"), OTHER_CA, 1, NEW)
    assert places.take(key("a"), CA, 1, NEW)
    assert not places.take(key("c"), CA, 1, NEW)
    assert not places.take(key("d"), CA, 1, RENEWED)
    places.release(key("d"), waits=True)
    places.release(key("a"))
    assert woken == [key("d")]
    assert not places.take(key("c"), CA, 1, NEW)
    assert places.take(key("d"), CA, 1, RENEWED)
    places.release(key("d"))
    assert woken[-1] == key("c")


def test_waiting_costs_little() -> None:
    """Whoever asks again and again is in the queue once; nothing is kept of issuers without orders.

    Mutation: push into the queue whatever is there.
    """
    places = Places(lambda _: None)
    places.hold(CA, [key("a")])
    assert not places.take(key("b"), CA, 1, RENEWED)
    for _ in range(100):
        assert not places.take(key("c"), CA, 1, NEW)
    assert len(places._issuers[CA].queue) == 2
    places.release(key("b"))
    places.release(key("c"))
    places.release(key("a"))
    assert places._issuers == {}


def test_a_lost_answer_keeps_the_place() -> None:
    """An order that the CA took and status does not have yet counts.

    Mutation: give the place back in every wait for newOrder.
    """
    world = limited(1)
    away = [TemporaryError("no answer")]

    def lose_status(_verb: str, kind: str, _namespace: str, _name: str) -> None:
        if kind == "Certificate/status" and world.ca.orders and away:
            raise away.pop()

    world.cluster.before = lose_status
    for name in ("a", "b"):
        world.certificate(name, names=(f"{name}.example.test",))
    world.settle(20)
    assert placed(world) == under_way(world) == ["a"]
