"""The HTTP server for challenges: what it answers, and what nobody can do to it."""

from __future__ import annotations

import http.client
import logging
import re
import socket
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import http01_responder
from solvers.http01_responder import Answer, Responder

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = "tok_en-0".ljust(43, "t")
ANSWER = Answer(f"{TOKEN}.thumbprint", frozenset({"a.example.test", "b.example.test"}))
PATH = f"/.well-known/acme-challenge/{TOKEN}"


def lookup(token: str) -> Answer | None:
    assert re.fullmatch("[A-Za-z0-9_-]{1,128}", token), "what is no token is not looked up"
    if token == "broken":
        raise RuntimeError("a bug in the index")
    return ANSWER if token == TOKEN else None


@pytest.fixture(scope="module")
def running() -> Iterator[int]:
    responder = Responder("127.0.0.1:0", lookup)
    yield responder.start()
    assert responder.is_alive()
    responder.stop()


@pytest.fixture
def port(running: int) -> int:
    return running


@pytest.fixture
def responder() -> Iterator[Responder]:
    """One of this test's own, not yet started."""
    responder = Responder("127.0.0.1:0", lookup)
    yield responder
    responder.stop()


def exchange(port: int, request: bytes, *, timeout: float = 20) -> bytes:
    """Everything that the server says until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        connection.sendall(request)
        said = b""
        while part := connection.recv(65536):
            said += part
        return said


def get(
    port: int, path: str, host: str = "a.example.test", method: str = "GET"
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers={"Host": host})
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def is_served(connection: socket.socket) -> bool:
    """Whether a request on that connection is answered."""
    try:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    except ConnectionError:
        return False


def test_a_pending_token_is_answered_as_text(port: int) -> None:
    """Exactly the key authorization, as text that no browser takes for more; fails with any byte added."""
    status, body, headers = get(port, PATH)
    assert (status, body) == (200, ANSWER.key_authorization.encode())
    assert headers["Content-Type"].startswith("text/plain")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("target", [f"{PATH}?x=y", f"http://a.example.test{PATH}", f"http://a.example.test:80{PATH}?x"])
def test_a_query_or_an_absolute_target_changes_nothing(port: int, target: str) -> None:
    """RFC 9112 section 3.2.2 wants both forms served; fails when the target is compared as it is."""
    said = exchange(port, f"GET {target} HTTP/1.1\r\nHost: a.example.test\r\nConnection: close\r\n\r\n".encode())
    assert said.endswith(b"\r\n\r\n" + ANSWER.key_authorization.encode())


@pytest.mark.parametrize("path", ["/", "/healthz"])
def test_load_balancers_are_answered(port: int, path: str) -> None:
    """They ask for `/` or `/healthz` and want 200; fails when only challenges are served."""
    assert get(port, path)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/x",
        "/.well-known/acme-challenge/",
        "/.well-known/acme-challenge",
        f"{PATH}/",
        f"{PATH}x",
        f"/x{PATH}",
        f"{PATH[:-1]}",
        f"/.well-known/acme-challenge/../{TOKEN}",
        f"/.well-known//acme-challenge/{TOKEN}",
        "/.well-known/acme-challenge/" + "t" * 129,
        f"/.well-known/acme-challenge/%74{TOKEN[1:]}",
        "*",
    ],
)
def test_anything_else_is_404(port: int, path: str) -> None:
    """Only the exact path of a pending token has an answer; fails when a prefix is enough, or odd text is looked up."""
    assert get(port, path)[:2] == (404, b"not found\n")


def test_head_is_get_without_a_body(port: int) -> None:
    """RFC 9110 section 9.3.2; fails when HEAD is refused, or followed by a body."""
    said = exchange(port, f"HEAD {PATH} HTTP/1.1\r\nHost: a.example.test\r\nConnection: close\r\n\r\n".encode())
    assert said.startswith(b"HTTP/1.1 200 ")
    assert f"\r\nContent-Length: {len(ANSWER.key_authorization)}\r\n".encode() in said
    assert said.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "CONNECT"])
def test_other_methods_are_refused_and_the_connection_closed(port: int, method: str) -> None:
    """Their body is never read; fails when the connection stays open and the body is taken for a request."""
    inner = f"GET {PATH} HTTP/1.1\r\n\r\n"
    said = exchange(port, f"{method} {PATH} HTTP/1.1\r\nContent-Length: {len(inner)}\r\n\r\n{inner}".encode())
    assert said.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nAllow: GET, HEAD\r\n" in said
    assert said.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("header", ["Content-Length: 40", "Transfer-Encoding: chunked", "content-length : 40"])
def test_a_body_is_no_second_request(port: int, header: str) -> None:
    """What follows a GET with a body is dropped; fails when it is answered as a request of its own."""
    said = exchange(port, f"GET / HTTP/1.1\r\n{header}\r\n\r\nGET {PATH} HTTP/1.1\r\n\r\n".encode())
    assert said.count(b"HTTP/1.1 ") == 1


def test_a_connection_serves_many_requests(port: int) -> None:
    """Ingress controllers keep connections, and may send the next request at once; fails when one is lost or mixed."""
    first = f"GET {PATH} HTTP/1.1\r\nHost: a.example.test\r\n\r\n"
    last = "GET /x HTTP/1.1\r\nHost: a.example.test\r\nConnection: close\r\n\r\n"
    said = exchange(port, (first * 3 + last).encode())
    assert [int(part[:3]) for part in said.split(b"HTTP/1.1 ")[1:]] == [200, 200, 200, 404]


def test_http_1_0_is_answered_and_closed(port: int) -> None:
    """nginx speaks it to its backends; fails when the connection stays open."""
    assert exchange(port, f"GET {PATH} HTTP/1.0\r\n\r\n".encode()).endswith(ANSWER.key_authorization.encode())


def test_a_request_may_come_in_pieces(port: int) -> None:
    """TCP has no messages; fails when a request must come in one read."""
    request = f"GET {PATH} HTTP/1.1\r\nHost: a.example.test\r\nConnection: close\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in range(len(request)):
            connection.sendall(request[byte : byte + 1])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_too_large_a_request_is_refused(port: int) -> None:
    """Nobody fills the memory with headers; fails without the limit, with or without an end of the headers."""
    endless = b"GET / HTTP/1.1\r\nX: " + b"y" * 8192
    assert exchange(port, endless).startswith(b"HTTP/1.1 431 ")
    assert exchange(port, endless + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")


@settings(max_examples=50)
@given(st.binary(min_size=1, max_size=300))
def test_noise_gets_400_or_nothing(running: int, noise: bytes) -> None:
    """Whatever arrives, the next request is answered; fails when an odd byte raises in the event loop."""
    said = exchange(running, noise + b"\r\n\r\nGET /x HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert said[:12] in {b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 405"}


def test_a_failing_lookup_costs_its_own_connection_alone(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """The server outlives a bug behind it; fails when the exception ends the event loop."""
    with caplog.at_level(logging.CRITICAL, "asyncio"):
        assert exchange(port, b"GET /.well-known/acme-challenge/broken HTTP/1.1\r\n\r\n") == b""
    assert get(port, PATH)[0] == 200


class TestHost:
    """The token decides; a foreign Host is answered, and noted."""

    def notes(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        return [record.getMessage() for record in caplog.records]

    @pytest.mark.parametrize("host", ["a.example.test", "A.Example.Test", "b.example.test.", "a.example.test:18080"])
    def test_a_name_of_the_order_is_nothing_to_note(
        self, port: int, caplog: pytest.LogCaptureFixture, host: str
    ) -> None:
        """Case, port and trailing dot do not matter; fails when one of them is kept."""
        with caplog.at_level(logging.INFO):
            assert get(port, PATH, host)[0] == 200
        assert self.notes(caplog) == []

    def test_another_is_answered_and_noted_once(self, responder: Responder, caplog: pytest.LogCaptureFixture) -> None:
        """www may lead to the apex; fails when it is refused, or noted at each request."""
        port = responder.start()
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                assert get(port, PATH, "www.example.test")[:2] == (200, ANSWER.key_authorization.encode())
        assert self.notes(caplog) == [
            "The challenge of an order for a.example.test and b.example.test was asked for under a Host "
            "www.example.test and answered: a redirect leads there, or the ingress controller does not keep the Host."
        ]

    def test_nobody_fills_the_log(self, responder: Responder, caplog: pytest.LogCaptureFixture) -> None:
        """A few hosts per token are noted, and none word for word that is no name; fails without either limit."""
        port = responder.start()
        with caplog.at_level(logging.INFO):
            for number in range(50):
                get(port, PATH, f"<script>{number}")
                get(port, PATH, f"h{number}.example.test")
        assert len(self.notes(caplog)) == 8
        assert "script" not in " ".join(self.notes(caplog))


class TestLimits:
    """Slow, silent and numerous clients."""

    def test_a_slow_request_is_cut_off(self, responder: Responder, monkeypatch: pytest.MonkeyPatch) -> None:
        """Half a request holds a connection for seconds only; fails without the timer."""
        monkeypatch.setattr(http01_responder, "_REQUEST_SECONDS", 0.1)
        assert exchange(responder.start(), b"GET / HTTP/1.1\r\nX: ") == b""

    def test_a_silent_connection_is_cut_off(self, responder: Responder, monkeypatch: pytest.MonkeyPatch) -> None:
        """So does one that never says anything; fails when the time begins with the first byte."""
        monkeypatch.setattr(http01_responder, "_REQUEST_SECONDS", 0.1)
        assert exchange(responder.start(), b"") == b""

    def test_an_idle_connection_is_kept(self, responder: Responder, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between requests an ingress controller may take its time; fails when the limit of a request applies."""
        monkeypatch.setattr(http01_responder, "_REQUEST_SECONDS", 0.05)
        connection = http.client.HTTPConnection("127.0.0.1", responder.start(), timeout=20)
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"ok\n"
        kept = connection.sock
        kept.settimeout(0.3)
        with pytest.raises(TimeoutError):
            kept.recv(1)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        assert connection.sock is kept
        connection.close()

    def test_too_many_connections_cost_the_most_silent_one(
        self, responder: Responder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Holding connections locks nobody out; fails when the newest is refused instead, or none is."""
        monkeypatch.setattr(http01_responder, "_MAX_CONNECTIONS", 3)
        port = responder.start()
        held = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(3)]
        for connection in (*held, held[0]):
            assert is_served(connection)
        assert get(port, PATH)[0] == 200
        assert [is_served(connection) for connection in held] == [True, False, True]
        for connection in held:
            connection.close()

    def test_who_does_not_read_is_dropped(self, responder: Responder, monkeypatch: pytest.MonkeyPatch) -> None:
        """Answers do not pile up in memory; fails when writing is not limited."""
        monkeypatch.setattr(http01_responder, "_REQUEST_SECONDS", 600.0)
        port = responder.start()
        request = f"GET {PATH} HTTP/1.1\r\n\r\n".encode() * 100
        with socket.create_connection(("127.0.0.1", port), 20) as connection, pytest.raises(ConnectionError):
            connection.sendall(request * 10_000)
        assert get(port, PATH)[0] == 200


class TestLife:
    """Start and stop."""

    def test_stop_closes_everything(self, responder: Responder) -> None:
        """After stop nothing listens and no connection is left; fails when connections are waited for."""
        port = responder.start()
        with socket.create_connection(("127.0.0.1", port), 20) as connection:
            assert is_served(connection)
            responder.stop()
            assert not responder.is_alive()
            assert not is_served(connection)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 20)

    def test_a_taken_address_is_said_at_start(self, port: int) -> None:
        """main must not go on without it; fails when the error stays in the thread."""
        with pytest.raises(OSError, match="in use"):
            Responder(f"127.0.0.1:{port}", lookup).start()

    def test_ipv6(self) -> None:
        """`[::1]:port` listens there; fails when the brackets stay."""
        responder = Responder("[::1]:0", lookup)
        port = responder.start()
        with socket.create_connection(("::1", port), 20) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        responder.stop()


# --- what a replica does not know, the leader may ---------------------------------------------------------------------

FRESH = "fresh".ljust(43, "f")
FRESH_PATH = f"/.well-known/acme-challenge/{FRESH}"
FRESH_ANSWER = Answer(f"{FRESH}.{'h' * 43}", frozenset({"c.example.test"}))


class Replicas:
    """A leader that knows one token more, and a standby that asks it; each counts what it looked up."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.address = ""
        self.leader = Responder("127.0.0.1:0", self.look, leader=lambda: self.address)
        self.standby = Responder("127.0.0.1:0", lookup, leader=lambda: self.address)
        self.address = f"127.0.0.1:{self.leader.start()}"
        self.port = self.standby.start()

    def look(self, token: str) -> Answer | None:
        self.asked.append(token)
        return FRESH_ANSWER if token == FRESH else None

    def close(self) -> None:
        self.standby.stop()
        self.leader.stop()


@pytest.fixture
def replicas() -> Iterator[Replicas]:
    two = Replicas()
    yield two
    two.close()


def test_a_token_that_only_the_leader_knows_is_answered(replicas: Replicas) -> None:
    """A replica whose cache lags asks the leader before it says 404, also for HEAD; what it knows it answers itself.

    Mutation: answer 404 at once.
    """
    assert get(replicas.port, FRESH_PATH)[:2] == (200, FRESH_ANSWER.key_authorization.encode())
    assert get(replicas.port, FRESH_PATH, method="HEAD")[:2] == (200, b"")
    assert replicas.asked == [FRESH, FRESH]
    assert get(replicas.port, PATH)[0] == 200
    assert replicas.asked == [FRESH, FRESH]


def test_the_leader_is_asked_once_and_only_for_tokens(replicas: Replicas) -> None:
    """Unknown to the leader too, it is 404, and no replica asks in a circle; what is no token is not passed on.

    Mutation: pass on what a replica asked.
    """
    assert get(replicas.port, f"{FRESH_PATH}x")[:2] == (404, b"not found\n")
    assert replicas.asked == [f"{FRESH}x"]
    for path in ("/x", "/.well-known/acme-challenge/", f"{FRESH_PATH}/y"):
        assert get(replicas.port, path)[0] == 404
    assert replicas.asked == [f"{FRESH}x"]


def test_answers_keep_their_order_while_the_leader_is_asked(replicas: Replicas) -> None:
    """Of several requests sent at once on one connection, each gets its own answer, in turn.

    Mutation: go on with the next request while an answer is looked for.
    """
    request = "GET {} HTTP/1.1\r\nHost: c.example.test\r\n{}\r\n"
    said = exchange(
        replicas.port,
        (
            request.format(FRESH_PATH, "") + request.format(PATH, "") + request.format("/", "Connection: close\r\n")
        ).encode(),
    )
    bodies = [part.partition(b"\r\n\r\n")[2] for part in said.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert bodies == [FRESH_ANSWER.key_authorization.encode(), ANSWER.key_authorization.encode(), b"ok\n"]


@pytest.mark.parametrize("trouble", ["nobody listens", "silence", "another token", "nonsense"])
def test_a_leader_in_trouble_costs_a_moment(trouble: str) -> None:
    """A leader that is gone, is silent or answers something else means 404; the replica goes on serving others.

    Mutation: wait for the leader without a limit; take any answer.
    """
    said = {
        "another token": b"HTTP/1.1 200 OK\r\n\r\n" + f"{TOKEN}.{'h' * 43}".encode(),
        "nonsense": b"HTTP/1.1 200 OK\r\n\r\n" + FRESH.encode() + b".<script>",
    }
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        if trouble == "nobody listens":
            listener.close()
        standby = Responder("127.0.0.1:0", lookup, leader=lambda: address)
        port = standby.start()
        try:
            with socket.create_connection(("127.0.0.1", port), 20) as connection:
                connection.sendall(f"GET {FRESH_PATH} HTTP/1.1\r\n\r\n".encode())
                if trouble in said:
                    other, _ = listener.accept()
                    other.recv(4096)
                    other.sendall(said[trouble])
                    other.close()
                assert get(port, PATH)[0] == 200
                assert connection.recv(4096).startswith(b"HTTP/1.1 404 ")
        finally:
            standby.stop()


def test_a_flood_of_wrong_tokens_does_not_reach_the_leader(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader is asked a few times in a second, whoever asks how often.

    Mutation: ask for every request.
    """
    monkeypatch.setattr(http01_responder, "_ASKS", 3)
    for number in range(40):
        assert get(replicas.port, f"{FRESH_PATH}{number}")[0] == 404
    assert len(replicas.asked) < 30
