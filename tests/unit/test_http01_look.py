"""The look from here that precedes the CA's: what it finds, what it says, and what it never does."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certbotk8s.clock import SystemClock
from certbotk8s.domain.api import INGRESS, INGRESS_CLASS, Http01Spec, IngressSolverSpec, SolverSpec
from certbotk8s.ports import SolverContext
from solvers.http01_ingress import IngressSolver
from tests.contract.test_solver_contract import presentation
from tests.fakes.clock import FakeClock
from tests.fakes.cluster import ApiServer, FakeCluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from certbotk8s.ports import Clock

HOST = "shop.example.test"
SPEC = SolverSpec(http01=Http01Spec(ingress=IngressSolverSpec(ingress_class_name="nginx")))
SHOWN = presentation("0a1b", HOST, spec=SPEC)
CHALLENGE = SHOWN.challenges[0]
PATH = f"/.well-known/acme-challenge/{CHALLENGE.token}"


def reply(status: int = 200, body: str = CHALLENGE.key_authorization, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} words", f"Content-Length: {len(body)}", *headers, "", body]
    return "\r\n".join(lines).encode()


_TLS = b"\x16"  # the first byte of a TLS handshake


class NameServer:
    """A DNS server on loopback: addresses by name; none of a name is NXDOMAIN, None is SERVFAIL. A context."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str] | None] = {}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.where = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> NameServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            wire, client = self._socket.recvfrom(4096)
            if not wire:
                return
            query = dns.message.from_wire(wire)
            response = dns.message.make_response(query)
            question = query.question[0]
            known = self.addresses.get(question.name.to_text(omit_final_dot=True), [])
            if known is None:
                response.set_rcode(dns.rcode.SERVFAIL)
            elif not known:
                response.set_rcode(dns.rcode.NXDOMAIN)
            else:
                version = 6 if question.rdtype == dns.rdatatype.AAAA else 4
                fit = [each for each in known if ipaddress.ip_address(each).version == version]
                if fit:
                    response.answer.append(dns.rrset.from_text(question.name, 0, "IN", question.rdtype, *fit))
            self._socket.sendto(response.to_wire(), client)


class WebServer:
    """A TCP server on loopback that answers each connection with the next of `replies`, the last one for ever."""

    def __init__(self, *replies: bytes, tls: ssl.SSLContext | None = None) -> None:
        self.replies = list(replies)
        self.requests: list[bytes] = []
        self._tls = tls
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._socket.accept()
            except OSError:
                return
            with plain, contextlib.suppress(OSError):
                connection = self._tls.wrap_socket(plain, server_side=True) if self._tls else plain
                with connection:
                    request = b""
                    while (
                        not request.startswith(_TLS) and b"\r\n\r\n" not in request and (part := connection.recv(4096))
                    ):
                        request += part
                    self.requests.append(request)
                    connection.sendall(self.replies.pop(0) if len(self.replies) > 1 else self.replies[0])


class Network:
    """Where the look's connections really go: each is noted, and led to the server that stands for its port."""

    def __init__(self) -> None:
        self.ports: dict[int, int] = {}
        self.refusing: set[str] = set()
        self.connections: list[tuple[str, int]] = []

    def connect(self, address: tuple[str, int], timeout: float) -> socket.socket:
        self.connections.append(address)
        host, port = address
        if host in self.refusing or port not in self.ports:
            raise ConnectionRefusedError(111, "Connection refused")
        connection = socket.socket()
        connection.settimeout(timeout)
        connection.connect(("127.0.0.1", self.ports[port]))
        return connection


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr(socket, "create_connection", network.connect)
    return network


@pytest.fixture(scope="module")
def name_server() -> Iterator[NameServer]:
    with NameServer() as server:
        yield server


@pytest.fixture
def names(name_server: NameServer) -> dict[str, list[str] | None]:
    """What the DNS server knows."""
    name_server.addresses = {HOST: ["127.0.0.1"]}
    return name_server.addresses


@pytest.fixture
def look(network: Network, names: dict[str, list[str] | None], name_server: NameServer) -> Callable[..., str]:
    """`is_ready` with the Ingress in its place, as the CA's first connection to port 80 would see it."""

    def look(*challenges: Any, clock: Clock | None = None, http01_port: int = 80) -> str:
        cluster = FakeCluster(ApiServer())
        cluster.watch(INGRESS)
        cluster.watch(INGRESS_CLASS)
        context = SolverContext(cluster, clock or SystemClock(), "certbotk8s", http01_port, (name_server.where,))
        solver = IngressSolver(context)
        shown = replace(SHOWN, challenges=challenges) if challenges else SHOWN
        solver.present(shown)
        return solver.is_ready(shown)

    return look


