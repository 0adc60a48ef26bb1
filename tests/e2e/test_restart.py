"""The controller is killed, or told to end, in the middle of its work; started again, it finishes what was begun."""

import random
import secrets
import subprocess
import time
from collections import Counter

import pytest

from tests.lab.controller import Controller
from tests.lab.lab import Lab
from tests.site import Site, wait_for

pytestmark = pytest.mark.usefixtures("plain")

GRACE = 25.0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rounds", [10, pytest.param(50, marks=pytest.mark.soak)])
def test_killed_at_any_moment(
    lab: Lab, site: Site, controller: Controller, issuer: str, suffix: str, rounds: int
) -> None:
    """Killed at a random moment of an issuance and started again, the controller finishes it: the CA issues one
    certificate, that one is used, and nothing is left. One more order is placed only where the kill came before the
    first one was remembered, or made the CA's look fail.

    Mutation: start anew instead of fetching the order in `_resume`.
    """
    begun = time.monotonic()
    site.certificate("web", [f"web.{suffix}"], issuer)
    site.ready("web")
    site.nothing_left()
    whole = time.monotonic() - begun
    seed = secrets.randbits(32)
    moments, extra, validations, hit = random.Random(seed), 0, 0, Counter[str]()
    for number in range(rounds):
        name, moment = f"web{number}", moments.uniform(0, whole)
        told = f"seed {seed}, round {number}, killed after {moment * 1000:.0f} ms"
        since = lab.acme.mark()
        site.certificate(name, [f"{name}.{suffix}"], issuer)
        time.sleep(moment)
        controller.kill()
        stored = site.status(name)
        order_known = "issuance" in stored or "revision" in stored
        hit["done" if "revision" in stored else (stored.get("issuance") or {}).get("state", "none stored")] += 1
        controller.start()
        missed = site.recovered(name, told)
        validations += missed
        assert lab.acme.issued(since) == 1, told
        orders = lab.acme.orders(since)
        assert orders <= (1 if order_known else 2) + missed, told
        extra += orders - 1
    print(f"\nseed {seed}: {rounds} kills within {whole:.2f} s; state in status when killed: {dict(hit)}")
    print(f"{extra} orders more than certificates, {validations} validations missed")


def test_told_to_end_while_an_order_waits(
    lab: Lab, site: Site, controller: Controller, issuer: str, suffix: str
) -> None:
    """SIGTERM while a challenge waits to be served ends with status 0, and the next start finishes the same order.

    Mutation: give the order up when the controller stops.
    """
    host = f"web.{suffix}"
    mark = lab.mark()
    lab.set_dns(host, addresses=["127.0.0.2"])
    try:
        site.certificate("web", [host], issuer)
        wait_for(lambda: site.challenge_ingresses("web"), "the challenge stands")
        assert controller.stop(GRACE) == 0
        url = site.status("web")["issuance"]["orderURL"]
        assert site.challenge_ingresses("web")
    finally:
        lab.clear_dns(host)
        controller.start()
    controller.wait_ready()
    site.ready("web")
    site.nothing_left()
    assert url.startswith("https://")
    assert lab.orders(mark) == 1


def test_told_to_end_in_the_midst_of_many(
    lab: Lab, site: Site, controller: Controller, issuer: str, suffix: str
) -> None:
    """SIGTERM with ten orders at all stages ends with status 0 in time, and the next start finishes every one, with no
    certificate more than asked for.

    Mutation: start anew instead of fetching the order in `_resume`.
    """
    since = lab.acme.mark()
    names = [f"web{number}" for number in range(10)]
    for name in names:
        site.certificate(name, [f"{name}.{suffix}"], issuer)
    time.sleep(0.3)
    start = time.monotonic()
    assert controller.stop(GRACE) == 0
    under_way = [name for name in names if not site.status(name).get("revision")]
    print(f"\nended after {time.monotonic() - start:.1f} s with {len(under_way)} of {len(names)} under way")
    assert under_way
    controller.start()
    controller.wait_ready()
    for name in names:
        site.recovered(name, "told to end")
    assert lab.acme.issued(since) == len(names)


def test_told_to_end_at_rest(site: Site, controller: Controller, issuer: str, suffix: str) -> None:
    """With nothing under way SIGTERM ends it at once, with status 0.

    Mutation: always wait out the time that steps have to end.
    """
    site.certificate("web", [f"web.{suffix}"], issuer)
    site.ready("web")
    site.nothing_left()
    start = time.monotonic()
    try:
        assert controller.stop(5) == 0
    except subprocess.TimeoutExpired:
        pytest.fail("it did not end within 5 s")
    finally:
        seconds = time.monotonic() - start
        controller.restart()
    print(f"\nended after {seconds:.2f} s")
    controller.wait_ready()
    assert site.condition("web", "Ready", "True")
