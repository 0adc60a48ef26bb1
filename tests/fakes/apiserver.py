"""An API server that does what a real one does only in trouble: it plays a script of answers, good and broken ones."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec
from kubernetes.client import ApiClient, Configuration

from certbotk8s.kube.api import Api

Json = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


# An answer writes to the connection what it likes.
Answer = Callable[["_Handler"], None]


class ScriptedApiServer:
    """Listens on a port of its own. Each request gets the next answer; watches have a script of their own.

    A watch beyond the script stays open and silent. Any other request beyond it is answered 500 and kept in
    `unexpected`.
    """

    def __init__(self, *, answers: Iterable[Answer] = (), watches: Iterable[Answer] = ()) -> None:
        self.answers = deque(answers)
        self.watches = deque(watches)
        self.requests: list[Request] = []
        self.unexpected: list[Request] = []
        self.closed = threading.Event()
        script = self

        class Handler(_Handler):
            server_script = script

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def host(self) -> str:
        """`address:port`."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    def api(self) -> Api:
        """A client of it."""
        configuration = Configuration(host=f"http://{self.host}", no_proxy="*", retries=False)
        return Api(ApiClient(configuration))

    def close(self) -> None:
        """End every open watch and listen no more."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> ScriptedApiServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_script: ScriptedApiServer

    def answer(self) -> None:
        script = self.server_script
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        request = Request(self.command, url.path, dict(parse_qsl(url.query)), dict(self.headers.items()), body)
        script.requests.append(request)
        if request.query.get("watch") == "true":
            step = script.watches.popleft() if script.watches else stream(then="hold")
        elif script.answers:
            step = script.answers.popleft()
        else:
            script.unexpected.append(request)
            step = status(500, "beyond the script")
        with suppress(OSError):
            step(self)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def answer(code: int, body: bytes, **headers: str) -> Answer:
    """A whole answer; `headers` with underscores for hyphens."""

    def write(handler: _Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return write


def json(body: object, code: int = 200) -> Answer:
    """An object as the answer."""
    return answer(code, msgspec.json.encode(body))


def status(code: int, message: str = "", *, reason: str = "", details: Json | None = None, **headers: str) -> Answer:
    """A metav1.Status as the answer."""
    return answer(code, msgspec.json.encode(status_object(code, message, reason, details)), **headers)


def status_object(code: int, message: str = "", reason: str = "", details: Json | None = None) -> Json:
    """A metav1.Status."""
    body: Json = {"kind": "Status", "status": "Failure", "code": code, "message": message, "reason": reason}
    return body | ({"details": details} if details else {})


def page(*items: object, version: str, token: str = "") -> Answer:
    """A page of a list; with a token there is another one."""
    return json({"metadata": {"resourceVersion": version, "continue": token}, "items": items})


def event(type: str, obj: object) -> bytes:
    """A line of a watch."""
    return msgspec.json.encode({"type": type, "object": obj}) + b"\n"


def hang_up(handler: _Handler) -> None:
    """No answer at all: the connection is closed."""
    handler.close_connection = True


def stream(*chunks: bytes, then: str | Callable[[], None] = "end") -> Answer:
    """A watch that sends the chunks; then it breaks off ("cut"), stays silent ("hold"), or ends in order.

    `then` as a function is called before it ends.
    """

    def write(handler: _Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for chunk in chunks:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            handler.wfile.flush()
        if then == "hold":
            handler.server_script.closed.wait()
        if callable(then):
            then()
        if then in ("cut", "hold"):
            handler.close_connection = True
        else:
            handler.wfile.write(b"0\r\n\r\n")

    return write
