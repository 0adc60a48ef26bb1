"""Which replica leads: election by a Lease (https://kubernetes.io/docs/concepts/architecture/leases/).

Hand-written to client-go's rules (k8s.io/client-go/tools/leaderelection), although `kubernetes` has an election: that
one dies of a dropped connection without telling anybody, and waits for a silent API server for ever. What is told here
in seconds is reckoned from the *start* of the request that renewed the Lease, on a clock that counts while the machine
sleeps: what a replica believes ends before any other may begin. It narrows the time in which two replicas act, no more;
the fences behind it are the preconditions of every write.
"""

from __future__ import annotations

import logging
import random
import threading
from datetime import datetime
from typing import TYPE_CHECKING, Any

from certbotk8s.domain import api
from certbotk8s.domain.errors import Conflict, PermanentError, TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from certbotk8s.kube.api import Api
    from certbotk8s.ports import Clock

log = logging.getLogger(__name__)

NAME = "certbotk8s"
# Of the duration of a Lease: after how much a leader that could not renew stops, and how often it renews (15, 10, 5 s).
RENEW_DEADLINE = 2 / 3
RETRY = 1 / 3
JITTER = 0.2


class LeaseSpec(api.Struct, frozen=True):
    """coordination.k8s.io/v1 LeaseSpec."""

    holder_identity: str = ""
    lease_duration_seconds: int = 0
    acquire_time: datetime | None = None
    renew_time: datetime | None = None
    lease_transitions: int = 0


class Lease(api.Resource, frozen=True):
    """coordination.k8s.io/v1 Lease."""

    spec: LeaseSpec = LeaseSpec()


LEASE = api.Kind("coordination.k8s.io", "v1", "leases", "Lease", Lease)


