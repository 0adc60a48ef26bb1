"""Brings a Certificate to a Secret that holds a certificate for it, and keeps it so.

    observe (caches) -> need, hold (domain.plan) -> one step (CA | solver | Secret) -> advance (domain.issuance) -> ...

goes on through several steps until one must wait. What a crash may lose is written first: the next key pair as a
Secret, the order's URL, the chosen challenges, the intent to finalize. All else (`Work`) is memory, and is found out
again from the CA's order. A step of which the effect is unknown is never repeated blindly: the order is fetched first.

The fences against a second controller are resourceVersion on every Certificate and Secret write and the one name of a
Certificate's next-key Secret; an order whose URL could not be stored is abandoned, never finalized.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import structs

from certbotk8s.domain import api, pem
from certbotk8s.domain.acme import Identifier
from certbotk8s.domain.attempt import Ending, failure, recent, success
from certbotk8s.domain.errors import Conflict, PermanentError, TemporaryError
from certbotk8s.domain.issuance import Outcome, State, advance, order_outcome
from certbotk8s.domain.names import listing
from certbotk8s.domain.plan import (
    Finding,
    Observed,
    Ownership,
    asked_to_wait,
    blocked,
    hold,
    immutable,
    issuer_name,
    misfit,
    need,
    order_set,
    ownership,
    profile,
    refused,
    renew_wish,
    when,
)
from certbotk8s.domain.problems import doubts_account, reason
from certbotk8s.domain.reasons import Reason
from certbotk8s.domain.renewal import (
    LOOKS,
    ORDER_LIMIT,
    SELF_CHECK_LIMIT,
    SELF_CHECKS,
    SHORT_PAUSE,
    STEP_LADDER,
    renewal_time,
    rung,
)
from certbotk8s.ports import Key, call
from certbotk8s.reconcile.challenges import OVER, Challenges, authorization_failure
from certbotk8s.reconcile.claims import Claims
from certbotk8s.reconcile.indexes import (
    BY_ORDER_SET,
    BY_ORDERED_FROM,
    certificate_key,
    issuer_key,
    store_index,
    store_key,
)
from certbotk8s.reconcile.observer import Observer
from certbotk8s.reconcile.opening import slots
from certbotk8s.reconcile.orders import explain, give_up_authorizations
from certbotk8s.reconcile.places import Places, Turn
from certbotk8s.reconcile.secrets import CertificateSecrets
from certbotk8s.reconcile.status import report, report_order, write_status
from certbotk8s.reconcile.work import Rest, Step, Wait, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from datetime import datetime

    from certbotk8s.domain.acme import Order
    from certbotk8s.domain.api import (
        Certificate,
        Issuance,
        SecretFacts,
    )
    from certbotk8s.ports import Clock, Cluster, KeyMaker, Session, Solver, Steps
    from certbotk8s.reconcile.accounts import Accounts

log = logging.getLogger(__name__)

MOMENT = timedelta(milliseconds=100)
# Seconds after which a state is worth a status write: somebody may be looking.
VISIBLE = 1.0
# Seconds after which the authorizations are asked why an order is still pending, and challenges presented again.
PATIENCE = 30.0
# Nothing tells when a Secret that is not ours goes away, or when a Certificate gives up the name of a Secret.
HELD_LOOK = timedelta(minutes=5)
ACCOUNT_LOOK = timedelta(seconds=30)


class Loss(NamedTuple):
    """How an order that is lost is recorded, told, and told the second time in a row."""

    reason: Reason
    ending: Ending
    text: str
    again: str


# An order that came to nothing through no fault of the request. A CA that loses one after the other would be asked for
# ever.
LOSSES = {
    Outcome.ORDER_GONE: Loss(Reason.ORDER_GONE, Ending.FAILED, "no longer has the order", "like the one before"),
    Outcome.ORDER_TAKEN: Loss(
        Reason.CERTIFICATE_REJECTED,
        Ending.DISCARDED,
        "issued for another key than ours by the order",
        "as by the one before",
    ),
}


class CertificateReconciler:
    """Reconciles Certificates: one instance, called by all workers, each key by one at a time."""

    def __init__(
        self,
        *,
        cluster: Cluster,
        clock: Clock,
        key_maker: KeyMaker,
        solvers: Mapping[str, Solver],
        accounts: Accounts,
        enqueue: Callable[[Key], None],
    ) -> None:
        self._cluster = cluster
        self._clock = clock
        self._secrets = CertificateSecrets(cluster, key_maker)
        self._challenges = Challenges(cluster, solvers)
        self.sweep_challenges = self._challenges.sweep
        self._accounts = accounts
        self._observer = Observer(cluster, clock, accounts)
        self._enqueue = enqueue
        self._works: dict[Key, Work] = {}
        # Orders in a row that could not be remembered, and until when (monotonic seconds) no other one is placed.
        self._lost: dict[Key, tuple[int, float]] = {}
        self._claims, self._places = Claims(enqueue), Places(enqueue)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def __call__(self, key: Key) -> Steps:
        """One reconcile: as many steps as go without waiting."""
        certificate = self._cluster.store(api.CERTIFICATE).get(store_key(key))
        if certificate is None or certificate.metadata.deletion_timestamp:
            yield from self._gone(key)
            return None
        work = self._resume(key, certificate)
        if left := self._still_waiting(work):
            return left
        try:
            return (yield from self._run(work))
        except Conflict:
            # What is known here may be wrong. Whatever was stored is found again.
            work.overruled = True
            self._claims.release(key)
            self._places.release(key)
            raise

    def _run(self, work: Work) -> Steps:
        while True:
            if not self._is_there(work):
                yield from self._gone(work.key)
                return None
            changed = self._changed(work)
            if not changed and (closed := self._closed(work)):
                self._show(work, closed)
                return ACCOUNT_LOOK
            try:
                outcome: Outcome | Wait | Rest
                if changed:
                    outcome = Outcome.REQUEST_CHANGED
                else:
                    outcome = yield from self._steps[work.state](self, work)
                if outcome is Outcome.REQUEST_CHANGED or outcome in LOSSES:
                    yield from self._leave_order(work, outcome)
            except PermanentError as error:
                if work.state in {State.ISSUED, State.FAILED}:
                    # The attempt is over; what is refused is the writing down of that.
                    outcome = self._try_later(work, TemporaryError(str(error)))
                else:
                    work.failure, outcome = error, Outcome.REFUSED
            except Conflict:
                raise
            except TemporaryError as error:
                outcome = self._try_later(work, error)
            if isinstance(outcome, Rest):
                self._forget(work.key, waits=outcome.waits)
                return outcome.after
            if isinstance(outcome, Wait):
                if work.state in {State.NONE, State.REQUESTED} and not work.orders:
                    self._places.release(work.key)  # there is no order
                work.due = self._clock.monotonic() + outcome.after.total_seconds()
                self._show(work, outcome.finding)
                return outcome.after
            self._move(work, outcome)

    def _still_waiting(self, work: Work) -> timedelta | None:
        """What is left of a step's wait: own writes wake the key too, and must not make it ask the CA sooner."""
        left = work.due - self._clock.monotonic()
        return timedelta(seconds=left) if left > 0 and not self._changed(work) else None

    def _is_there(self, work: Work) -> bool:
        """Whether the Certificate still exists; the work goes on with what it says now.

        Its status counts as ours alone: where somebody else wrote it, the next write is refused and all begins anew.
        """
        newest = self._cluster.store(api.CERTIFICATE).get(work.certificate.key)
        if newest is None or newest.metadata.uid != work.certificate.metadata.uid or newest.metadata.deletion_timestamp:
            return False
        if newest.status == work.certificate.status:
            work.certificate = newest
        return True

    def _move(self, work: Work, outcome: Outcome) -> None:
        state = advance(work.state, outcome)
        log.debug("%s: %s: %s -> %s", work.certificate.key, outcome, work.state or "none", state or "none")
        # A CA that leaves an order ready after finalize, with or without an error, is asked ever later too.
        repeated = state is work.state or {work.state, state} == {State.AUTHORIZED, State.FINALIZING}
        if not repeated:
            work.since, work.looks, work.errors, work.shown = self._clock.monotonic(), 0, 0, None
        work.state, work.due = state, 0.0
        if state is State.NONE:
            self._claims.release(work.key)
            self._places.release(work.key)
            work.issuance, work.stored, work.order, work.failure, work.to_answer = None, None, None, None, ()
            work.chain, work.installed = None, None
            work.orders.clear()

    def _resume(self, key: Key, certificate: Certificate) -> Work:
        """The work under way for this Certificate: as remembered, else as its status tells."""
        work, stored = self._works.get(key), certificate.status.issuance
        if work and _goes_on(work, certificate):
            work.certificate = certificate
            return work
        if work:
            self._part_with_orders(work)
        self._forget(key, waits=True)
        state = State.NONE
        if stored:
            # How far it is, the order tells: both states begin by fetching it. Only Finalizing must never be read as
            # less.
            state = State.FINALIZING if stored.state == State.FINALIZING else State.ORDERED
            self._claims.take(key, stored.order_set)
            self._places.hold(issuer_key(certificate, stored.issuer_ref), [key])
        orders = {stored.order_url} if stored else set()
        work = Work(key, certificate, state, stored, stored, since=self._clock.monotonic(), orders=orders)
        if stored and (wait := asked_to_wait(seen := self._observer.observe(certificate))) and wait.until:
            work.due = work.since + (wait.until - seen.now).total_seconds()
        self._works[key] = work
        return work

    def _forget(self, key: Key, *, waits: bool = False) -> None:
        self._works.pop(key, None)
        self._claims.release(key)
        self._places.release(key, waits=waits)

    def _gone(self, key: Key) -> Steps:
        """The Certificate is deleted: Kubernetes removes the next key, we what was presented. The tls Secret stays."""
        work = self._works.get(key)
        if work and work.issuance:
            if work.state in {State.ISSUED, State.FAILED}:
                ending, finding, _ = self._concluded(work, self._observer.observe(work.certificate))
            else:
                text = f"{self._order_of(work)} is given up, since the Certificate was deleted"
                ending, finding = Ending.ABANDONED, Finding(Reason.ORDER_ABANDONED, text)
            self._tell_orders(work, ending, finding)
            # Its claim stands until then: another order for the same names would get these authorizations.
            yield from self._give_up_authorizations(work)
            yield from self._clean_up(work, [])
        self._forget(key)
        self._lost.pop(key, None)
        return None

    def _changed(self, work: Work) -> bool:
        """Whether something else is asked for than the order under way was placed for, or that is no longer allowed.

        Once Finalizing is stored only the latter counts, since nothing is ordered in its place then: finalize may still
        be on its way, from whoever wrote it.
        """
        if work.issuance is None or work.state in {State.FINALIZING, State.ISSUED, State.FAILED}:
            return False
        seen = self._observer.observe(work.certificate)
        if _committed(work):
            return refused(seen) is not None
        if seen.issuer is None or refused(seen):
            return True
        account = self._observer.account(seen)
        return account is not None and self._observer.asked(seen, account) != work.issuance.request_hash

    # --- looking, showing ---------------------------------------------------------------------------------------------

    def _names(self, work: Work) -> str:
        return listing(self._observer.observe(work.certificate).names)

    def _session(self, work: Work) -> Session:
        assert work.issuance
        issuer, account_uri = self._ordered_from(work), work.issuance.account_uri
        session = self._accounts.session(issuer, account_uri)
        if session is None:
            kind = api.ISSUER_KINDS.get(issuer.kind)
            live = kind and self._cluster.get(kind, issuer.namespace, issuer.name)
            if live and _opens(live, account_uri) and self._clock.now() < _deadline(work.issuance):
                self._enqueue(issuer)
                raise TemporaryError(f"The account {account_uri}, opened by another replica, is not open here yet")
            raise PermanentError(
                Reason.ORDER_GONE,
                f"The account {account_uri} of the order under way is no longer open, so that the order is lost.",
            )
        return session

    def _pool(self, work: Work) -> str:
        """Calls for one issuer share threads: one that is slow, or hostile, holds up its own Certificates alone."""
        return "/".join(self._ordered_from(work))

    def _ordered_from(self, work: Work) -> Key:
        assert work.issuance
        return issuer_key(work.certificate, work.issuance.issuer_ref)

    def _closed(self, work: Work) -> Finding | None:
        """Just after a start the account may not be open yet: the issuer's reconcile opens it and enqueues this key.

        None too when it never will be: the issuer has another one by now, or is gone and no longer asked for.
        """
        if work.state in {State.NONE, State.ISSUED, State.FAILED}:
            return None
        assert work.issuance
        ordered_from = self._ordered_from(work)
        if self._accounts.session(ordered_from, work.issuance.account_uri) or self._accounts.has_open(ordered_from):
            return None
        if ordered_from != issuer_key(work.certificate) and self._observer.issuer(ordered_from) is None:
            return None
        text = f"Waiting for {issuer_name(work.certificate)}, which has not opened the account of this order"
        return Finding(Reason.ISSUER_NOT_READY, text)

    def _write(
        self, work: Work, issuance: Issuance | None, finding: Finding | None, *, issuing: bool, **more: Any
    ) -> None:
        seen = self._observer.observe(work.certificate)
        if issuing:
            more["next_attempt_time"] = finding.until if finding else None
        work.certificate = write_status(self._cluster, seen, issuance, finding, issuing=issuing, **more)
        work.stored = issuance

    def _persist(self, work: Work, issuance: Issuance, doing: str) -> None:
        """Remember the issuance before the next step acts on it."""
        self._write(work, issuance, Finding(Reason.ORDER_PENDING, doing), issuing=True)
        work.issuance = issuance

    def _show(self, work: Work, finding: Finding) -> None:
        """Say what a state that lasts waits for: once for each state, and again after each error or word of the CA."""
        visible = work.errors or finding.until or self._clock.monotonic() - work.since >= VISIBLE
        said = (work.state, work.errors, finding.until)
        if not visible or work.shown == said:
            return
        work.shown = said
        state = State.FINALIZING if _committed(work) else work.state
        stored = work.stored and work.issuance and structs.replace(work.issuance, state=state)
        self._write(work, stored, finding, issuing=True)
        if stored:
            work.issuance = stored

    def _say(self, work: Work, seen: Observed, finding: Finding | None) -> None:
        """What holds up a Certificate for which nothing is under way; an Event when that is new."""
        before = api.find_condition(work.certificate.status.conditions, "Issuing")
        self._write(work, None, finding, issuing=False)
        if finding and (before is None or (before.reason, before.message) != (finding.reason, finding.message)):
            report(
                self._cluster,
                "Certificate",
                seen.certificate,
                finding.reason,
                finding.message,
                warning=finding.until is None and finding.reason is not Reason.ORDERS_LIMITED,
            )
            if finding.aside:
                log.warning("%s", finding.aside, extra={"kind": "Certificate", "object": seen.certificate.key})

    def _try_later(self, work: Work, error: TemporaryError) -> Wait:
        work.errors += 1
        pause = error.retry_after or rung(STEP_LADDER, work.errors)
        why = reason(error.problem) if error.problem else Reason.CA_UNAVAILABLE
        again = (
            when(self._clock.now() + pause) if pause >= timedelta(minutes=1) else f"in {pause.total_seconds():.0f} s"
        )
        text = f"{str(error).rstrip('.')}. Next attempt {again}"
        log.info("%s", text, extra={"kind": "Certificate", "object": work.certificate.key, "reason": str(why)})
        # What the CA asks for holds over a restart too.
        until = self._in(pause) if error.retry_after else None
        return Wait(max(pause, MOMENT), Finding(why, text, until))

    def _in(self, pause: timedelta) -> datetime:
        """The time after a pause; not before, though status keeps no fractions of a second."""
        return (self._clock.now() + pause + timedelta(microseconds=999_999)).replace(microsecond=0)

    # --- nothing under way --------------------------------------------------------------------------------------------

    def _rest(self, work: Work) -> Step:
        """Find out whether a certificate is wanted and may be ordered now; then store the next key pair."""
        seen = self._observer.observe(work.certificate)
        wanted = need(seen)
        if wanted is None:
            self._secrets.discard_next_keys(seen)
            self._say(work, seen, None)
            assert seen.secret
            assert seen.secret.certificate
            return Rest(renewal_time(work.certificate.spec, seen.secret.certificate) - seen.now)
        if not self._is_ours(seen) and (found := self._secrets.live(work.certificate)):
            # No cache has a Secret without its label: it may be somebody else's, or another Certificate's.
            if held := blocked(replace(seen, secret=found)):
                self._say(work, seen, held)
                return Rest(HELD_LOOK)
            # What is there may do: nobody needs to be asked, nor an issuer to be ready, to take it over.
            return self._take_over(work, seen, found)
        if held := hold(seen):
            self._say(work, seen, held)
            return Rest(held.until - seen.now if held.until else HELD_LOOK)
        account = self._observer.account(seen)
        if account is None:
            return Rest(None)  # ready, but not yet opened since the start: its reconcile enqueues this key
        if not self._has_place(work, seen):
            return Rest(None, waits=True)
        # Nothing is ordered on a cache's word.
        meta = work.certificate.metadata
        live = self._cluster.get(api.CERTIFICATE, meta.namespace, meta.name)
        if live is None or _asked(live) != _asked(work.certificate):
            return Rest(MOMENT)
        found = self._secrets.live(work.certificate) if self._is_ours(seen) else None  # the other case was seen above
        if found and ownership(found, work.certificate, seen.rivals) is not Ownership.OURS:
            return self._take_over(work, seen, found)
        if found and (need(really := replace(seen, secret=found)) is None or immutable(really)):
            return Rest(MOMENT)
        same = order_set(seen, account.session.account_uri)
        if holder := self._holder(work.key, same):
            known = holder.namespace == meta.namespace  # tenants need not know each other
            other = f"{holder.namespace}/{holder.name}" if known else "a Certificate of another namespace"
            text = f"Waiting for {other}, which is ordering the same names"
            self._say(work, seen, Finding(Reason.SAME_NAMES, text, seen.now + timedelta(minutes=1)))
            return Rest(timedelta(minutes=1))
        asked = self._observer.asked(seen, account)
        self._secrets.discard_next_keys(seen)
        yield from self._secrets.store_next_key(seen, asked, found)
        work.issuance = api.Issuance(
            generation=meta.generation,
            attempt=work.certificate.status.failed_attempts + 1,
            request_hash=asked,
            order_set=same,
            state=State.REQUESTED,
            started_at=seen.now,
            issuer_ref=work.certificate.spec.issuer_ref,
            account_uri=account.session.account_uri,
            names=seen.names,
            renew_now=renew_wish(work.certificate),
        )
        return Outcome.KEY_STORED

    def _has_place(self, work: Work, seen: Observed) -> bool:
        """Whether one order more of its issuer may be under way; if not, that is said, and a free place wakes it."""
        assert seen.issuer
        issuer, limit = issuer_key(work.certificate), seen.issuer.spec.acme.max_concurrent_orders
        under_way = self._cluster.store(api.CERTIFICATE).find(BY_ORDERED_FROM, store_index(issuer))
        self._places.hold(issuer, map(certificate_key, under_way))
        if self._places.take(work.key, issuer, limit, _turn(seen)):
            return True
        text = (
            f"Waiting for other orders of {issuer_name(work.certificate)} to end: it has as many under way as its "
            f"spec.acme.maxConcurrentOrders allows ({limit}). This goes on by itself"
        )
        self._say(work, seen, Finding(Reason.ORDERS_LIMITED, text))
        return False

    def _is_ours(self, seen: Observed) -> bool:
        return seen.secret is not None and ownership(seen.secret, seen.certificate, seen.rivals) is Ownership.OURS

    def _take_over(self, work: Work, seen: Observed, found: SecretFacts) -> Rest:
        """Make the Secret that is there (`found`, live) this Certificate's, if it may; nothing is ordered for that."""
        if ownership(found, work.certificate, seen.rivals) in {Ownership.OURS, Ownership.RIVAL}:
            return Rest(MOMENT)  # the cache is behind
        if refused := self._secrets.claim(seen, found):
            self._say(work, seen, refused)
            return Rest(HELD_LOOK)
        # A wish to renew that came with the Certificate, from a backup say, was fulfilled in its former life.
        self._write(work, None, None, issuing=False, renew_now=renew_wish(work.certificate))
        return Rest(MOMENT)

    def _holder(self, key: Key, same: str) -> Key | None:
        """The Certificate that is ordering the same names; None when this one may."""
        others = self._cluster.store(api.CERTIFICATE).find(BY_ORDER_SET, same)
        for other in others:
            if certificate_key(other) != key:
                self._claims.take(certificate_key(other), same)
        return self._claims.take(key, same)

    # --- the steps ----------------------------------------------------------------------------------------------------

    def _place_order(self, work: Work) -> Step:
        assert work.issuance
        lost, until = self._lost.get(work.key, (0, 0.0))
        if (left := until - self._clock.monotonic()) > 0:
            text = f"Somebody else writes the status of {work.certificate.key}, so that orders cannot be remembered"
            return Wait(timedelta(seconds=left), Finding(Reason.ORDER_PENDING, text))
        session, seen = self._session(work), self._observer.observe(work.certificate)
        if not self._has_place(work, seen):  # it was given up in a wait
            return Rest(None, waits=True)
        identifiers = [Identifier("dns", name) for name in seen.names]
        # On threads of its own: hundreds of orders that a slow CA has yet to take hold up none that it has taken.
        pool = f"{self._pool(work)}/newOrder"
        order = yield from call(pool, session.new_order, identifiers, profile(seen))
        work.orders.add(order.url)
        outcome = order_outcome(order.status)
        issuance = structs.replace(
            work.issuance,
            state=advance(work.state, outcome),
            order_url=order.url,
            finalize_url=order.finalize,
            deadline=order.expires.replace(microsecond=0) if order.expires else None,
        )
        # At once, before anything else is asked: an order nobody remembers is an order lost.
        try:
            self._persist(work, issuance, f"{issuer_name(work.certificate)} took the order for {listing(seen.names)}")
        except Conflict:
            # Once is chance. CAs ration orders, and every write of a rival wakes this key again.
            pause = rung(STEP_LADDER, lost).total_seconds() if lost else 0.0
            self._lost[work.key] = (lost + 1, self._clock.monotonic() + pause)
            raise
        self._lost.pop(work.key, None)
        self._tell_lost_orders(work, {order.url})
        if outcome is Outcome.ORDER_INVALID:
            yield from explain(self._pool(work), session, order, self._names(work))
        work.order = order
        return outcome

    def _present(self, work: Work) -> Step:
        """Choose a challenge for each pending authorization, remember the choice, present them all."""
        assert work.issuance
        session = self._session(work)
        order = yield from self._handed_over(work, session)
        if order is None:
            return Outcome.ORDER_GONE
        outcome = order_outcome(order.status)
        if outcome is Outcome.ORDER_INVALID:
            yield from explain(self._pool(work), session, order, self._names(work))
        if outcome is not Outcome.ORDER_PENDING:
            work.order = order
            return outcome
        seen = self._observer.observe(work.certificate)
        chosen, to_answer = [], []
        for url in order.authorizations:
            authorization = yield from call(self._pool(work), session.authorization, url)
            if authorization.status == "valid":
                continue
            if authorization.status in OVER:
                raise authorization_failure(authorization)
            if authorization.status != "pending":
                said = f'the unknown status "{authorization.status}"' if authorization.status else "no status"
                raise TemporaryError(f"The authorization {url} has {said}. It is asked for again.")
            challenge, answered = self._challenges.choose(seen, authorization, session)
            chosen.append(challenge)
            to_answer += [] if answered else [challenge.url]
        work.to_answer = tuple(to_answer)
        challenges = tuple(chosen)
        if challenges != work.issuance.challenges:
            names = listing([challenge.identifier for challenge in challenges])
            self._persist(
                work, structs.replace(work.issuance, challenges=challenges), f"Presenting the challenge for {names}"
            )
        yield from self._challenges.present(seen, work.issuance)
        return Outcome.PRESENTED

    def _submit(self, work: Work) -> Step:
        """Look once whether each challenge is served as seen from here; then tell the CA to validate."""
        assert work.issuance
        session, seen = self._session(work), self._observer.observe(work.certificate)
        if work.to_answer is None:
            # Whether the CA heard an answer is unknown, and it takes none twice: it tells for which it still waits.
            outcome = yield from self._present(work)
            return Outcome.ORDER_PENDING if outcome is Outcome.PRESENTED else outcome
        waited = self._clock.monotonic() - work.since
        if work.to_answer and waited < SELF_CHECK_LIMIT.total_seconds():
            if work.looks == 0:  # nothing loads what was presented at once
                work.looks += 1
                return Wait(SELF_CHECKS[0], Finding(Reason.ORDER_PENDING, "Waiting for the challenge to be served"))
            missing = yield from self._challenges.missing(seen, work.issuance)
            if missing:
                if waited > PATIENCE:
                    # Somebody may have deleted what was presented.
                    yield from self._challenges.present(seen, work.issuance)
                pause = SELF_CHECKS[min(work.looks, len(SELF_CHECKS) - 1)]
                work.looks += 1
                asks = when(seen.now + SELF_CHECK_LIMIT - timedelta(seconds=waited))
                text = f"Waiting for the challenge to be served: {missing}. The CA is asked {asks} all the same"
                return Wait(pause, Finding(Reason.ORDER_PENDING, text))
        urls, work.to_answer = work.to_answer, None
        for url in urls:
            yield from call(self._pool(work), session.answer, url)
        work.to_answer = ()
        return Outcome.SUBMITTED

    def _await_validation(self, work: Work) -> Step:
        assert work.issuance
        session = self._session(work)
        if work.looks == 0:
            return self._look_again(work, None)
        order = yield from self._fetch_order(work, session)
        if order is None:
            return Outcome.ORDER_GONE
        outcome = order_outcome(order.status)
        late = self._clock.monotonic() - work.since > PATIENCE
        if outcome is Outcome.ORDER_INVALID or (outcome is Outcome.ORDER_PENDING and late):
            answered = [challenge.url for challenge in work.issuance.challenges]
            heard = yield from explain(self._pool(work), session, order, self._names(work), answered)
            if not heard:
                work.to_answer = None  # the client may repeat its answer (RFC 8555 section 8.2)
                return outcome
        return self._look_again(work, order) if outcome is Outcome.ORDER_PENDING else outcome

    def _finalize(self, work: Work) -> Step:
        assert work.issuance
        session, seen, issuance = self._session(work), self._observer.observe(work.certificate), work.issuance
        work.order = None
        pair = self._secrets.take_next_key(work.certificate, issuance.request_hash)
        if pair is None:
            # Before finalize a lost key costs nothing: a new one, for the same order.
            yield from self._secrets.store_next_key(seen, issuance.request_hash, seen.secret)
            pair = self._secrets.take_next_key(work.certificate, issuance.request_hash)
            if pair is None:
                raise TemporaryError("The Secret with the next key is removed again and again")
        if self._changed(work):
            return Outcome.REQUEST_CHANGED
        deadline = issuance.deadline or (seen.now + ORDER_LIMIT)
        issuance = structs.replace(issuance, state=State.FINALIZING, deadline=deadline)
        self._persist(work, issuance, f"Waiting for {issuer_name(work.certificate)} to issue for {listing(seen.names)}")
        if self._changed(work):
            return Outcome.REQUEST_CHANGED  # no longer allowed: what the write took in
        # From here on an error leaves open whether the CA got it: the next step is to look, not to send again.
        self._move(work, Outcome.FINALIZED)
        order = yield from call(self._pool(work), session.finalize, issuance.finalize_url, pair[1])
        if order.status == "valid" and order.certificate:
            work.order = order
            return Outcome.ORDER_VALID
        return self._look_again(work, order)

    def _collect(self, work: Work) -> Step:
        """Finalize was, or may have been, sent: see how far the order is; fetch, check and install the certificate."""
        assert work.issuance
        if work.chain is None:
            session = self._session(work)
            order = yield from self._handed_over(work, session)
            if order is None:
                raise PermanentError(
                    Reason.ORDER_GONE,
                    f"{issuer_name(work.certificate)} no longer knows the finalized order {work.issuance.order_url}.",
                )
            outcome = order_outcome(order.status)
            if outcome is Outcome.ORDER_INVALID:
                yield from explain(self._pool(work), session, order, self._names(work))
            if outcome is Outcome.ORDER_PROCESSING or (outcome is Outcome.ORDER_VALID and not order.certificate):
                return self._look_again(work, order)
            if outcome is Outcome.ORDER_VALID:
                work.chain = yield from call(self._pool(work), session.certificate, order.certificate)
            return outcome
        seen, pair = self._observer.observe(work.certificate), self._secrets.next_key(work.certificate)
        if pair is None:
            raise PermanentError(
                Reason.KEY_LOST, "The key of this order was deleted from its Secret; its certificate is of no use."
            )
        try:
            key_hash, _, _, encoding = pem.private_key_facts(pair[0])
        except ValueError as error:
            raise PermanentError(Reason.KEY_LOST, f"The Secret with the key of this order holds {error}.") from error
        try:
            facts = pem.certificate_facts(pem.load_chain(work.chain)[0])
        except ValueError as error:
            return self._discard(work, seen, f"it cannot be read: {error}")
        if facts.public_key_hash != key_hash:
            return Outcome.ORDER_TAKEN
        if why := pem.refusal(work.chain, key_hash, seen.names, seen.now):
            return self._discard(work, seen, why)
        candidate = api.SecretFacts(
            metadata=api.ObjectMeta(
                name=seen.certificate.spec.secret_name, namespace=seen.certificate.metadata.namespace
            ),
            certificate=facts,
            public_key_hash=key_hash,
            key_encoding=encoding,
        )
        if lack := misfit(replace(seen, secret=candidate)):
            return self._discard(work, seen, lack.message)
        self._secrets.install(seen, work.chain, pair[0], work.issuance)
        work.installed = facts
        return Outcome.STORED

    def _discard(self, work: Work, seen: Observed, why: str) -> Outcome:
        """The certificate that came must not be installed: the spec has changed meanwhile, or else it is a failure."""
        assert work.issuance
        account = self._observer.account(seen)
        if account:
            changed = self._observer.asked(seen, account) != work.issuance.request_hash
        else:
            changed = seen.certificate.metadata.generation != work.issuance.generation
        if changed:
            return Outcome.REQUEST_CHANGED
        raise PermanentError(
            Reason.CERTIFICATE_REJECTED, f"The certificate from {issuer_name(work.certificate)} is not used: {why}."
        )

    def _conclude(self, work: Work) -> Step:
        """Record the end of the attempt, then clean up: neither Ready nor the next issuance waits for that."""
        seen = self._observer.observe(work.certificate)
        keys = self._secrets.next_keys(seen)
        self._record(work, seen)
        self._places.release(work.key)
        yield from self._clean_up(work, keys)
        return Outcome.CLEANED_UP

    _steps: Mapping[State, Callable[[CertificateReconciler, Work], Step]] = {
        State.NONE: _rest,
        State.REQUESTED: _place_order,
        State.ORDERED: _present,
        State.PRESENTED: _submit,
        State.SUBMITTED: _await_validation,
        State.AUTHORIZED: _finalize,
        State.FINALIZING: _collect,
        State.ISSUED: _conclude,
        State.FAILED: _conclude,
    }

    # --- what several steps do ----------------------------------------------------------------------------------------

    def _fetch_order(self, work: Work, session: Session) -> Generator[Any, Any, Order | None]:
        """The order as the CA has it; None when the CA does not know it any more, or can no longer finalize it."""
        assert work.issuance
        if _deadline(work.issuance) < self._clock.now() and work.state is not State.FINALIZING:
            return None
        try:
            order: Order = yield from call(self._pool(work), session.order, work.issuance.order_url)
        except PermanentError as error:
            if error.reason is Reason.ORDER_GONE:
                return None
            raise
        return order

    def _handed_over(self, work: Work, session: Session) -> Generator[Any, Any, Order | None]:
        """The order as the step before got it, else as the CA has it now. What it says holds for one step."""
        order, work.order = work.order, None
        return order or (yield from self._fetch_order(work, session))

    def _look_again(self, work: Work, order: Order | None) -> Wait:
        """When to look at the order next: the CA's Retry-After, else ever later; until the order's own deadline."""
        assert work.issuance
        issuer, names = issuer_name(work.certificate), self._names(work)
        deadline = _deadline(work.issuance)
        if work.looks and work.state is State.FINALIZING and self._clock.now() > deadline:
            raise PermanentError(
                Reason.ORDER_UNFINISHED,
                f"{issuer} has not issued for {names}, though its order was finalized, and waited for until "
                f"{when(deadline)}.",
            )
        pause, until = LOOKS[min(work.looks, len(LOOKS) - 1)], None
        if order and order.retry_after:
            pause = max(order.retry_after, MOMENT)
            if pause >= (SHORT_PAUSE if work.shown else timedelta(seconds=VISIBLE)):
                until = self._in(pause)  # it holds over a restart too
        work.looks += 1
        doing = f"check {names}" if work.state is State.SUBMITTED else f"issue for {names}"
        status = f" (order {order.status} since {when(work.issuance.started_at)})" if order else ""
        return Wait(pause, Finding(Reason.ORDER_PENDING, f"Waiting for {issuer} to {doing}{status}", until))

    def _leave_order(self, work: Work, why: Outcome) -> Generator[Any, Any, None]:
        """Give the order up without counting a failure: the spec asks for something else, or it is lost.

        The second loss in a row is a failure.
        """
        assert work.issuance
        changes: dict[str, Any] = {}
        if why in LOSSES:
            loss = LOSSES[why]
            before = work.certificate.status.recent_orders
            text = f"{issuer_name(work.certificate, work.issuance.issuer_ref)} {loss.text}"
            if before and before[-1].outcome == loss.reason:
                raise PermanentError(loss.reason, f"{text} {work.issuance.order_url}, {loss.again}.")
            changes["recent_orders"] = recent(self._observer.observe(work.certificate), work.issuance, loss.reason)
            names = listing(work.issuance.names)
            ending, finding = loss.ending, Finding(loss.reason, f"{text} for {names}. A new one is placed")
        else:
            yield from self._give_up_authorizations(work)
            ending, finding = self._unwanted(work)
        # The write first: it is refused when another leader has gone on, whose key and challenges are not ours to take.
        keys = None
        if work.stored:
            keys = self._secrets.next_keys(self._observer.observe(work.certificate))
            self._write(work, None, Finding(Reason.ORDER_PENDING, "Ordering anew"), issuing=True, **changes)
        self._tell_orders(work, ending, finding)
        yield from self._clean_up(work, keys)

    def _give_up_authorizations(self, work: Work) -> Generator[Any, Any, None]:
        """Deactivate what still waits at the CA for an answer that nobody will give."""
        if work.issuance is None or not work.issuance.order_url or work.state is State.AUTHORIZED:
            return
        try:
            session = self._session(work)
            if order := (yield from self._handed_over(work, session)):
                yield from give_up_authorizations(self._pool(work), session, order)
        except (TemporaryError, PermanentError) as error:
            log.info("%s: the order given up keeps its authorizations: %s", work.certificate.key, error)

    def _concluded(self, work: Work, seen: Observed) -> tuple[Ending, Finding, dict[str, Any]]:
        """How the attempt ended: what is told, and what is recorded."""
        if work.state is State.ISSUED:
            assert work.issuance
            assert work.installed
            return Ending.ISSUED, *success(seen, work.issuance, work.installed)
        assert work.failure
        return Ending.FAILED, *failure(seen, work.issuance, work.failure)

    def _record(self, work: Work, seen: Observed) -> None:
        ending, finding, changes = self._concluded(work, seen)
        self._write(work, None, finding, issuing=False, **changes)
        if not self._tell_orders(work, ending, finding):  # none was placed
            report(self._cluster, "Certificate", work.certificate, finding.reason, finding.message, warning=True)
        problem = work.failure.problem if work.failure else None
        if problem and doubts_account(problem) and work.failure and work.issuance:
            self._accounts.doubt(self._ordered_from(work), work.issuance.account_uri, work.failure)
            self._enqueue(self._ordered_from(work))

    # --- what became of orders ----------------------------------------------------------------------------------------

    def _order_of(self, work: Work) -> str:
        assert work.issuance
        issuer = issuer_name(work.certificate, work.issuance.issuer_ref)
        return f"The order for {listing(work.issuance.names)} at {issuer}"

    def _unwanted(self, work: Work) -> tuple[Ending, Finding]:
        """How an order ends that something else is wanted in place of."""
        seen = self._observer.observe(work.certificate)
        if refused(seen):
            why = "since its names are no longer allowed"
        elif seen.issuer is None:
            why = "since its issuer was deleted"
        else:
            why = "since the Certificate or its issuer asks for something else by now"
        if work.state is State.FINALIZING:
            text = f"{self._order_of(work)} brought a certificate that is not used, {why}"
            return Ending.DISCARDED, Finding(Reason.CERTIFICATE_DISCARDED, text)
        return Ending.ABANDONED, Finding(Reason.ORDER_ABANDONED, f"{self._order_of(work)} is given up, {why}")

    def _tell_orders(self, work: Work, ending: Ending, finding: Finding) -> bool:
        """Say how the order under way ended, once; False when there is none."""
        issuance = work.issuance
        told = issuance is not None and issuance.order_url in work.orders
        if told:
            assert issuance
            report_order(self._cluster, work.certificate, issuance, issuance.order_url, ending, finding)
            work.orders.discard(issuance.order_url)
        self._tell_lost_orders(work, set())
        return told

    def _tell_lost_orders(self, work: Work, but: set[str]) -> None:
        """Say that orders are given up whose URL could not be stored: they are never finalized."""
        for url in sorted(work.orders - but):
            assert work.issuance
            text = f"{self._order_of(work)} is given up, since it could not be stored in status"
            finding = Finding(Reason.ORDER_ABANDONED, text)
            report_order(self._cluster, work.certificate, work.issuance, url, Ending.ABANDONED, finding)
            work.orders.discard(url)

    def _part_with_orders(self, work: Work) -> None:
        """Say what became of orders that are no longer in hand, because the status is not what was left there.

        The record decides, as it is now: it may be our own, written by a request whose answer was lost.
        """
        if not work.orders:
            return
        assert work.issuance
        meta = work.certificate.metadata
        live = self._cluster.get(api.CERTIFICATE, meta.namespace, meta.name)
        status = live.status if live and live.metadata.uid == meta.uid else api.CertificateStatus()
        if status.issuance:
            work.orders.discard(status.issuance.order_url)  # it goes on
        condition = api.find_condition(status.conditions, "Issuing")
        for one in status.recent_orders:
            if one.order_url in work.orders and one.outcome in set(Reason):
                ending = Ending.ISSUED if one.outcome == Reason.ISSUED else Ending.FAILED
                said = condition and condition.reason == one.outcome and condition.message
                finding = Finding(Reason(one.outcome), said or f"{self._order_of(work)} has ended")
                report_order(self._cluster, work.certificate, work.issuance, one.order_url, ending, finding)
                work.orders.discard(one.order_url)
        self._tell_lost_orders(work, set())

    def _clean_up(self, work: Work, keys: list[SecretFacts] | None) -> Generator[Any, Any, None]:
        """Take away what the issuance left, `keys` among it; None where its end was not written to status.

        What fails here is found later: it must not hold up anything.
        """
        try:
            if work.issuance:
                yield from self._challenges.clean_up(work.certificate.metadata.uid, work.issuance)
            if keys is None:
                self._secrets.discard_next_keys(self._observer.observe(work.certificate))
            else:
                self._secrets.drop_next_keys(keys)
        except (TemporaryError, PermanentError) as error:
            log.warning("%s: clean-up is left to the sweep: %s", work.certificate.key, error)

    # --- sweeps: they only heal ---------------------------------------------------------------------------------------

    def sweep_due(self) -> None:
        """Enqueue every Certificate whose renewal or next attempt is due: a clock may have been set, a timer missed."""
        now = self._clock.now()
        for certificate in self._cluster.store(api.CERTIFICATE).all():
            status = certificate.status
            if any(due and due <= now for due in (status.renewal_time, status.next_attempt_time)):
                self._enqueue(certificate_key(certificate))


