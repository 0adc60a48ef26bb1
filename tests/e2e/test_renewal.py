"""Renewal under traffic: certificates of 60 s, served by Traefik, while new TLS connections come all the time."""

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.lab.controller import Controller
from tests.lab.lab import Lab
from tests.site import Served, Site, wait_for

RATE = 20  # new connections a second, for each name
CLIENTS = 5  # threads for each name


class Look(NamedTuple):
    """What one connection at `time` (seconds since the epoch) was served, or why it was not."""

    time: float
    served: Served | None
    failure: str = ""


@dataclass
class Traffic:
    """Clients that connect to one host at a steady rate until they are stopped. A context."""

    site: Site
    host: str
    looks: list[Look] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Traffic":
        self._threads = [threading.Thread(target=self._connect, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def serials(self) -> list[str]:
        """The serial numbers that were seen, in their order."""
        return list(dict.fromkeys(look.served.serial for look in list(self.looks) if look.served))

    def _connect(self, number: int) -> None:
        due = time.monotonic() + number / RATE
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due += CLIENTS / RATE
            now = time.time()
            try:
                self.looks.append(Look(now, self.site.served(self.host)))
            except OSError as error:
                self.looks.append(Look(now, None, str(error)))


def size(pid: int) -> tuple[float, int]:
    """Resident memory in MiB, and number of threads."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024, int(lines["Threads"])


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("certificates", "seconds"),
    [pytest.param(1, 66.0, id="one"), pytest.param(3, 300.0, id="three", marks=pytest.mark.soak)],
)
def test_no_connection_notices_a_renewal(
    lab: Lab, site: Site, controller: Controller, issuer: str, suffix: str, certificates: int, seconds: float
) -> None:
    """A certificate that lives 60 s is renewed in time, again and again: of 20 new connections a second none fails, and
    each is served a certificate for its name that has not expired.

    Mutation: renew at notAfter, or remove the old Secret before the new one is written.
    """
    hosts = [f"app{number}.{suffix}" for number in range(certificates)]
    with site.application():
        for number, host in enumerate(hosts):
            site.ingress(f"app{number}", [([host], f"app{number}")])
            site.certificate(f"app{number}", [host], issuer, profile="shortlived")
        for number, host in enumerate(hosts):
            site.ready(f"app{number}")
            wait_for(lambda host=host: host in site.served(host).names, f"Traefik serves {host}")  # type: ignore[misc]
        start, begun = size(controller.pid), time.monotonic()
        traffic = [Traffic(site, host) for host in hosts]
        for each in traffic:
            each.__enter__()
        try:
            time.sleep(seconds)
            wait_for(lambda: all(len(each.serials) >= 3 for each in traffic), "two renewals of each", timeout=30)
        finally:
            for each in traffic:
                each.__exit__()
        took, end = time.monotonic() - begun, size(controller.pid)
        assert site.request(hosts[0], lab.acme.root_pem()) == "hello from web\n"

    print(f"\n{took:.0f} s; controller: {start[0]:.1f} -> {end[0]:.1f} MiB, {start[1]} -> {end[1]} threads")
    for each in traffic:
        served = [(look.time, look.served) for look in each.looks if look.served]
        lives: dict[str, list[float]] = defaultdict(list)
        for moment, what in served:
            lives[what.serial].append(what.not_after - moment)
        least = min(map(min, lives.values()))
        print(f"{each.host}: {len(each.looks)} connections, {len(lives)} serials, least life left {least:.1f} s")
        for serial, left in lives.items():
            print(f"  {serial}: {len(left)} connections, {max(left):.0f} to {min(left):.0f} s left")
        assert [look.failure for look in each.looks if look.failure] == []
        assert {what.names for _, what in served} == {(each.host,)}  # Traefik's own default certificate is for another
        assert least > 0
        assert len(lives) >= 3
        # As many were made as the summary says, or the renewal was not looked at.
        assert len(served) > RATE * seconds / 2
    if certificates > 1:
        assert end[1] <= start[1] + 8
        assert end[0] <= start[0] * 1.2
    site.nothing_left()
