"""The reflector: keeps a store equal to a collection of the API server by list and watch.

Hand-written, although `kubernetes` has an informer: that one cannot watch custom resources, asks for no bookmarks,
reconnects without delay, and hangs for ever on a half-open connection. The rules here are client-go's
(https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes).
"""

from __future__ import annotations

import logging
import math
import random
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
from urllib3.exceptions import ReadTimeoutError

from certbotk8s.domain.api import Resource, Struct
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.kube.api import SILENCE_SECONDS, Expired, Status, decode_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import urllib3

    from certbotk8s.domain.api import Kind
    from certbotk8s.kube.api import Api
    from certbotk8s.kube.store import ObjectStore
    from certbotk8s.ports import Clock

R = TypeVar("R", bound=Resource)

log = logging.getLogger(__name__)

# An object of etcd's largest size (1.5 MiB) is at most this as JSON; what is longer is not an object.
LONGEST_LINE = 4 * 1024 * 1024
FIRST_DELAY = 0.8
LONGEST_DELAY = 30.0
# A watch that lived this long was a healthy one: the next begins at once, and delays start again from the first.
HEALTHY_SECONDS = 5.0


class _Event(Struct, frozen=True):
    type: str
    object: msgspec.Raw


class _Meta(Struct, frozen=True):
    """What every object has, the undecodable too; a bookmark has nothing else than the version."""

    resource_version: str
    name: str = ""
    namespace: str = ""
    uid: str = ""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class _Bare(Struct, frozen=True):
    metadata: _Meta


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_bare = msgspec.json.Decoder(_Bare).decode


