"""An HTTPS server that answers as a test's script says: for what no lawful ACME server would send."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import ssl
import threading
from base64 import urlsafe_b64decode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.pki import Authority

DIRECTORY = "/directory"
NEW_NONCE = "/new-nonce"
NEW_ACCOUNT = "/new-account"
NEW_ORDER = "/new-order"


@dataclass(frozen=True)
class Reply:
    """What to answer. `body` is sent as JSON unless it is bytes; `nonce` None gives a fresh one, "" none."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    nonce: str | None = None
    chunks: Callable[[], Iterator[bytes]] | None = None
    """Sent as they come, in place of the body, and the connection closed after them."""
    raw: bytes | None = None
    """Sent in place of a whole HTTP answer."""


@dataclass(frozen=True)
class Received:
    """A request as it came, its JWS taken apart."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def protected(self) -> dict[str, Any]:
        """The JWS header."""
        return dict(json.loads(_decode(json.loads(self.body)["protected"])))

    @property
    def payload(self) -> bytes:
        """What was signed."""
        return _decode(json.loads(self.body)["payload"])


class AcmeServer:
    """A context: listens on 127.0.0.1. `script` maps a path to its replies, the last of which stays.

    The directory and new nonces are lawful unless the script has them; anything else is 404.
    """

    def __init__(self, authority: Authority) -> None:
        """`authority` signs its certificate, and is `ca_bundle`."""
        self.ca_bundle = authority.bundle.read_bytes()
        self.script: dict[str, list[Reply]] = {}
        self.requests: list[Received] = []
        self.connections: list[socket.socket] = []
        self._nonces = itertools.count()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = False
        certificate, key = authority.issue("acme", ["127.0.0.1"])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        # The handshake is made by the thread of the connection: one that fails does not stop the listener.
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True
        )
        self.origin = f"https://127.0.0.1:{self._server.server_address[1]}"

    @property
    def directory(self) -> dict[str, Any]:
        """A lawful directory of this server."""
        paths = {"newNonce": NEW_NONCE, "newAccount": NEW_ACCOUNT, "newOrder": NEW_ORDER}
        return {name: self.origin + path for name, path in paths.items()}

    def paths(self) -> list[str]:
        """The paths that were asked, in order."""
        return [request.path for request in self.requests]

    def reply(self, received: Received) -> Reply:
        """The next reply for this request."""
        with self._lock:
            self.requests.append(received)
            replies = self.script.get(received.path)
            if replies:
                return replies.pop(0) if len(replies) > 1 else replies[0]
        if received.path == DIRECTORY:
            return Reply(body=self.directory)
        return Reply(status=200 if received.path == NEW_NONCE else 404)

    def nonce(self) -> str:
        """A nonce not given before."""
        return f"nonce{next(self._nonces):07}"

    def __enter__(self) -> AcmeServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        for connection in self.connections:  # the threads of kept connections wait for another request
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()


def _handler(server: AcmeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = server.reply(Received(self.command, self.path, dict(self.headers), body))
            if reply.raw is not None:
                self.wfile.write(reply.raw)
                self.close_connection = True
                return
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            nonce = server.nonce() if reply.nonce is None else reply.nonce
            self.send_response(reply.status)
            for name, value in {"Replay-Nonce": nonce, **reply.headers}.items():
                if value:
                    self.send_header(name, value)
            if reply.chunks:
                self.send_header("Connection", "close")
                self.end_headers()
                for chunk in reply.chunks():
                    self.wfile.write(chunk)
                return
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = answer

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # a client that goes away is what some tests are about
                super().handle()

        def setup(self) -> None:
            server.connections.append(self.request)
            super().setup()

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the tests' output clean."""

    return Handler


def _decode(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))