@contextlib.contextmanager
def serving(
    network: Network, *replies: bytes, port: int = 80, tls: ssl.SSLContext | None = None
) -> Iterator[WebServer]:
    with WebServer(*replies, tls=tls) as server:
        network.ports[port] = server.port
        yield server


def test_an_answered_challenge_is_ready(network: Network, look: Callable[..., str]) -> None:
    """It asks as a CA does, Host without the port of HTTP; fails when the Host header carries port 80."""
    with serving(network, reply()) as server:
        assert look() == ""
    head = server.requests[0].decode().split("\r\n")
    assert head[0] == f"GET {PATH} HTTP/1.1"
    assert f"Host: {HOST}" in head


def test_another_http_port_is_in_the_host_header(network: Network, look: Callable[..., str]) -> None:
    """A CA that connects to another port says so; fails when the port is left out."""
    with serving(network, reply(), port=5080) as server:
        assert look(http01_port=5080) == ""
    assert f"\r\nHost: {HOST}:5080\r\n".encode() in server.requests[0]


CHUNKED = f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{len(CHALLENGE.key_authorization):x}\r\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (reply(200, CHALLENGE.key_authorization + " \r\n"), ""),
        (CHUNKED.encode() + CHALLENGE.key_authorization.encode() + b"\r\n0\r\n\r\n", ""),
        (b"HTTP/1.0 200 OK\r\n\r\n" + CHALLENGE.key_authorization.encode(), ""),
        (reply(404, "not found"), f"{HOST} answers 404 at 127.0.0.1"),
        (reply(404), f"{HOST} answers 404 at 127.0.0.1"),
        (
            reply(502, "bad gateway"),
            f"{HOST} answers 502 at 127.0.0.1: the ingress controller does not reach Service certbotk8s-http01",
        ),
        (reply(200, "SECRET page of an application"), f"{HOST} answers something else at 127.0.0.1"),
        (reply(200, ""), f"{HOST} answers something else at 127.0.0.1"),
        (reply(200, " " + CHALLENGE.key_authorization), f"{HOST} answers something else at 127.0.0.1"),
        (reply(200, CHALLENGE.key_authorization + " " * 2000), f"{HOST} answers something else at 127.0.0.1"),
        (reply(200, CHALLENGE.token + ".another-account"), f"{HOST} answers something else at 127.0.0.1"),
        (b"220 mail.example.test ESMTP\r\n", f"{HOST} speaks no HTTP at 127.0.0.1 port 80"),
        (b"", f"{HOST} speaks no HTTP at 127.0.0.1 port 80"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 200_000, f"{HOST} speaks no HTTP at 127.0.0.1 port 80"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000, f"{HOST} speaks no HTTP at 127.0.0.1 port 80"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 5000 + reply(), f"{HOST} speaks no HTTP at 127.0.0.1 port 80"),
    ],
)
def test_what_is_answered_instead_is_told(network: Network, look: Callable[..., str], answer: bytes, said: str) -> None:
    """Exactly the key authorization counts, and no body is repeated; fails when a prefix, or any 200, is enough."""
    with serving(network, answer):
        assert look() == said


def test_the_first_missing_name_is_told(network: Network, look: Callable[..., str], names: dict[str, Any]) -> None:
    """One unanswered name is enough to wait, and ends the look; fails when only the first challenge is looked at."""
    both = presentation("0a1b", HOST, "www.example.test", "api.example.test", spec=SPEC).challenges
    names["www.example.test"] = names["api.example.test"] = ["127.0.0.1"]
    with serving(network, reply(200, both[0].key_authorization), reply(404, "")) as server:
        assert look(*both) == "www.example.test answers 404 at 127.0.0.1"
    assert len(server.requests) == 2


def test_addresses_are_asked_for_once_in_a_few_seconds(
    network: Network, name_server: NameServer, names: dict[str, Any]
) -> None:
    """Looks that follow each other go where the first went; a changed record is seen 5 s later, a missing one at once.

    Mutations: ask for every look; keep what was found for ever; keep that nothing was found.
    """
    cluster, clock = FakeCluster(ApiServer()), FakeClock()
    cluster.watch(INGRESS)
    solver = IngressSolver(SolverContext(cluster, clock, "certbotk8s", 80, (name_server.where,)))
    solver.present(SHOWN)
    with serving(network, reply()):
        for pause, addresses in ((0, []), (0, ["127.0.0.2"]), (4, ["127.0.0.3"]), (1, ["127.0.0.3"])):
            clock.advance(pause)
            names[HOST] = addresses
            solver.is_ready(SHOWN)
    assert [address for address, _ in network.connections] == ["127.0.0.2", "127.0.0.2", "127.0.0.3"]


