"""/livez, /readyz and /metrics, for kubelet and Prometheus."""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

log = logging.getLogger(__name__)

_REQUEST_SECONDS = 5.0
_AT_ONCE = 16
_LOOKS_FOR_STOP = 0.1  # seconds


class Health:
    """An HTTP server on `listen` (`host:port`, `[v6]:port`; port 0: any).

    `sick` and `unready` say in a few words why the process should be restarted, or should get no traffic; "" when all
    is well. OSError from the constructor when the address cannot be had.
    """

    def __init__(
        self,
        listen: str,
        *,
        sick: Callable[[], str],
        unready: Callable[[], str],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        host, _, port = listen.rpartition(":")
        self._server = _Server((host.strip("[]"), int(port)), sick, unready, registry)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_LOOKS_FOR_STOP,), name="health", daemon=True
        )

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    """Plain TCPServer, because HTTPServer looks its own name up in DNS when it binds."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(
        self,
        address: tuple[str, int],
        sick: Callable[[], str],
        unready: Callable[[], str],
        registry: CollectorRegistry,
    ) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.sick = sick
        self.unready = unready
        self.registry = registry
        self._lock = threading.Lock()
        self._open: dict[socket.socket, None] = {}  # oldest first
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """One more thread; when there are too many, the oldest connection is cut, since probes must come through."""
        with self._lock:
            if len(self._open) >= _AT_ONCE:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        log.debug("a connection to the health port broke off", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST_SECONDS
    server: _Server
    server_version = "certbotk8s"
    sys_version = ""

    def do_GET(self) -> None:
        match urlsplit(self.path).path:
            case "/livez":
                self._verdict(self.server.sick())
            case "/readyz":
                self._verdict(self.server.unready())
            case "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(self.server.registry))
            case _:
                self._answer(404, "text/plain; charset=utf-8", b"not found\n")

    def _verdict(self, trouble: str) -> None:
        self._answer(503 if trouble else 200, "text/plain; charset=utf-8", f"{trouble or 'ok'}\n".encode())

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: probes come every few seconds."""
