"""What kubelet and kube-proxy do for a Service: its ClusterIP forwards to the backends that are ready."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tests.lab.errors import LabError

_POLL = 0.2  # seconds between two looks at a backend
_ANSWER = 1.0  # seconds that a backend has to say that it is ready


class Backend(NamedTuple):
    """One endpoint of a Service, and where it says whether it is ready."""

    host: str
    port: int
    ready_port: int
    ready_path: str = "/readyz"


class ServiceProxy:
    """Forwards TCP from an address to the ready backends in turn; refuses connections while none is ready.

    What is open to one that is not ready any more stays open; to one that is no backend any more it is closed.

    A context: it runs in a thread of its own. `backends` is asked again at each look, several times a second.
    """

    def __init__(self, host: str, port: int, backends: Callable[[], Sequence[Backend]]) -> None:
        self._host = host
        self._port = port
        self._backends = backends
        self._ready: list[Backend] = []
        self._turn = 0
        self._open: dict[asyncio.StreamWriter, Backend] = {}
        self._forwarding: set[asyncio.Task[None]] = set()  # the event loop alone keeps no task from being collected
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name=f"svcproxy {host}:{port}")

    def __enter__(self) -> "ServiceProxy":
        _check_bindable(self._host, self._port)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        while self._thread.is_alive():
            if self._loop is not None:
                with contextlib.suppress(RuntimeError):  # its loop has just closed
                    self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(0.05)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            while not self._stop.is_set():
                await self._look()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), _POLL)
        finally:
            self._close()

    async def _look(self) -> None:
        backends = list(self._backends())
        for writer, backend in list(self._open.items()):
            if backend not in backends:
                writer.transport.abort()
        answers = await asyncio.gather(*map(_is_ready, backends))
        self._ready = [backend for backend, ready in zip(backends, answers, strict=True) if ready]
        if self._ready and self._server is None:
            self._server = await asyncio.start_server(self._accept, self._host, self._port, backlog=512)
        elif not self._ready:
            self._close()

    def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._forward(reader, writer))
        self._forwarding.add(task)
        task.add_done_callback(self._forwarding.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backend = self._next()
        try:
            if backend is None:
                raise ConnectionRefusedError
            backend_reader, backend_writer = await asyncio.open_connection(backend.host, backend.port)
        except OSError:
            writer.transport.abort()
            return
        self._open[backend_writer] = backend
        try:
            await asyncio.gather(_pump(reader, backend_writer), _pump(backend_reader, writer))
        finally:
            del self._open[backend_writer]
            backend_writer.close()
            writer.close()

    def _next(self) -> Backend | None:
        if not self._ready:
            return None
        self._turn += 1
        return self._ready[self._turn % len(self._ready)]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies until the end of the stream, and passes that end on; a broken connection breaks the other one."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.transport.abort()


async def _is_ready(backend: Backend) -> bool:
    """Whether the backend's readiness address answers 200 in time."""
    try:
        async with asyncio.timeout(_ANSWER):
            reader, writer = await asyncio.open_connection(backend.host, backend.ready_port)
            try:
                writer.write(f"GET {backend.ready_path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n".encode())
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status.split()[1:2] == [b"200"]


def _check_bindable(host: str, port: int) -> None:
    """LabError when this user may not listen there, or something else does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError as error:
            raise LabError(
                f"This user may not listen on {host}:{port}, the address of a Service."
                f" Allow it with: sysctl -w net.ipv4.ip_unprivileged_port_start={port}"
            ) from error
        except OSError as error:
            raise LabError(f"Cannot listen on {host}:{port}, the address of a Service: {error.strerror}.") from error
