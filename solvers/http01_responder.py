"""The HTTP server that answers the CA's HTTP-01 requests (RFC 8555 section 8.3).

Every replica runs one. Who may ask is everybody, so it is one thread with an event loop: a connection costs a buffer,
not a thread; one that sends its request slowly is cut off, and when too many stand open the one that has been silent
longest goes. Hand-written on `asyncio.Protocol` although the standard library has `http.server`: that one takes a
thread for each connection, and has no limit on the time of a request or on how many stand open.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple, cast

from certbotk8s.domain.names import listing

if TYPE_CHECKING:
    from collections.abc import Callable

CHALLENGE_PATH = "/.well-known/acme-challenge/"
TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")

_MAX_REQUEST = 8192  # bytes of request line and headers
_MAX_CONNECTIONS = 512  # half of the open files that a container gets where nobody raised the limit
_REQUEST_SECONDS = 5.0  # from the first byte of a request to its last
_IDLE_SECONDS = 120.0  # longer than ingress controllers keep unused connections: it is they who close one, never we
_REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) (?:http://[^/ ?]*)?([^ ?]*)(?:\?[^ ]*)? HTTP/1\.([01])")
_HOST = re.compile(r"[a-z0-9_.:\[\]-]{1,253}")
# What the leader is asked for, at most this often in a second by all connections together, and for how long.
_ASKS = 20
_ASK_SECONDS = 1.0
_ASKED = b"x-certbotk8s-asked"  # the header of a replica's own question: it is passed on to nobody
_KEY_AUTHORIZATION = re.compile(rb"HTTP/1\.1 200 .*?\r\n\r\n([A-Za-z0-9_-]{1,128})(\.[A-Za-z0-9_-]{43})", re.DOTALL)
_MAX_NOTED_TOKENS = 1024
_MAX_NOTED_HOSTS = 8

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What a pending challenge answers: RFC 8555 section 8.1, and the names of the order that it belongs to."""

    key_authorization: str
    names: frozenset[str]


NOT_FOUND = (404, b"not found\n")


