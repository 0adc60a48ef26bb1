"""An HTTP/1.1 proxy with faults between a client and one server; `acme_proxy.py` and `kube_proxy.py` are made of it.

It runs in a thread of the test's own process, so that a test scripts it by calls and reads its record as a list.
Bodies are read whole and then passed on, but for streams, such as a watch: their bytes are passed on as they come.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlsplit

from tests.lab.network import Ports

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Coroutine

_HEAD_LIMIT = 4 << 20  # bytes; of a line of a chunked body too
_LONGEST = 30.0  # seconds for the proxy's own doings
_PHRASES = {each.value: each.phrase for each in HTTPStatus}
_LAST_CHUNK = b"0\r\n\r\n"
_FRAMING = {"content-length", "transfer-encoding", "connection", "keep-alive"}

Headers = tuple[tuple[str, str], ...]


class Request(NamedTuple):
    """What a client asked; `target` is path and query."""

    method: str
    target: str
    headers: Headers
    body: bytes

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]


class Answer(NamedTuple):
    """What a client is answered; the length of the body is told by the proxy."""

    status: int
    headers: Headers = ()
    body: bytes = b""

    def header(self, name: str) -> str:
        """The first header of that name, "" for none."""
        return next((value for each, value in self.headers if each.lower() == name.lower()), "")


@dataclass(eq=False)
class Exchange:
    """A request in the proxy's record, from its arrival on."""

    method: str
    target: str
    reached: bool = False
    """Whether it was passed on to the server."""
    status: int = 0
    """What the client was answered; 0: nothing (yet)."""
    moment: float = field(default_factory=time.monotonic)
    """When it came, in seconds of the monotonic clock."""

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]


@dataclass(frozen=True)
class Fault:
    """What happens to a request. `respond` turns the server's answer into the client's; None closes the connection.

    A request that is not passed on has an empty answer. Of a stream, only what is not passed on can be answered.
    """

    delay: float = 0.0
    """Seconds before anything is done."""
    answer_delay: float = 0.0
    """Seconds between the server's answer and the client's."""
    passed_on: bool = True
    respond: Callable[[Answer], Answer | None] = lambda answer: answer


def late(seconds: float) -> Fault:
    """The request is passed on after a while."""
    return Fault(delay=seconds)


def answered(status: int, body: bytes = b"", *, passed_on: bool = False, **headers: str) -> Fault:
    """The client gets this answer, while the server has not heard of it, or has acted. `_` in a header stands for -."""
    lines = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Fault(passed_on=passed_on, respond=lambda _: Answer(status, lines, body))


def dropped(*, passed_on: bool = True) -> Fault:
    """The connection is closed without an answer, after the server has acted, or before it has heard of it."""
    return Fault(passed_on=passed_on, respond=lambda _: None)


def changed(change: Callable[[Answer], Answer]) -> Fault:
    """The client gets what `change` makes of the server's answer."""
    return Fault(respond=change)