class Election:
    """This replica's part in the election, with a thread of its own.

    `identity` names the replica; one that starts again under the same name has its Lease back at once. `address` is
    where its responder listens, for the others to ask. `duration` is that of the Lease in seconds. `on_lost` is called
    with a sentence, once, when this replica led and leads no more.
    """

    def __init__(
        self,
        connection: Api,
        clock: Clock,
        *,
        namespace: str,
        identity: str,
        address: str,
        duration: float,
        on_lost: Callable[[str], None],
    ) -> None:
        self._api = connection
        self._clock = clock
        self._namespace = namespace
        self._identity = identity
        self._address = address
        self._duration = duration
        self._on_lost = on_lost
        self._waiter = threading.Condition()
        self._stopped = False
        self._seen: Lease | None = None  # as read or written last
        self._seen_at = 0.0
        self._until = 0.0  # leading until then
        self._led = False
        self._complained = ""
        self._thread = threading.Thread(target=self._live, name="election", daemon=True)

    def start(self) -> None:
        """Begin to stand for election; returns at once."""
        self._thread.start()

    def is_leading(self) -> bool:
        """Whether this replica may act at this moment."""
        return self._clock.monotonic() < self._until

    def fence(self) -> None:
        """Raise TemporaryError unless this replica may act: called before everything that changes something."""
        if not self.is_leading():
            raise TemporaryError(
                f"This replica, {self._identity}, does not lead; what it was about to do is left to the one that does"
            )

    def wait(self, stop: threading.Event) -> bool:
        """Wait until this replica leads or `stop` is set; whether it leads."""
        while not self.is_leading() and not stop.is_set():
            with self._waiter:
                self._clock.wait(self._waiter, 0.05)
        return self.is_leading()

    def leader_address(self) -> str:
        """`host:port` where the responder of the leader listens; "" when that is this replica, or unknown."""
        lease = self._seen
        if self.is_leading() or lease is None or lease.spec.holder_identity in {"", self._identity}:
            return ""
        return lease.metadata.annotations.get(api.ANNOTATION_RESPONDER_ADDRESS, "")

    def stop(self, *, release: bool) -> None:
        """Stand no more. `release` gives the Lease up, so that another replica need not wait for its end."""
        with self._waiter:
            self._stopped = True
            self._waiter.notify_all()
        if self._thread.ident is not None:
            self._thread.join(self._duration)
        if release and self.is_leading() and self._seen:
            try:
                self._write(self._seen, "", seconds=self._duration * RETRY)
            except (TemporaryError, PermanentError) as error:
                log.info("The Lease was not released: %s", error)
        self._until = 0.0

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            while not self._stopped:
                self._turn()
        except BaseException:
            log.exception("the election died")
            self._on_lost("the election died")

    def _turn(self) -> None:
        trouble = ""
        try:
            self._try()
        except Conflict:
            self._seen = None  # another replica was faster; what it wrote is read at the next turn
        except (TemporaryError, PermanentError) as error:
            trouble = str(error)
        if trouble != self._complained:
            self._complained = trouble
            if trouble:
                log.warning("Leader election: %s", trouble)
        leading = self.is_leading()
        if self._led and not leading and not self._stopped:
            self._on_lost(f"This replica, {self._identity}, leads no more" + (f": {trouble}" if trouble else ""))
            self._led = False
        if leading and not self._led:
            self._led = True
            log.info("This replica, %s, leads", self._identity)
        with self._waiter:
            if leading:
                self._waiter.notify_all()
            if not self._stopped:
                self._clock.wait(self._waiter, self._pause())

    def _pause(self) -> float:
        """Until the next turn: a third of the duration; less where the Lease, or what we hold of it, ends before."""
        now, pause = self._clock.monotonic(), self._duration * RETRY
        if self._seen is None:
            return pause * JITTER
        if self._led:
            return max(0.0, min(pause * (1 - JITTER * random.random()), self._until - now))  # noqa: S311
        left = self._expiry(self._seen) - now
        spread = pause * JITTER * random.random()  # noqa: S311 - parts the standbys, guards nothing
        return (min(pause, left) if left > 0 else pause * JITTER) + spread

    def _expiry(self, lease: Lease) -> float:
        """When a Lease that is not renewed ends. By our clock, from when we saw it: those of others may be wrong."""
        return self._seen_at + lease.spec.lease_duration_seconds

    def _try(self) -> None:
        """Get, keep or make the Lease; at most two requests, which end before what we hold does."""
        if self._led and self._seen:
            self._hold(self._seen)
            return
        before, began = self._seen, self._clock.monotonic()
        raw = self._api.get(LEASE, self._namespace, NAME, seconds=self._limit())
        lease = None if raw is None else LEASE.decode(raw)
        if lease is None:
            self._create()
            return
        if before is None or before.metadata.resource_version != lease.metadata.resource_version:
            self._seen_at = began
        self._seen = lease
        holder = lease.spec.holder_identity
        if holder in {"", self._identity} or self._clock.monotonic() >= self._expiry(lease):
            self._hold(lease)
        elif self._led:
            self._until = 0.0
            raise TemporaryError(f"{holder} has taken the Lease {self._namespace}/{NAME}")

    def _limit(self) -> float:
        """Seconds that a request may take."""
        retry = self._duration * RETRY
        return max(0.1, min(retry, self._until - self._clock.monotonic())) if self._led else retry

    def _hold(self, lease: Lease) -> None:
        began = self._clock.monotonic()
        self._seen = self._write(lease, self._identity, seconds=self._limit())
        self._seen_at, self._until = began, began + self._duration * RENEW_DEADLINE

    def _create(self) -> None:
        began = self._clock.monotonic()
        manifest = self._manifest(LeaseSpec(holder_identity=self._identity), self._identity)
        self._seen = LEASE.decode(self._api.create(LEASE, manifest, seconds=self._limit()))
        self._seen_at, self._until = began, began + self._duration * RENEW_DEADLINE

    def _write(self, lease: Lease, holder: str, *, seconds: float) -> Lease:
        manifest = self._manifest(lease.spec, holder)
        meta = lease.metadata
        manifest["metadata"] |= {"uid": meta.uid, "resourceVersion": meta.resource_version}
        return LEASE.decode(self._api.apply(LEASE, manifest, seconds=seconds))

    def _manifest(self, old: LeaseSpec, holder: str) -> dict[str, Any]:
        now, same = self._clock.now(), old.holder_identity == holder
        spec = {
            "holderIdentity": holder,
            # A released Lease is one that ends at once; the API server takes no duration of 0.
            "leaseDurationSeconds": max(1, round(self._duration)) if holder else 1,
            "acquireTime": _micro_time(old.acquire_time if same and old.acquire_time else now),
            "renewTime": _micro_time(now),
            "leaseTransitions": old.lease_transitions + (0 if same or not holder else 1),
        }
        annotations = {api.ANNOTATION_RESPONDER_ADDRESS: self._address} if holder and self._address else {}
        return {"metadata": {"name": NAME, "namespace": self._namespace, "annotations": annotations}, "spec": spec}


def _micro_time(time: datetime) -> str:
    """metav1.MicroTime: the API server refuses a time without its six digits."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
