"""The ACME transport against a server that misbehaves, and its pure parts."""

from __future__ import annotations

import inspect
import socket
import ssl
import threading
import time
from datetime import timedelta
from email.utils import format_datetime
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest
import urllib3.exceptions
from hypothesis import given
from hypothesis import strategies as st

from certbotk8s import __version__
from certbotk8s.ca.transport import BODY_LIMIT, RETRY_AFTER_LIMIT, Answer, Transport, address, retry_after, told
from certbotk8s.domain.addresses import Egress
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.domain.reasons import Reason
from tests.fakes.acme_server import AcmeServer, Reply
from tests.fakes.clock import START, FakeClock
from tests.lab.pki import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AcmeServer]:
    with AcmeServer(Authority(tmp_path)) as running:
        yield running


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def transport(server: AcmeServer, clock: FakeClock) -> Transport:
    return Transport(server.ca_bundle, clock, Egress())


def get(transport: Transport, url: str, seconds: float = 5.0) -> Answer:
    target = address(url)
    assert target
    return transport.request("GET", target, seconds=seconds)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://ca.test/dir", "https://ca.test:443"),
        ("https://ca.test:443/dir", "https://ca.test:443"),
        ("https://CA.test:8443/dir?x=%2F&y=a:b@c", "https://ca.test:8443"),
        ("HTTPS://ca.test", "https://ca.test:443"),
        ("https://[::1]:14000/dir", "https://[::1]:14000"),
        ("http://ca.test/dir", None),
        ("https://user@ca.test/dir", None),
        ("https://ca.test@evil.test/", None),
        ("https://ca.test\\@evil.test/", None),
        ("https://ca.test#@evil.test/", None),
        ("https://ca.test/ x", None),
        ("https://ca.test/\r\nHost: evil.test", None),
        ("https://ca.test/a\n", None),
        ("https://ca.test:99999/", None),
        ("https:///dir", None),
        ("https://münchen.test/", None),
        ("//ca.test/dir", None),
        ("/dir", None),
        ("", None),
        ("https://ca.test/" + "a" * 3000, None),
    ],
)
def test_only_plain_https_urls_are_addresses(url: str, origin: str | None) -> None:
    """A URL is asked only when it is https and leaves no doubt about its host; hosts are compared with their ports.

    Mutation: allow "@" or "#" in front of the path, or http.
    """
    found = address(url)
    assert (found.origin if found else None) == origin


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120),
        (" 0 ", 0),
        ("-5", 0),
        ("1.5", 1.5),
        ("999999999999", 86400),
        (format_datetime(START + timedelta(minutes=5), usegmt=True), 300),
        ("Fri, 20 Nov 2026 14:30:00 +0500", 1800),
        ("Fri, 20 Nov 2026 09:10:00 -0000", 600),
        (format_datetime(START - timedelta(days=1), usegmt=True), 0),
        (format_datetime(START + timedelta(days=9), usegmt=True), 86400),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("1e400", None),
        ("9" * 5000, None),
        ("120, 120", None),
        ("Fri, 99 Nov 2026 09:00:00 GMT", None),
    ],
)
def test_retry_after_in_both_forms(value: str, seconds: float | None) -> None:
    """Seconds and dates come out as a length of time between nothing and a day, whatever the zone of the date.

    Mutation: take the date as local time, or leave out the clamp.
    """
    found = retry_after(value, START)
    assert (found.total_seconds() if found is not None else None) == seconds