@dataclass(eq=False)
class Injection:
    """A fault and the requests that meet it. A context: at its end no more do."""

    fits: Callable[[Request], bool]
    fault: Fault | Callable[[Request], Fault]
    """Or what tells the fault for a request that fits."""
    left: float
    """How many more requests meet it."""
    hits: int = 0
    """How many have met it."""

    def end(self) -> None:
        """No more requests meet it."""
        self.left = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class _Peer(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def abort(self) -> None:
        self.writer.transport.abort()


@dataclass(eq=False)
class _Stream:
    client: _Peer
    silent: bool = False


class Proxy:
    """A proxy on a port of 127.0.0.1 of its own, in front of the server of one URL. A context.

    Every method may be called from any thread. `exchanges` is the record of all requests, oldest first.
    """

    def __init__(
        self,
        server: str,
        server_tls: ssl.SSLContext,
        *,
        tls: ssl.SSLContext | None = None,
        streams: Callable[[Request], bool] = lambda _: False,
    ) -> None:
        """`tls` is for the proxy's own side, None for plain HTTP; `streams` tells which requests are for streams."""
        address = urlsplit(server)
        self._server_host, self._server_port, self._server_tls = address.hostname, address.port, server_tls
        self._tls = tls
        self._is_stream = streams
        self._ports = Ports()
        self._port = self._ports.take()
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._port}"
        self.exchanges: list[Exchange] = []
        self.lag = 0.0
        """Seconds by which everything in a stream comes late."""
        self._injections: list[Injection] = []
        self._streams: set[_Stream] = set()
        self._clients: dict[asyncio.Task[None], _Peer] = {}
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy {self.url}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._ports.close()

    # --- the script ---------------------------------------------------------------------------------------------------

    def inject(
        self,
        fits: Callable[[Request], bool],
        fault: Fault | Callable[[Request], Fault],
        *,
        times: float = float("inf"),
        first: bool = False,
    ) -> Injection:
        """The next `times` requests that fit meet this fault; where several fit, the one injected first.

        `first` puts it before those that were injected until now.
        """
        injection = Injection(fits, fault, times)
        self._injections.insert(0 if first else len(self._injections), injection)
        return injection

    def cut(self) -> None:
        """Breaks every connection and refuses new ones, until `mend`."""
        self._call(self._cut())

    def mend(self) -> None:
        """Listens again."""
        self._call(self._listen())

    def silence_streams(self) -> None:
        """Lets no byte more through the streams that are open now, as when a router forgets them; new ones work."""
        for stream in list(self._streams):
            stream.silent = True

    def cut_streams(self) -> None:
        """Breaks the connections of the streams that are open now."""
        self._call(self._cut_streams())

    # --- the proxy ----------------------------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_LONGEST)

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(
                self._accept, "127.0.0.1", self._port, ssl=self._tls, limit=_HEAD_LIMIT, backlog=512
            )

    async def _cut(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for client in self._clients.values():
            client.abort()

    async def _cut_streams(self) -> None:
        for stream in self._streams:
            stream.client.abort()

    async def _end(self) -> None:
        await self._cut()
        tasks = list(self._clients)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # aborted transports are closed by the loop, not at once

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = _Peer(reader, writer)
        task = self._loop.create_task(self._serve(client))
        self._clients[task] = client
        task.add_done_callback(self._clients.pop)

    async def _serve(self, client: _Peer) -> None:
        """All the requests of one connection, over one connection to the server."""
        server: _Peer | None = None
        try:
            while (request := await _read_request(client.reader)) is not None:
                exchange = Exchange(request.method, request.target)
                self.exchanges.append(exchange)
                fault = self._fault(request)
                await asyncio.sleep(fault.delay)
                given = Answer(0)
                if fault.passed_on:
                    if server is None or server.reader.at_eof():
                        server = await self._connect()
                    exchange.reached = True
                    answer = await self._ask(request, exchange, client, server)
                    if answer is None:  # it was a stream, and all of it has been passed on
                        continue
                    given = answer
                    await asyncio.sleep(fault.answer_delay)
                answer = fault.respond(given)
                if answer is None:
                    return
                exchange.status = answer.status
                client.writer.write(_answer_bytes(answer, request.method))
                await client.writer.drain()
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
            pass  # one side has gone, or does not speak HTTP: so does the other
        finally:
            client.abort()
            if server is not None:
                server.abort()

    def _fault(self, request: Request) -> Fault:
        for injection in self._injections:
            if injection.left > 0 and injection.fits(request):
                injection.left -= 1
                injection.hits += 1
                return injection.fault(request) if callable(injection.fault) else injection.fault
        return Fault()

    async def _connect(self) -> _Peer:
        return _Peer(
            *await asyncio.open_connection(
                self._server_host, self._server_port, ssl=self._server_tls, limit=_HEAD_LIMIT
            )
        )

    async def _ask(self, request: Request, exchange: Exchange, client: _Peer, server: _Peer) -> Answer | None:
        """The server's answer; None when it was a stream, which the client has got."""
        server.writer.write(_request_bytes(request))
        first, headers = await _read_head(server.reader)
        status = int(first.split(" ", 2)[1])
        chunked = _value(headers, "transfer-encoding").lower() == "chunked"
        if chunked and self._is_stream(request):
            exchange.status = status
            await self._stream(_head_bytes(first, headers), client, server)
            return None
        bare = request.method == "HEAD" or status in (204, 304)
        return Answer(status, headers, b"" if bare else await _read_body(server.reader, headers))

    async def _stream(self, head: bytes, client: _Peer, server: _Peer) -> None:
        """Passes a stream on until its end, or until either side has gone."""
        stream = _Stream(client)
        due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._streams.add(stream)

        async def read() -> None:
            chunk = head
            while True:
                due.put_nowait((self._loop.time() + self.lag, chunk))
                if not chunk:
                    return
                chunk = b"" if chunk == _LAST_CHUNK else await _read_chunk(server.reader)

        async def write() -> None:
            while True:
                moment, chunk = await due.get()
                await asyncio.sleep(moment - self._loop.time())
                if stream.silent:
                    await asyncio.Event().wait()
                if not chunk:
                    return
                client.writer.write(chunk)
                await client.writer.drain()

        async def gone() -> None:
            while not client.reader.at_eof():  # its next request may be there before the end of the stream is told
                await asyncio.sleep(0.05)
            raise ConnectionResetError

        tasks = [self._loop.create_task(work) for work in (write(), read(), gone())]
        writing = tasks[0]
        pending: set[asyncio.Task[None]] = set(tasks)
        try:
            while not writing.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            self._streams.discard(stream)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, Headers]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return lines[0], tuple((name, value.strip()) for name, _, value in pairs)


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    """None when the client asks nothing more."""
    try:
        first, headers = await _read_head(reader)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    method, target, _ = first.split(" ")
    return Request(method, target, headers, await _read_body(reader, headers) if _framed(headers) else b"")