class Reflector(Generic[R]):
    """One watch with a thread of its own, in one namespace or in all.

    An object that cannot be decoded is named in the log once and left as it was known; nothing else suffers from it.
    `on_death` is called with a sentence when the thread ends by a bug: a cache that stands still must not be used on.
    """

    def __init__(
        self,
        api: Api,
        kind: Kind[R],
        store: ObjectStore[R],
        clock: Clock,
        *,
        on_death: Callable[[str], None],
        namespace: str = "",
        label_selector: str = "",
        field_selector: str = "",
    ) -> None:
        self._api = api
        self._kind = kind
        self._store = store
        self._clock = clock
        self._on_death = on_death
        self._namespace = namespace
        self._selectors = {"label_selector": label_selector, "field_selector": field_selector}
        self._what = f"{kind.plural} in {namespace}" if namespace else kind.plural
        self._version = ""  # "": a list comes next
        self._unreadable: set[str] = set()
        self._waiter = threading.Condition()
        self._stopped = False
        self._synced = False
        self._opened = math.inf
        self._response: urllib3.BaseHTTPResponse | None = None
        self._thread = threading.Thread(target=self._live, name=f"watch {self._what}", daemon=True)

    @property
    def has_synced(self) -> bool:
        """Whether the store has been filled once."""
        return self._synced

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """End, now: an open watch is cut. Returns at once."""
        with self._waiter:
            self._stopped = True
            self._waiter.notify_all()
            if self._response is not None:
                with suppress(ValueError, RuntimeError, OSError):  # it has just ended by itself
                    self._response.shutdown()

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end for at most `timeout` seconds; whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _live(self) -> None:
        try:
            self._run()
        except BaseException:
            if not self._stopped:  # cut in the middle of a read, an old connection may fail in any way
                log.exception("the watch of %s died", self._what)
                self._on_death(f"the watch of {self._what} died")

    def _run(self) -> None:
        delay, expired = FIRST_DELAY, False
        while not self._stopped:
            problem: TemporaryError | PermanentError | None = None
            before, expired = expired, False
            self._opened = math.inf
            try:
                if not self._version:
                    self._list()
                if not self._stopped:
                    self._watch()
            except Expired:
                self._version, expired = "", True
            except (TemporaryError, PermanentError) as error:
                problem = error
            healthy = self._clock.monotonic() - self._opened >= HEALTHY_SECONDS
            if healthy and not problem:
                delay = FIRST_DELAY
                continue
            if healthy or (expired and not before):
                # After an outage the API server is back, and has forgotten: what is cached is old until the list.
                delay = FIRST_DELAY
            pause, delay = self._pause(problem, delay)
            if problem and not self._stopped:
                log.warning("watching %s: %s; next attempt within %.0f s", self._what, problem, pause + 1)
            self._wait(pause)

    def _pause(self, problem: TemporaryError | PermanentError | None, delay: float) -> tuple[float, float]:
        """Seconds until the next attempt, and the delay for the one after that; both spread over the watches."""
        if isinstance(problem, TemporaryError) and problem.retry_after:  # an API server that has just started says so
            asked = min(problem.retry_after.total_seconds(), LONGEST_DELAY)
            return asked + FIRST_DELAY * random.random(), delay  # noqa: S311 - spreads reconnects, guards nothing
        return delay * random.uniform(0.5, 1.0), min(delay * 2, LONGEST_DELAY)  # noqa: S311 - the same

    def _wait(self, seconds: float) -> None:
        deadline = self._clock.monotonic() + seconds
        with self._waiter:
            while not self._stopped and (left := deadline - self._clock.monotonic()) > 0:
                self._clock.wait(self._waiter, left)

    def _list(self) -> None:
        objects: list[R] = []
        unreadable: set[str] = set()
        version = ""
        for page in self._api.pages(self._kind, self._namespace, **self._selectors):
            version = page.metadata.resource_version
            for raw in page.items or ():
                obj = self._decode(raw)
                if obj is not None:
                    objects.append(obj)
                elif bare := _bare(raw):
                    unreadable.add(bare.key)
            if self._stopped:
                return
        self._store.replace(objects, int(version), namespace=self._namespace, keep=unreadable)
        self._version = version
        self._synced = True

    def _watch(self) -> None:
        seconds = random.randint(300, 600)  # noqa: S311 - spreads reconnects, guards nothing
        response = self._api.watch(self._kind, self._namespace, self._version, seconds=seconds, **self._selectors)
        self._opened = self._clock.monotonic()
        try:
            with self._waiter:
                self._response = response
                if self._stopped:
                    return
            for line in self._lines(response):
                self._handle(line)
        finally:
            with self._waiter:
                self._response = None
            response.close()

    def _lines(self, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        """The complete lines of the stream; what the server left unfinished, and what is too long, is left out.

        It ends too where nothing comes any more: a router on the way may have forgotten the connection.
        """
        buffer = bytearray()
        too_long = False
        try:
            for chunk in response.stream(64 * 1024):
                buffer += chunk
                *lines, rest = buffer.split(b"\n")
                for line in lines:
                    if line and not too_long:
                        yield bytes(line)
                    too_long = False
                buffer = rest
                if len(buffer) > LONGEST_LINE:
                    log.error("watching %s: skipped an event of more than %d bytes", self._what, LONGEST_LINE)
                    buffer.clear()
                    too_long = True
        except ReadTimeoutError:
            log.info("watching %s: nothing came for %.0f s; it begins anew", self._what, SILENCE_SECONDS)
        except Exception as error:  # urllib3, ssl and http.client each have their own for a connection that breaks
            if not self._stopped:
                raise TemporaryError(f"the connection to {self._api.host} was cut") from error

    def _handle(self, line: bytes) -> None:
        try:
            event = _decode_event(line)
        except msgspec.MsgspecError as error:
            # What was meant is unknown, so nothing that is known can be relied on.
            self._version = ""
            raise TemporaryError("the API server sent what is no watch event") from error
        if event.type == "ERROR":
            raise self._refused(event.object)
        bare = _bare(event.object)
        if bare is None:
            self._version = ""
            raise TemporaryError("the API server sent an object without a version")
        match event.type:
            case "ADDED" | "MODIFIED":
                # Most events are echoes of own writes, and it costs to parse the keys and certificates of a Secret.
                if self._store.knows(bare.key, bare.uid, int(bare.resource_version)):
                    self._unreadable.discard(bare.key)
                elif (obj := self._decode(event.object)) is not None:
                    self._store.put(obj)
            case "DELETED":
                self._unreadable.discard(bare.key)
                self._store.remove(bare.key, bare.uid, int(bare.resource_version))
        self._version = bare.resource_version

    def _refused(self, raw: msgspec.Raw) -> Exception:
        """An ERROR event: HTTP was 200 long ago, the failure comes as an object."""
        try:
            status = decode_status(raw)
        except msgspec.MsgspecError:
            status = Status(message="an error without words")
        if status.code == 410:
            return Expired(status.message)
        return TemporaryError(f"the API server ended the watch: {status.message[:1000]}")

    def _decode(self, raw: msgspec.Raw) -> R | None:
        bare = _bare(raw)
        key = bare.key if bare else "an object without a name"
        try:
            obj = self._kind.decode(raw)
        except Exception as error:  # a tenant's object must not stop the world, whatever it does to its decoder
            if key not in self._unreadable:
                self._unreadable.add(key)
                log.error("%s %s cannot be read and is left as it was: %s", self._kind.kind, key, str(error)[:500])  # noqa: TRY400
            return None
        self._unreadable.discard(key)
        return obj


def _bare(raw: Any) -> _Meta | None:
    try:
        return _decode_bare(raw).metadata
    except msgspec.MsgspecError:
        return None