def test_a_deleted_ingress_is_told(network: Network, name_server: NameServer, names: dict[str, Any]) -> None:
    """Without its Ingress a 404 is no wonder; fails when the look tells the 404 alone."""
    cluster = FakeCluster(ApiServer())
    cluster.watch(INGRESS)
    solver = IngressSolver(SolverContext(cluster, SystemClock(), "certbotk8s", 80, (name_server.where,)))
    solver.present(SHOWN)
    cluster.server.delete(INGRESS, "certbotk8s", "certbotk8s-http01-0a1b")
    with serving(network, reply(404, "")):
        assert solver.is_ready(SHOWN) == "Ingress certbotk8s/certbotk8s-http01-0a1b is gone"


class TestRedirects:
    """A CA follows redirects; so does the look, and no further."""

    @pytest.fixture
    def tls(self, tmp_path: Path) -> ssl.SSLContext:
        """A server's context with an expired, self-signed certificate of another name."""
        return self_signed(tmp_path)

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_to_https_whatever_its_certificate(
        self, network: Network, look: Callable[..., str], tls: ssl.SSLContext, status: int
    ) -> None:
        """There is no good certificate yet; fails when certificates are verified."""
        moved = reply(status, "", f"Location: https://{HOST}{PATH}")
        with serving(network, moved), serving(network, reply(), port=443, tls=tls) as secure:
            assert look() == ""
        assert f"\r\nHost: {HOST}\r\n".encode() in secure.requests[0]

    def test_to_another_name_and_path(self, network: Network, look: Callable[..., str], names: dict[str, Any]) -> None:
        """www to apex is usual; fails when the Host of the first request is kept, or the query dropped."""
        names["example.test"] = ["127.0.0.1"]
        with serving(network, reply(301, "", "Location: http://EXAMPLE.test./x?y=z"), reply()) as server:
            assert look() == ""
        assert server.requests[1].startswith(b"GET /x?y=z HTTP/1.1\r\nHost: example.test\r\n")

    def test_relative(self, network: Network, look: Callable[..., str]) -> None:
        """A Location may be relative (RFC 9110 section 10.2.2); fails when it is taken as a whole URL."""
        with serving(network, reply(301, "", "Location: elsewhere"), reply()) as server:
            assert look() == ""
        assert server.requests[1].startswith(b"GET /.well-known/acme-challenge/elsewhere HTTP/1.1\r\n")

    def test_the_end_of_the_way_is_told(
        self, network: Network, look: Callable[..., str], names: dict[str, Any]
    ) -> None:
        """The reader sees both names; fails when the subject stays the first one."""
        names["www.example.test"] = ["127.0.0.1"]
        with serving(network, reply(301, "", "Location: http://www.example.test/"), reply(404, "")):
            assert look() == f"{HOST}, which redirects to http://www.example.test, answers 404 at 127.0.0.1"

    def test_for_ever(self, network: Network, look: Callable[..., str]) -> None:
        """Ten are followed; fails when the limit is another, or none."""
        with serving(network, reply(301, "", f"Location: {PATH}")) as server:
            assert look() == f"{HOST} redirects more than 10 times"
        assert len(server.requests) == 11

    @pytest.mark.parametrize(
        ("location", "said"),
        [
            ("http://shop.example.test:8080/", "redirects to port 8080; a CA follows to 80 and 443 only"),
            ("https://shop.example.test:6443/", "redirects to port 6443; a CA follows to 80 and 443 only"),
            ("http://169.254.169.254/latest/", "redirects to something that is no web address with a DNS name"),
            ("http://[::1]/", "redirects to something that is no web address with a DNS name"),
            ("ftp://shop.example.test/", "redirects to something that is no web address"),
            ("file:///etc/passwd", "redirects to something that is no web address"),
            ("http://shop.example.test:99999/", "redirects to something that is no web address"),
            ("http://[::1/", "redirects to something that is no web address"),
            ("http://shop.example.test/a b", "redirects to something that is no web address with a DNS name"),
            ("http://shop.example.test/é", "redirects to something that is no web address with a DNS name"),
            (f"http://shop.example.test/{'a' * 3000}", "redirects to something that is no web address with a DNS name"),
        ],
    )
    def test_to_where_no_ca_goes(self, network: Network, look: Callable[..., str], location: str, said: str) -> None:
        """Neither other ports nor other schemes nor bare addresses are followed; fails when one check is missing."""
        with serving(network, reply(301, "", f"Location: {location}"), reply()) as server:
            assert look() == f"{HOST} {said}"
        assert len(server.requests) == 1

    def test_folded_into_the_request(self, network: Network, look: Callable[..., str]) -> None:
        """A Location cannot add lines to the next request; fails when the path goes there unchecked."""
        with serving(network, reply(301, "", "Location: /x\r\n Evil: yes"), reply()) as server:
            look()
        assert all(b"\r\nEvil" not in request and b"\n Evil" not in request for request in server.requests)

    def test_to_any_port_of_a_lab(self, network: Network, look: Callable[..., str], tls: ssl.SSLContext) -> None:
        """Where HTTP has another port, so has HTTPS; fails when the lab's redirects are refused."""
        moved = reply(301, "", f"Location: https://{HOST}:5443{PATH}")
        with serving(network, moved, port=5080), serving(network, reply(), port=5443, tls=tls) as secure:
            assert look(http01_port=5080) == ""
        assert f"\r\nHost: {HOST}:5443\r\n".encode() in secure.requests[0]

    def test_to_https_where_none_is(self, network: Network, look: Callable[..., str]) -> None:
        """Plain HTTP on port 443 is said to be no TLS; fails when TLS errors are not told apart."""
        moved = reply(301, "", f"Location: https://{HOST}{PATH}")
        with serving(network, moved), serving(network, reply(), port=443):
            assert look() == f"{HOST}, which redirects to https://{HOST}, speaks no TLS at 127.0.0.1 port 443"