def test_dates_do_not_depend_on_the_hosts_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A date without a zone is UTC, wherever the controller runs.

    Mutation: take a date without a zone as local time.
    """
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "America/New_York")
        time.tzset()
        found = retry_after("Fri, 20 Nov 2026 09:10:00 -0000", START)
    time.tzset()
    assert found == timedelta(minutes=10)


@given(st.text() | st.from_regex(r"[A-Z][a-z]{2}, \d+ [A-Z][a-z]{2} \d+ \d+:\d+:\d+ [+-]?\w+"))
def test_retry_after_takes_anything(value: str) -> None:
    """No header value raises, or comes out beyond a day.

    Mutation: let ValueError or OverflowError of the date parser pass.
    """
    found = retry_after(value, START)
    assert found is None or timedelta(0) <= found <= RETRY_AFTER_LIMIT


def library_errors() -> list[type[Exception]]:
    classes = [one for _, one in inspect.getmembers(urllib3.exceptions, inspect.isclass)]
    own = [one for one in classes if one.__module__ == urllib3.exceptions.__name__]
    return [one for one in own if issubclass(one, Exception) and not issubclass(one, Warning)]


@pytest.mark.parametrize("kind", [*library_errors(), OSError, TimeoutError, ssl.SSLError, ConnectionResetError])
def test_every_error_of_the_library_is_told(kind: type[Exception]) -> None:
    """Each exception class of urllib3, and what ssl and sockets raise, becomes a TemporaryError that names the host.

    Mutation: drop ProxySchemeUnsupported or HTTPError from the table.
    """
    error = kind.__new__(kind)
    with pytest.raises(TemporaryError) as caught, told("https://ca.test:443", 30):
        raise error
    assert "https://ca.test:443" in str(caught.value)
    assert kind.__name__ not in str(caught.value)
    assert "{" not in str(caught.value)


def test_other_errors_pass() -> None:
    """What is no trouble of the connection is not taken for one.

    Mutation: catch Exception.
    """
    with pytest.raises(ZeroDivisionError), told("https://ca.test:443", 30):
        raise ZeroDivisionError


def test_a_refused_connection_is_told_with_its_cause(clock: FakeClock) -> None:
    """Where nobody listens, the sentence has the host and the system's word for it.

    Mutation: leave out the text of the OSError.
    """
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(TemporaryError, match=r"127\.0\.0\.1:\d+: .*Connection refused"):
            get(Transport(b"", clock, Egress()), f"https://127.0.0.1:{held.getsockname()[1]}/")


def test_an_unknown_root_is_told_with_the_ca_bundle(server: AcmeServer, clock: FakeClock) -> None:
    """Without the bundle the server is not trusted, nothing is sent to it, and the sentence says what to do.

    Mutation: make the connections without verification.
    """
    with pytest.raises(TemporaryError, match=r"spec\.acme\.caBundle"):
        get(Transport(b"", clock, Egress()), server.origin + "/x")
    assert server.requests == []


def test_a_certificate_for_another_host_is_refused(server: AcmeServer, transport: Transport) -> None:
    """A trusted certificate for another name does not do, and the sentence points to the server's name.

    Mutation: switch check_hostname off.
    """
    url = server.origin.replace("127.0.0.1", "localhost")
    with pytest.raises(TemporaryError, match=r"spec\.acme\.server"):
        get(transport, url + "/x")
    assert server.requests == []


@pytest.mark.parametrize(
    "bundle",
    [b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"\xff\xfe\x00"],
)
def test_a_bundle_without_a_certificate_is_refused(bundle: bytes, clock: FakeClock) -> None:
    """A caBundle that holds no certificate is a fault of the issuer's spec, not silence.

    Mutation: fall back to the system's roots.
    """
    with pytest.raises(PermanentError) as caught:
        Transport(bundle, clock, Egress())
    assert caught.value.reason is Reason.CA_BUNDLE_INVALID


def test_a_bundle_may_hold_comments(server: AcmeServer, clock: FakeClock) -> None:
    """Comments in UTF-8 around the certificates, as in public bundles, do no harm.

    Mutation: decode the bundle strictly as ASCII.
    """
    server.script["/x"] = [Reply(body={"a": 1})]
    bundle = "# Wurzel für Prüfzwecke\n".encode() + server.ca_bundle
    assert get(Transport(bundle, clock, Egress()), server.origin + "/x").status == 200


def test_a_silent_server_is_given_up(server: AcmeServer, transport: Transport) -> None:
    """No answer within the read timeout is temporary, and the sentence says how long was waited.

    Mutation: leave out the timeout.
    """
    gone = threading.Event()

    def silence() -> Iterator[bytes]:
        gone.wait(30)
        yield b""

    server.script["/x"] = [Reply(chunks=silence)]
    try:
        with pytest.raises(TemporaryError, match=r"no answer within 0 s"):
            get(transport, server.origin + "/x", seconds=0.2)
    finally:
        gone.set()


def test_a_dripping_server_is_given_up(server: AcmeServer, transport: Transport, clock: FakeClock) -> None:
    """A server that sends a byte now and then, for ever, is given up when the time for the whole answer has passed.

    Mutation: leave out the deadline of the body.
    """

    def drip() -> Iterator[bytes]:
        while True:
            clock.advance(9)
            yield b"x"

    server.script["/x"] = [Reply(chunks=drip)]
    with pytest.raises(TemporaryError, match="no answer within"):
        get(transport, server.origin + "/x", seconds=30)


def test_too_large_an_answer_is_refused(server: AcmeServer, transport: Transport) -> None:
    """An answer of more than a mebibyte is not read to its end, with or without a Content-Length.

    Mutation: read the whole body at once.
    """
    sent = []

    def endless() -> Iterator[bytes]:
        while True:
            sent.append(1)
            yield b"x" * 65536

    server.script["/x"] = [Reply(body=b"x" * (BODY_LIMIT + 1))]
    server.script["/y"] = [Reply(chunks=endless)]
    server.script["/z"] = [Reply(body=b"x" * BODY_LIMIT)]
    for path in ("/x", "/y"):
        with pytest.raises(TemporaryError, match="more than 1048576 bytes"):
            get(transport, server.origin + path)
    assert len(get(transport, server.origin + "/z").body) == BODY_LIMIT


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_whole_http_answer_is_temporary(server: AcmeServer, transport: Transport, raw: bytes) -> None:
    """An answer that breaks off, is no HTTP or has too many headers is never taken for one.

    Mutation: leave out enforcement of Content-Length.
    """
    server.script["/x"] = [Reply(raw=raw)]
    with pytest.raises(TemporaryError, match=r"^No answer from the CA's server https://127"):
        get(transport, server.origin + "/x")


def test_redirects_are_not_followed(server: AcmeServer, transport: Transport) -> None:
    """A redirect is an answer like others: its target is not asked.

    Mutation: redirect=True with the library's own number of retries.
    """
    server.script["/x"] = [Reply(307, headers={"Location": server.origin + "/y"})]
    assert get(transport, server.origin + "/x").status == 307
    assert server.paths() == ["/x"]


def test_what_a_request_carries(server: AcmeServer, transport: Transport) -> None:
    """Requests name the product and its version, and a POST has the type that RFC 8555 section 6.2 demands.

    Mutation: leave out the User-Agent or the Content-Type.
    """
    target = address(server.origin + "/x")
    assert target
    server.script["/x"] = [Reply()]
    transport.request("POST", target, body=b"{}")
    headers = server.requests[0].headers
    assert headers["User-Agent"] == f"certbotk8s/{__version__}"
    assert headers["Content-Type"] == "application/jose+json"


def test_one_connection_serves_many_requests(server: AcmeServer, transport: Transport) -> None:
    """Requests one after the other go over one connection, error answers and empty ones too.

    Mutation: leave the rest of an answer unread.
    """
    server.script["/x"] = [Reply(200, {"a": 1}), Reply(500, b"<html>"), Reply(204), Reply(200, {"a": 1})]
    target = address(server.origin + "/x")
    assert target
    for method in ("GET", "POST", "GET", "GET", "HEAD", "GET"):
        transport.request(method, target)
    assert len(server.connections) == 1


# --- where a name leads -----------------------------------------------------------------------------------------------


def leads_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Lets the name ca.test lead to these; the list of names that were resolved."""
    resolved = []
    ask = socket.getaddrinfo

    def answer(host: str, port: int, *more: object, **named: object) -> list[object]:
        if host != "ca.test":
            return list(ask(host, port, type=socket.SOCK_STREAM))
        resolved.append(host)
        return [entry for each in addresses for entry in ask(each, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return resolved


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("169.254.169.254", "it is link-local"),
        ("::ffff:169.254.169.254", "it is link-local"),
        ("10.96.0.10", "it is a Service of this cluster"),
    ],
)
def test_no_issuer_leads_to_where_only_the_cluster_may_go(
    monkeypatch: pytest.MonkeyPatch, clock: FakeClock, address: str, why: str
) -> None:
    """A name that leads to a cloud's metadata or a Service is not connected to, and the sentence says how to allow it.

    Mutation: connect without looking at the address.
    """
    egress = Egress()
    egress.cluster = (ip_network("10.96.0.0/12"),)
    leads_to(monkeypatch, address)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it was connected to"))
    with pytest.raises(TemporaryError, match=f"{why}. If that is meant, allow it with --allow-addresses"):
        get(Transport(b"", clock, egress), "https://ca.test/dir")


def test_an_address_that_is_allowed_is_asked(
    monkeypatch: pytest.MonkeyPatch, server: AcmeServer, clock: FakeClock
) -> None:
    """A CA that runs as a Service of the cluster is reached where the administrator allows its network, and of several
    addresses the one that may be asked; the certificate is checked for the name all the same, which is resolved once.

    Mutation: look at the first address alone.
    """
    egress = Egress(["127.0.0.0/8"])
    egress.cluster = (ip_network("127.0.0.0/8"),)
    resolved = leads_to(monkeypatch, "169.254.169.254", "127.0.0.1")
    with pytest.raises(TemporaryError, match=r"Hostname mismatch, certificate is not valid for 'ca\.test'"):
        get(Transport(server.ca_bundle, clock, egress), server.origin.replace("127.0.0.1", "ca.test") + "/dir")
    assert resolved == ["ca.test"]
