"""Events (core/v1): what `kubectl describe` shows. Written later, by a thread of their own; losing one is no failure.

Hand-written because the official client's recorder blocks its caller and knows no time limit. The legacy core/v1 form
is used, since its `count` and `lastTimestamp` are what kubectl prints
(https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/).
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from certbotk8s.domain.api import FIELD_MANAGER, Kind, Resource
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.kube.api import NotFound

if TYPE_CHECKING:
    from datetime import datetime

    from certbotk8s.domain.reasons import Reason
    from certbotk8s.kube.api import Api
    from certbotk8s.ports import Clock, Reference

log = logging.getLogger(__name__)

EVENT = Kind("", "v1", "events", "Event", Resource)

LONGEST_MESSAGE = 1024  # bytes; the API server refuses longer ones
SAME_WORDS = timedelta(minutes=10)
_QUEUE = 1000
_REMEMBERED = 4096


@dataclass(frozen=True)
class _Occurrence:
    about: Reference
    type: str
    reason: str
    message: str
    time: datetime


@dataclass
class _Written:
    name: str
    first: datetime
    count: int


class EventRecorder:
    """Writes Events in the background.

    The same words about the same object within ten minutes are counted up on one Event. When more come than can be
    written, the newest are dropped.
    """

    def __init__(self, api: Api, clock: Clock) -> None:
        self._api = api
        self._clock = clock
        self._waiter = threading.Condition()
        self._queue: deque[_Occurrence] = deque()
        self._writing = False
        self._stopped = False
        self._written: OrderedDict[tuple[Reference, str, str, str], _Written] = OrderedDict()
        self._last_problem = ""
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Begin to write what has been and will be recorded."""
        self._thread.start()

    def record(self, about: Reference, reason: Reason, message: str, *, warning: bool = False) -> None:
        """Note an occurrence; returns at once and never raises."""
        kind = "Warning" if warning else "Normal"
        with self._waiter:
            if self._stopped or len(self._queue) >= _QUEUE:
                return
            self._queue.append(_Occurrence(about, kind, str(reason), _cut(message), self._clock.now()))
            self._waiter.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until all is written, for at most `timeout` seconds; whether it is."""
        deadline = self._clock.monotonic() + timeout
        with self._waiter:
            while (self._queue or self._writing) and (left := deadline - self._clock.monotonic()) > 0:
                self._clock.wait(self._waiter, left)
            return not self._queue and not self._writing

    def stop(self) -> None:
        """Write no more; what is still waiting is dropped."""
        with self._waiter:
            self._stopped = True
            self._queue.clear()
            self._waiter.notify_all()

    def _run(self) -> None:
        while (occurrence := self._next()) is not None:
            try:
                self._write(occurrence)
                self._last_problem = ""
            except (TemporaryError, PermanentError) as error:
                if str(error) != self._last_problem:  # one sentence for an outage, not one per Event
                    self._last_problem = str(error)
                    log.warning("an Event is lost: %s", error)
            except Exception:
                log.exception("an Event is lost")

    def _next(self) -> _Occurrence | None:
        with self._waiter:
            self._writing = False
            self._waiter.notify_all()
            while not self._queue:
                if self._stopped:
                    return None
                self._clock.wait(self._waiter, None)
            self._writing = True
            return self._queue.popleft()

    def _write(self, occurrence: _Occurrence) -> None:
        key = (occurrence.about, occurrence.type, occurrence.reason, occurrence.message)
        namespace = occurrence.about.namespace or "default"
        written = self._written.get(key)
        if written is not None and occurrence.time - written.first < SAME_WORDS:
            patch = {"count": written.count + 1, "lastTimestamp": _timestamp(occurrence.time)}
            with suppress(NotFound):  # Events live for an hour, or until somebody tidies up
                self._api.merge(EVENT, namespace, written.name, patch)
                written.count += 1
                return
        name = _name(occurrence)
        self._api.create(EVENT, _manifest(occurrence, namespace, name))
        self._written[key] = _Written(name, occurrence.time, 1)
        self._written.move_to_end(key)
        while len(self._written) > _REMEMBERED:
            self._written.popitem(last=False)


def _manifest(occurrence: _Occurrence, namespace: str, name: str) -> dict[str, object]:
    about = occurrence.about
    return {
        "metadata": {"namespace": namespace, "name": name},
        "involvedObject": {
            "apiVersion": about.api_version,
            "kind": about.kind,
            "namespace": about.namespace,
            "name": about.name,
            "uid": about.uid,
        },
        "type": occurrence.type,
        "reason": occurrence.reason,
        "message": occurrence.message,
        "firstTimestamp": _timestamp(occurrence.time),
        "lastTimestamp": _timestamp(occurrence.time),
        "count": 1,
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
    }


def _name(occurrence: _Occurrence) -> str:
    """Unique, and within the 253 characters of a name whatever the object is called."""
    told = "\0".join([*occurrence.about, occurrence.type, occurrence.reason, occurrence.message])
    digest = hashlib.sha256(f"{told}\0{occurrence.time.timestamp()}".encode()).hexdigest()[:16]
    return f"{occurrence.about.name[:200].rstrip('.-')}.{digest}"


def _timestamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _cut(message: str) -> str:
    encoded = message.encode()
    if len(encoded) <= LONGEST_MESSAGE:
        return message
    return encoded[: LONGEST_MESSAGE - len("…".encode())].decode(errors="ignore") + "…"