class Responder:
    """Answers `/.well-known/acme-challenge/TOKEN`; `/` and `/healthz` with 200 for load balancers; all else with 404.

    `listen` is `address:port` (`[address]:port` of IPv6). `lookup` gives the answer for a token, or None; it is called
    in the server's only thread and must not wait. `leader` gives the `address:port` of the replica that knows every
    token first, or "": it is asked once for one that is not known here, since a 404 of ours would cost an
    authorization.
    """

    def __init__(self, listen: str, lookup: Callable[[str], Answer | None], *, leader: Callable[[], str] = str) -> None:
        host, _, port = listen.rpartition(":")
        self._listen = (host.strip("[]"), int(port))
        self._lookup = lookup
        self._leader = leader
        self._asks = (0.0, 0)  # the second that began then, and how often the leader was asked in it
        self._thread: Thread | None = None
        self._stop: Callable[[], object]
        self._connections: dict[_Connection, None] = {}  # the one that has been silent longest first
        self._noted: dict[str, set[str]] = {}  # hosts that were noted, by token; the oldest token first

    def start(self) -> int:
        """Listen and serve; returns the port. OSError when the address is taken or is none of this machine."""
        host, _ = self._listen
        listener = socket.create_server(
            self._listen,
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=256,
            dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
        )
        loop = asyncio.new_event_loop()
        stopping = asyncio.Event()
        self._stop = lambda: loop.call_soon_threadsafe(stopping.set)
        self._thread = Thread(target=self._run, args=(loop, listener, stopping), name="http01", daemon=True)
        self._thread.start()
        return int(listener.getsockname()[1])

    def stop(self) -> None:
        """Stop listening, close every connection; returns when the thread has ended."""
        if self._thread is not None and self._thread.is_alive():
            self._stop()
            self._thread.join()

    def is_alive(self) -> bool:
        """Whether it serves: false before `start`, after `stop`, and after a failure of the event loop."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self, loop: asyncio.AbstractEventLoop, listener: socket.socket, stopping: asyncio.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(self._serve(listener, stopping))

    async def _serve(self, listener: socket.socket, stopping: asyncio.Event) -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), sock=listener)
        await stopping.wait()
        server.close()
        for connection in list(self._connections):
            connection.close()

    # --- for connections ----------------------------------------------------------------------------------------------

    def opened(self, connection: _Connection) -> None:
        """Count a connection, or one that has just asked something."""
        self._connections.pop(connection, None)
        self._connections[connection] = None
        if len(self._connections) > _MAX_CONNECTIONS:
            silent = next(iter(self._connections))
            self.closed(silent)
            silent.close()

    def closed(self, connection: _Connection) -> None:
        """Forget a connection."""
        self._connections.pop(connection, None)

    def answer(self, path: str, host: str) -> tuple[int, bytes]:
        """Status and body for a GET of `path` from `host`, as the Host header has it."""
        if path in {"/", "/healthz"}:
            return 200, b"ok\n"
        token = path.removeprefix(CHALLENGE_PATH)
        if token == path or not TOKEN.fullmatch(token) or (found := self._lookup(token)) is None:
            return NOT_FOUND
        self._note(token, host, found.names)
        return 200, found.key_authorization.encode()

    def may_ask(self, path: str) -> str:
        """The address of the leader, if it is to be asked for a challenge that is not known here; else ""."""
        token = path.removeprefix(CHALLENGE_PATH)
        leader = self._leader() if token != path and TOKEN.fullmatch(token) else ""
        if not leader:
            return ""
        now = asyncio.get_running_loop().time()
        since, asks = self._asks
        self._asks = (now, 1) if now - since >= 1 else (since, asks + 1)
        return leader if self._asks[1] <= _ASKS else ""

    async def ask(self, leader: str, path: str) -> tuple[int, bytes]:
        """Status and body as the leader has them; 404 when it knows nothing either, or says nothing in time."""
        host, _, port = leader.rpartition(":")
        request = f"GET {path} HTTP/1.1\r\nHost: {leader}\r\nConnection: close\r\n".encode() + _ASKED + b": 1\r\n\r\n"
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                try:
                    writer.write(request)
                    said = await reader.read(_MAX_REQUEST)
                finally:
                    writer.close()
        except (OSError, ValueError):
            return NOT_FOUND
        found = _KEY_AUTHORIZATION.fullmatch(said)
        if found is None or found[1].decode() != path.removeprefix(CHALLENGE_PATH):
            return NOT_FOUND
        return 200, found[1] + found[2]

    def _note(self, token: str, host: str, names: frozenset[str]) -> None:
        """Log a Host that is no name of the order, once: it is a redirect, or an ingress controller's own Host.

        The answer is given all the same: it is bound to our account key and of no use to anybody else.
        """
        name = re.sub(r":\d*$", "", host.lower()).removesuffix(".")
        if name in names:
            return
        shown = name if _HOST.fullmatch(name) else "that is no name"
        hosts = self._noted.setdefault(token, set())
        if shown in hosts or len(hosts) >= _MAX_NOTED_HOSTS:
            return
        hosts.add(shown)
        if len(self._noted) > _MAX_NOTED_TOKENS:
            del self._noted[next(iter(self._noted))]
        log.info(
            "The challenge of an order for %s was asked for under a Host %s and answered: "
            "a redirect leads there, or the ingress controller does not keep the Host.",
            listing(sorted(names)),
            shown,
        )


class _Connection(asyncio.Protocol):
    """One connection: requests one after the other, each answered at once."""

    def __init__(self, responder: Responder) -> None:
        self._responder = responder
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle
        self._deadline = self._loop.time() + _REQUEST_SECONDS
        self._asking: asyncio.Task[None] | None = None

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._timer = self._loop.call_later(_REQUEST_SECONDS, self._check_time)
        self._responder.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the interface of asyncio
        self._timer.cancel()
        if self._asking:
            self._asking.cancel()
        self._responder.closed(self)

    def pause_writing(self) -> None:
        """A client that asks without reading the answers is of no use to anybody."""
        self.close()

    def data_received(self, data: bytes) -> None:
        if not self._buffer:
            self._deadline = self._loop.time() + _REQUEST_SECONDS
        self._buffer += data
        if self._asking and len(self._buffer) > _MAX_REQUEST:
            self.close()  # nobody sends that much while an answer is looked for
            return
        self._go_on()

    def _go_on(self) -> None:
        while self._buffer and not self._asking and not self._transport.is_closing():
            head, end, rest = self._buffer.lstrip(b"\r\n").partition(b"\r\n\r\n")
            if len(head) > _MAX_REQUEST:
                self._send(431, b"request too large\n", keep=False)
            elif not end:
                return
            else:
                self._buffer = rest
                self._respond(head)
        self._deadline = self._loop.time() + _IDLE_SECONDS

    def _respond(self, head: bytes) -> None:
        self._responder.opened(self)
        lines = head.split(b"\r\n")
        request = _REQUEST_LINE.fullmatch(lines[0])
        if request is None:
            self._send(400, b"bad request\n", keep=False)
            return
        method, path, minor = request.groups()
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])
        }
        # A body is never read: what follows such a request on the connection could be taken for another one.
        body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        keep = minor == b"1" and b"close" not in headers.get(b"connection", b"").lower() and not body
        if method not in {b"GET", b"HEAD"}:
            self._send(405, b"only GET and HEAD\n", keep=False)
            return
        asked, with_body = path.decode("latin-1"), method == b"GET"
        status, text = self._responder.answer(asked, headers.get(b"host", b"").decode("latin-1"))
        if (status, text) == NOT_FOUND and _ASKED not in headers and (leader := self._responder.may_ask(asked)):
            self._asking = self._loop.create_task(self._pass_on(leader, asked, keep=keep, with_body=with_body))
        else:
            self._send(status, text, keep=keep, with_body=with_body)

    async def _pass_on(self, leader: str, path: str, *, keep: bool, with_body: bool) -> None:
        """Answer with what the leader says; then with what else was asked meanwhile on this connection."""
        status, text = await self._responder.ask(leader, path)
        self._asking = None
        self._send(status, text, keep=keep, with_body=with_body)
        self._go_on()

    def _send(self, status: int, body: bytes, *, keep: bool, with_body: bool = True) -> None:
        self._transport.write(
            b"HTTP/1.1 %s\r\n"
            b"Content-Type: text/plain; charset=us-ascii\r\n"
            b"Content-Length: %d\r\n"
            b"Cache-Control: no-store\r\n"  # a CDN that keeps the 404 of a moment ago fails the challenge
            b"X-Content-Type-Options: nosniff\r\n"
            b"%s\r\n%s"
            % (_STATUS[status], len(body), b"" if keep else b"Connection: close\r\n", body if with_body else b"")
        )
        if not keep:
            self._transport.close()

    def _check_time(self) -> None:
        """Close the connection when its time is over; looked at every few seconds, a timer per request costs more."""
        if self._loop.time() >= self._deadline:
            self.close()
        else:
            self._timer = self._loop.call_later(_REQUEST_SECONDS, self._check_time)


_STATUS = {
    200: b"200 OK",
    400: b"400 Bad Request",
    404: b"404 Not Found",
    405: b"405 Method Not Allowed\r\nAllow: GET, HEAD",
    431: b"431 Request Header Fields Too Large",
}