def _value(headers: Headers, name: str) -> str:
    return Answer(0, headers).header(name)


def _framed(headers: Headers) -> bool:
    return bool(_value(headers, "content-length") or _value(headers, "transfer-encoding"))


async def _read_body(reader: asyncio.StreamReader, headers: Headers) -> bytes:
    if _value(headers, "transfer-encoding").lower() == "chunked":
        body = bytearray()
        while (chunk := await _read_chunk(reader)) != _LAST_CHUNK:
            body += chunk.partition(b"\r\n")[2][:-2]
        return bytes(body)
    length = _value(headers, "content-length")
    return await reader.readexactly(int(length)) if length else await reader.read()


async def _read_chunk(reader: asyncio.StreamReader) -> bytes:
    """One chunk with its framing (RFC 9112 section 7.1); servers here send no trailers."""
    size = await reader.readuntil(b"\r\n")
    return size + await reader.readexactly(int(size.partition(b";")[0], 16) + 2)


def _head_bytes(first: str, headers: Headers) -> bytes:
    return "\r\n".join([first, *(f"{name}: {value}" for name, value in headers), "", ""]).encode("latin-1")


def _request_bytes(request: Request) -> bytes:
    headers = tuple(each for each in request.headers if each[0].lower() not in _FRAMING)
    if request.body:
        headers = (*headers, ("Content-Length", str(len(request.body))))
    return _head_bytes(f"{request.method} {request.target} HTTP/1.1", headers) + request.body


def _answer_bytes(answer: Answer, method: str) -> bytes:
    headers = tuple(each for each in answer.headers if each[0].lower() not in _FRAMING)
    if answer.status not in (204, 304):
        headers = (*headers, ("Content-Length", str(len(answer.body))))
    body = b"" if method == "HEAD" else answer.body
    return _head_bytes(f"HTTP/1.1 {answer.status} {_PHRASES.get(answer.status, 'Status')}", headers) + body