def _goes_on(work: Work, certificate: Certificate) -> bool:
    """Whether what is remembered is of this Certificate as it is now: another leader may have gone on meanwhile."""
    stored = certificate.status.issuance
    if work.overruled or work.certificate.metadata.uid != certificate.metadata.uid or work.stored != stored:
        return False
    # A request that is not stored yet is for what status said when it was made.
    return stored is not None or work.issuance is None or certificate.status == work.certificate.status


def _committed(work: Work) -> bool:
    """Whether the CA was told to issue, or another leader may be about to: the order is followed to its end."""
    return work.stored is not None and work.stored.state == State.FINALIZING


def _opens(issuer: api.Issuer, account_uri: str) -> bool:
    """Whether the issuer's reconcile sees to it that the account gets open: one of those that the spec wants.

    The key of one that it wants no more may be gone for good, and status names that as long as the order is under way.
    """
    wanted = {slot.secret for slot in slots(issuer)}
    return any(one.uri == account_uri and one.key_secret_name in wanted for one in issuer.status.accounts)


def _deadline(issuance: Issuance) -> datetime:
    """Until when its order is waited for."""
    return issuance.deadline or issuance.started_at + ORDER_LIMIT


def _turn(seen: Observed) -> Turn:
    """When it is its turn to order."""
    if seen.secret and seen.secret.certificate:
        return Turn(first_issuance=False, moment=seen.secret.certificate.not_after.timestamp())
    created = seen.certificate.metadata.creation_timestamp
    return Turn(first_issuance=True, moment=created.timestamp() if created else 0.0)


def _asked(certificate: Certificate) -> tuple[object, ...]:
    """What of a Certificate decides about an order. Somebody may annotate it all the time."""
    meta = certificate.metadata
    return meta.uid, meta.generation, meta.deletion_timestamp, renew_wish(certificate), certificate.status