class TestNames:
    """DNS answers are anybody's word."""

    @pytest.mark.parametrize(
        ("known", "said"),
        [
            ([], f"{HOST} does not exist in the DNS asked from here"),
            (None, f"{HOST} does not resolve here (no usable answer)"),
            (["127.0.0.1"], f"{HOST} refuses the connection at 127.0.0.1 port 80"),
        ],
    )
    def test_what_dns_lacks_is_told(
        self, network: Network, look: Callable[..., str], names: dict[str, Any], known: list[str] | None, said: str
    ) -> None:
        """Each failure has its own words; fails when they are thrown together."""
        names[HOST] = known
        assert look() == said

    @pytest.mark.parametrize(
        ("address", "why"),
        [
            ("169.254.169.254", "it is link-local"),
            ("fe80::1", "it is link-local"),
            ("::ffff:169.254.169.254", "it is link-local"),
            ("fd00:ec2::254", "it is a cloud's own"),
        ],
    )
    def test_addresses_of_machines_and_clouds_are_never_asked(
        self, network: Network, look: Callable[..., str], names: dict[str, Any], address: str, why: str
    ) -> None:
        """No tenant makes the controller ask for credentials; fails when addresses are not looked at."""
        names[HOST] = [address]
        with serving(network, reply()):
            shown = str(ipaddress.ip_address(address))
            assert look() == f"{HOST} points to {shown}, which is never asked: {why}"
        assert network.connections == []

    @pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "192.168.1.1", "fd12::1", "192.0.2.1"])
    def test_addresses_of_clusters_are(
        self, network: Network, look: Callable[..., str], names: dict[str, Any], address: str
    ) -> None:
        """Ingress controllers live on private addresses; fails when these are refused."""
        names[HOST] = [address]
        with serving(network, reply()):
            assert look() == ""
        assert network.connections == [(address, 80)]

    def test_ipv6_first_then_what_is_left(
        self, network: Network, look: Callable[..., str], names: dict[str, Any]
    ) -> None:
        """As CAs do: a refused address is no end while there is another; fails when A is asked for first or alone."""
        names[HOST] = ["192.0.2.1", "fd12::1"]
        network.refusing = {"fd12::1"}
        with serving(network, reply()):
            assert look() == ""
        assert network.connections == [("fd12::1", 80), ("192.0.2.1", 80)]

    def test_only_so_many_addresses_are_tried(
        self, network: Network, look: Callable[..., str], names: dict[str, Any]
    ) -> None:
        """A long answer costs eight connections, not a hundred; fails without the cap."""
        names[HOST] = [f"192.0.2.{number}" for number in range(1, 31)]
        assert "refuses the connection" in look()
        assert len(network.connections) == 8


class Leaping(SystemClock):
    """A clock of which, once there is a connection, every reading is a second after the one before."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._reading = 0.0

    def monotonic(self) -> float:
        self._reading += len(self._network.connections)
        return self._reading


def test_a_slow_answer_ends_the_look(network: Network, look: Callable[..., str]) -> None:
    """The limit is on the whole answer, not on each read; fails when only the socket has a time-out."""
    with serving(network, b"HTTP/1.1 200 OK\r\nX: " + b"y" * 60_000):
        assert look(clock=Leaping(network)) == f"{HOST} does not answer in time at 127.0.0.1 port 80"


def self_signed(folder: Path) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "default")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now - timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    both = folder / "default.pem"
    both.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    return context
