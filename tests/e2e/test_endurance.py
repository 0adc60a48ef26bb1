"""The controller at work for a long time: what it holds does not grow."""

import contextlib
import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.lab.controller import Controller
from tests.lab.lab import Lab
from tests.site import Site, wait_for

# By hand for longer: CERTBOTK8S_ENDURANCE=20 pytest -s -m soak tests/e2e/test_endurance.py
MINUTES = float(os.environ.get("CERTBOTK8S_ENDURANCE", "5"))
CERTIFICATES = 40


class Held(NamedTuple):
    """What a process holds: resident memory in MiB, threads, open files, sockets among them."""

    rss: float
    threads: int
    files: int
    sockets: int


def held(pid: int) -> Held:
    """As /proc tells it (proc(5))."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed just now
            links.append(str(link.readlink()))
    sockets = sum(link.startswith("socket:") for link in links)
    return Held(int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"]), len(links), sockets)


@pytest.mark.soak
@pytest.mark.timeout(60 * MINUTES + 600)
def test_nothing_grows(lab: Lab, site: Site, controller: Controller, issuer: str, suffix: str) -> None:
    """Certificates of 60 s life renew for minutes: memory, threads and sockets are at the end what they were after the
    first round, and each renewal took one order.

    Mutation: keep every Work in `CertificateReconciler._works`, or every session's connections.
    """
    names = [f"web{number}" for number in range(CERTIFICATES)]
    for name in names:
        site.certificate(name, [f"{name}.{suffix}"], issuer, profile="shortlived")
    for name in names:
        site.ready(name, revision=2, timeout=600)
    mark, since, began = lab.mark(), lab.acme.mark(), time.monotonic()
    revisions = sum(site.status(name)["revision"] for name in names)
    start = held(controller.pid)
    while time.monotonic() - began < 60 * MINUTES:
        time.sleep(5)
    end = held(controller.pid)
    renewals = sum(site.status(name)["revision"] for name in names) - revisions
    issued, orders = lab.acme.issued(since), lab.orders(mark)
    print(f"\n{MINUTES:.0f} minutes, {renewals} renewals, {issued} certificates, {orders} orders")
    print(f"start {start}\nend   {end}")
    assert renewals > CERTIFICATES * MINUTES
    assert abs(issued - renewals) <= CERTIFICATES  # those that were under way at either end
    assert orders <= issued + CERTIFICATES
    assert end.threads <= start.threads + 24  # as many as three pools may have, which end when they are idle
    assert end.sockets <= start.sockets + 16
    assert end.rss <= start.rss + 20
    for name in names:
        site.delete(site.certificate_path(name))
    wait_for(lambda: not site.challenge_ingresses(), "nothing is left")
