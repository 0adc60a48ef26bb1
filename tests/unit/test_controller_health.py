"""/livez, /readyz and /metrics."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from certbotk8s.controller.health import Health

SECONDS = 20.0


class Probed:
    """A health server and what it is to say."""

    def __init__(self, listen: str = "127.0.0.1:0") -> None:
        self.sick = ""
        self.unready = "ingresses are not read yet"
        registry = CollectorRegistry()
        Counter("looks", "Looks.", registry=registry).inc()
        self.health = Health(listen, sick=lambda: self.sick, unready=lambda: self.unready, registry=registry)
        self.health.start()

    def get(self, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
        connection = http.client.HTTPConnection(host, self.health.port, timeout=SECONDS)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


@pytest.fixture
def probed() -> Iterator[Probed]:
    one = Probed()
    yield one
    one.health.stop()


def test_verdicts(probed: Probed) -> None:
    """A probe gets 200, or 503 with the reason, as things stand now. (Break: ask once at the start.)"""
    assert probed.get("/livez") == (200, "ok\n")
    assert probed.get("/readyz") == (503, "ingresses are not read yet\n")
    probed.unready, probed.sick = "", "Certificate shop/web has been at work for 301 s"
    assert probed.get("/readyz?verbose") == (200, "ok\n")
    assert probed.get("/livez") == (503, "Certificate shop/web has been at work for 301 s\n")


def test_metrics(probed: Probed) -> None:
    """/metrics is what Prometheus reads; anything else is not there. (Break: serve metrics everywhere.)"""
    code, text = probed.get("/metrics")
    assert code == 200
    assert "looks_total 1.0" in text
    assert probed.get("/")[0] == 404
    assert probed.get("/debug/pprof")[0] == 404


def test_silent_connections_do_not_shut_probes_out(probed: Probed) -> None:
    """However many connections say nothing, a probe gets its answer. (Break: refuse the newest connection.)"""
    silent = [socket.create_connection(("127.0.0.1", probed.health.port)) for _ in range(40)]
    assert probed.get("/livez") == (200, "ok\n")
    assert sum(thread.name.startswith("Thread-") for thread in threading.enumerate()) < 100
    for one in silent:
        one.close()


def test_long_requests_are_refused(probed: Probed) -> None:
    """A request line without an end is answered, not collected. (Break: read until the end of the line.)"""
    with socket.create_connection(("127.0.0.1", probed.health.port), SECONDS) as connection:
        connection.sendall(b"GET /" + b"x" * 70_000)
        assert b" 414 " in connection.recv(1000)


def test_ipv6() -> None:
    """A listen address in brackets is IPv6. (Break: leave the address family alone.)"""
    probed = Probed("[::1]:0")
    assert probed.get("/livez", "::1") == (200, "ok\n")
    probed.health.stop()
