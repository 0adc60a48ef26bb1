"""Brings a Certificate to a Secret that holds a certificate for it, and keeps it so.

    observe (caches) -> need, hold (domain.plan) -> one step (CA | solver | Secret) -> advance (domain.issuance) -> ...

goes on through several steps until one must wait. What a crash may lose is written first: the next key pair as a
Secret, the order's URL, the chosen challenges, the intent to finalize. All else (`Work`) is memory, and is found out
again from the CA's order. A step of which the effect is unknown is never repeated blindly: the order is fetched first.

The fences against a second controller are resourceVersion on every Certificate and Secret write and the one name of a
Certificate's next-key Secret; an order whose URL could not be stored is abandoned, never finalized.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec import structs

from certbotk8s.domain import api, pem
from certbotk8s.domain.acme import Identifier
from certbotk8s.domain.errors import Conflict, PermanentError, TemporaryError
from certbotk8s.domain.issuance import Outcome, State, advance, order_outcome
from certbotk8s.domain.names import common_name, listing, names_hash, wanted_names
from certbotk8s.domain.plan import (
    Finding,
    Observed,
    Ownership,
    hold,
    issuer_name,
    need,
    order_set,
    ownership,
    profile,
    request_hash,
    unfit,
    when,
)
from certbotk8s.domain.problems import Side, judge, reason, side
from certbotk8s.domain.reasons import Reason
from certbotk8s.domain.renewal import (
    LOOKS,
    SELF_CHECK_LIMIT,
    SELF_CHECKS,
    STEP_LADDER,
    pause_after_failure,
    renewal_time,
    rung,
)
from certbotk8s.ports import Key, Presentation, call
from certbotk8s.reconcile.claims import Claims
from certbotk8s.reconcile.secrets import CertificateSecrets
from certbotk8s.reconcile.status import report, write_status

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from certbotk8s.domain.acme import Authorization, Order
    from certbotk8s.domain.api import Certificate, Issuance, PendingChallenge, SolverSpec
    from certbotk8s.ports import Clock, Cluster, KeyMaker, Session, Solver, Steps
    from certbotk8s.reconcile.accounts import Account, Accounts

log = logging.getLogger(__name__)

# The indexes of the watched Certificates that are used here and by the responder; `main` declares them.
BY_SECRET = "secret"  # noqa: S105 - the name of an index
BY_ISSUER = "issuer"
BY_ORDER_SET = "order set"
BY_TOKEN = "token"  # noqa: S105

SOLVER_POOL = "solver"

MOMENT = timedelta(milliseconds=100)
# Seconds after which a state is worth a status write: somebody may be looking.
VISIBLE = 1.0
# Seconds after which the authorizations are asked why an order is still pending, and challenges presented again.
PATIENCE = 30.0
# Nothing tells when a Secret that is not ours goes away.
FOREIGN_SECRET_LOOK = timedelta(minutes=5)
ACCOUNT_LOOK = timedelta(seconds=30)
RECENT_ORDERS = 10


def issuer_key(certificate: Certificate) -> Key:
    """The queue key of the Certificate's issuer."""
    ref = certificate.spec.issuer_ref
    return Key(ref.kind, "" if ref.kind == "ClusterIssuer" else certificate.metadata.namespace, ref.name)


def by_secret(certificate: Certificate) -> list[str]:
    """Certificates by the Secret that they name."""
    return [f"{certificate.metadata.namespace}/{certificate.spec.secret_name}"]


def by_issuer(certificate: Certificate) -> list[str]:
    """Certificates by the issuer that they name."""
    return ["/".join(issuer_key(certificate))]


def by_order_set(certificate: Certificate) -> list[str]:
    """Certificates with an order under way, by what CAs tell orders apart by."""
    return [certificate.status.issuance.order_set] if certificate.status.issuance else []


def by_token(certificate: Certificate) -> list[str]:
    """Certificates by the tokens of their pending challenges: what the HTTP-01 responder asks."""
    issuance = certificate.status.issuance
    return [challenge.token for challenge in issuance.challenges] if issuance else []


def presentation_id(uid: str, order_url: str) -> str:
    """What a solver calls the challenges of one order."""
    return hashlib.sha256(f"{uid} {order_url}".encode()).hexdigest()[:20]


def solver_name(spec: SolverSpec) -> str:
    """The entry point of the solver that serves this part of an issuer."""
    return "http01-ingress" if spec.http01 and spec.http01.ingress else ""


@dataclass(frozen=True)
class Wait:
    """The step is not done: look again after this; `finding` says what is waited for."""

    after: timedelta
    finding: Finding


@dataclass(frozen=True)
class Rest:
    """Nothing is under way: come back after this, or only when something changes."""

    after: timedelta | None


@dataclass
class Work:
    """An issuance as this process knows it. `stored` is what stands in status; everything else may be lost.

    `since` (monotonic seconds) is when the state was entered, `due` until when its step waits, `looks` how often the CA or the challenge was looked at
    in it, `errors` how many tries in a row failed, `to_answer` the challenges that the CA waits for us to answer.
    """

    key: Key
    certificate: Certificate
    state: State
    issuance: Issuance | None = None
    stored: Issuance | None = None
    since: float = 0.0
    due: float = 0.0
    looks: int = 0
    errors: int = 0
    shown: object = None
    order: Order | None = None
    to_answer: tuple[str, ...] = ()
    failure: PermanentError | None = None


Step: TypeAlias = "Generator[Any, Any, Outcome | Wait | Rest]"


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
        self._solvers = solvers
        self._accounts = accounts
        self._enqueue = enqueue
        self._works: dict[Key, Work] = {}
        self._claims = Claims(enqueue)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def __call__(self, key: Key) -> Steps:
        """One reconcile: as many steps as go without waiting."""
        certificate = self._cluster.store(api.CERTIFICATE).get(f"{key.namespace}/{key.name}")
        if certificate is None or certificate.metadata.deletion_timestamp:
            yield from self._gone(key)
            return None
        work = self._resume(key, certificate)
        if left := self._still_waiting(work):
            return left
        try:
            return (yield from self._run(work))
        except Conflict:
            # Somebody else wrote: what is known here may be wrong. Whatever was stored is found again.
            self._forget(key)
            raise

    def _run(self, work: Work) -> Steps:
        while True:
            if closed := self._closed(work):
                self._show(work, closed)
                return ACCOUNT_LOOK
            try:
                outcome: Outcome | Wait | Rest
                if self._changed(work):
                    outcome = Outcome.REQUEST_CHANGED
                else:
                    outcome = yield from self._steps[work.state](self, work)
                if outcome in {Outcome.REQUEST_CHANGED, Outcome.ORDER_GONE}:
                    yield from self._leave_order(work)
            except PermanentError as error:
                work.failure, outcome = error, Outcome.REFUSED
            except Conflict:
                raise
            except TemporaryError as error:
                outcome = self._try_later(work, error)
            if isinstance(outcome, Rest):
                return outcome.after
            if isinstance(outcome, Wait):
                work.due = self._clock.monotonic() + outcome.after.total_seconds()
                self._show(work, outcome.finding)
                return outcome.after
            self._move(work, outcome)

    def _still_waiting(self, work: Work) -> timedelta | None:
        """What is left of a step's wait: own writes wake the key too, and must not make it ask the CA sooner."""
        left = work.due - self._clock.monotonic()
        return timedelta(seconds=left) if left > 0 and not self._changed(work) else None

    def _move(self, work: Work, outcome: Outcome) -> None:
        state = advance(work.state, outcome)
        log.debug("%s: %s: %s -> %s", work.certificate.key, outcome, work.state or "none", state or "none")
        if state is not work.state:
            work.since, work.looks, work.shown = self._clock.monotonic(), 0, None
        work.state, work.errors, work.due = state, 0, 0.0
        if state is State.NONE:
            self._claims.release(work.key)
            work.issuance, work.stored, work.order, work.failure, work.to_answer = None, None, None, None, ()

    def _resume(self, key: Key, certificate: Certificate) -> Work:
        """The work under way for this Certificate: as remembered, else as its status tells."""
        work, stored = self._works.get(key), certificate.status.issuance
        if work and work.certificate.metadata.uid == certificate.metadata.uid and work.stored == stored:
            work.certificate = certificate
            return work
        self._forget(key)
        state = State.NONE
        if stored:
            # How far it is, the order tells: both states begin by fetching it. Only Finalizing must never be read as
            # less.
            state = State.FINALIZING if stored.state == State.FINALIZING else State.ORDERED
            self._claims.take(key, stored.order_set)
        work = Work(key, certificate, state, stored, stored, since=self._clock.monotonic())
        self._works[key] = work
        return work

    def _forget(self, key: Key) -> None:
        self._works.pop(key, None)
        self._claims.release(key)

    def _gone(self, key: Key) -> Steps:
        """The Certificate is deleted: Kubernetes removes the next key, we what was presented. The tls Secret stays."""
        work = self._works.get(key)
        self._forget(key)
        if work and work.issuance:
            yield from self._clean_up(work)
        return None

    def _changed(self, work: Work) -> bool:
        """Whether the spec asks for something else than the order under way was placed for."""
        if work.issuance is None or work.state in {State.FINALIZING, State.ISSUED, State.FAILED}:
            return False
        seen = self._observe(work.certificate)
        account = self._account(seen)
        return account is not None and self._asked(seen, account) != work.issuance.request_hash

    # --- looking, showing ---------------------------------------------------------------------------------------------

    def _observe(self, certificate: Certificate) -> Observed:
        meta, ref = certificate.metadata, issuer_key(certificate)
        secret_key = f"{meta.namespace}/{certificate.spec.secret_name}"
        names: tuple[str, ...] = ()
        invalid = None
        try:
            common_name(certificate.spec)
            names = wanted_names(certificate.spec)
        except PermanentError as error:
            invalid = Finding(
                error.reason, f"{error} Nothing is ordered until spec.dnsNames and spec.commonName are mended"
            )
        return Observed(
            certificate=certificate,
            names=names,
            invalid=invalid,
            issuer=self._cluster.store(api.ISSUER_KINDS[ref.kind]).get("/".join(filter(None, ref[1:]))),
            secret=self._cluster.store(pem.SECRET_FACTS).get(secret_key),
            rivals=tuple(
                other
                for other in self._cluster.store(api.CERTIFICATE).find(BY_SECRET, secret_key)
                if other.metadata.uid != meta.uid and not other.metadata.deletion_timestamp
            ),
            now=self._clock.now().replace(microsecond=0),
        )

    def _account(self, seen: Observed) -> Account | None:
        account = self._accounts.of(issuer_key(seen.certificate))
        return account if account and seen.issuer and account.issuer_uid == seen.issuer.metadata.uid else None

    def _asked(self, seen: Observed, account: Account) -> str:
        return request_hash(seen, issuer_uid=account.issuer_uid, account_uri=account.session.account_uri)

    def _session(self, work: Work) -> Session:
        assert work.issuance
        session = self._accounts.session(work.issuance.account_uri)
        assert session  # see _closed
        return session

    def _closed(self, work: Work) -> Finding | None:
        """Just after a start the account may not be open yet: the issuer's reconcile opens it and enqueues this key."""
        if work.state in {State.NONE, State.ISSUED, State.FAILED}:
            return None
        assert work.issuance
        if self._accounts.session(work.issuance.account_uri):
            return None
        text = f"Waiting for {issuer_name(work.certificate)}, which has not opened the account of this order"
        return Finding(Reason.ISSUER_NOT_READY, text)

    def _write(
        self, work: Work, issuance: Issuance | None, finding: Finding | None, *, issuing: bool, **more: Any
    ) -> None:
        seen = self._observe(work.certificate)
        work.certificate = write_status(self._cluster, seen, issuance, finding, issuing=issuing, **more)
        work.stored = issuance

    def _persist(self, work: Work, issuance: Issuance, doing: str) -> None:
        """Remember the issuance before the next step acts on it."""
        self._write(work, issuance, Finding(Reason.ORDER_PENDING, doing), issuing=True)
        work.issuance = issuance

    def _show(self, work: Work, finding: Finding) -> None:
        """Say what a state that lasts waits for: once for each state, and again after each error."""
        visible = work.errors or self._clock.monotonic() - work.since >= VISIBLE
        said = (work.state, work.errors)
        if not visible or work.shown == said:
            return
        work.shown = said
        stored = work.stored and work.issuance and structs.replace(work.issuance, state=work.state)
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
                warning=finding.until is None,
            )

    def _try_later(self, work: Work, error: TemporaryError) -> Wait:
        work.errors += 1
        pause = error.retry_after if error.retry_after is not None else rung(STEP_LADDER, work.errors)
        why = reason(error.problem) if error.problem else Reason.CA_UNAVAILABLE
        again = (
            when(self._clock.now() + pause) if pause >= timedelta(minutes=1) else f"in {pause.total_seconds():.0f} s"
        )
        text = f"{str(error).rstrip('.')}. Next attempt {again}"
        log.info("%s", text, extra={"kind": "Certificate", "object": work.certificate.key, "reason": str(why)})
        return Wait(max(pause, MOMENT), Finding(why, text))

    # --- nothing under way --------------------------------------------------------------------------------------------

    def _rest(self, work: Work) -> Step:
        """Find out whether a certificate is wanted and may be ordered now; then store the next key pair."""
        seen = self._observe(work.certificate)
        wanted = need(seen)
        if wanted is None:
            self._secrets.drop_next_key(seen)
            self._say(work, seen, None)
            assert seen.secret
            assert seen.secret.certificate
            return Rest(renewal_time(work.certificate.spec, seen.secret.certificate) - seen.now)
        if held := hold(seen):
            self._say(work, seen, held)
            return Rest(held.until - seen.now if held.until else None)
        account = self._account(seen)
        if account is None:
            return Rest(None)  # ready, but not yet opened since the start: its reconcile enqueues this key
        # Nothing is ordered on a cache's word.
        meta = work.certificate.metadata
        if self._cluster.get(api.CERTIFICATE, meta.namespace, meta.name) != work.certificate:
            return Rest(MOMENT)
        found = self._secrets.live(work.certificate)
        if found and ownership(found, work.certificate, seen.rivals) is not Ownership.OURS:
            refused = self._secrets.claim(seen, found)
            if refused:
                self._say(work, seen, refused)
            return Rest(FOREIGN_SECRET_LOOK if refused else MOMENT)
        if found and need(replace(seen, secret=found)) is None:
            return Rest(MOMENT)
        same = order_set(seen, account.session.account_uri)
        if holder := self._holder(work.key, same):
            text = f"Waiting for {holder.namespace}/{holder.name}, which is ordering the same names"
            self._say(work, seen, Finding(Reason.SAME_NAMES, text, seen.now + timedelta(minutes=1)))
            return Rest(timedelta(minutes=1))
        asked = self._asked(seen, account)
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
            renew_now=meta.annotations.get(api.ANNOTATION_RENEW_NOW, ""),
        )
        return Outcome.KEY_STORED

    def _holder(self, key: Key, same: str) -> Key | None:
        """The Certificate that is ordering the same names; None when this one may."""
        others = self._cluster.store(api.CERTIFICATE).find(BY_ORDER_SET, same)
        for other in others:
            stored = Key(key.kind, other.metadata.namespace, other.metadata.name)
            if stored != key:
                self._claims.take(stored, same)
        return self._claims.take(key, same)

    # --- the steps ----------------------------------------------------------------------------------------------------

    def _place_order(self, work: Work) -> Step:
        assert work.issuance
        session, seen = self._session(work), self._observe(work.certificate)
        identifiers = [Identifier("dns", name) for name in seen.names]
        order = yield from call(session.account_uri, session.new_order, identifiers, profile(seen))
        outcome = order_outcome(order.status)
        issuance = structs.replace(
            work.issuance,
            state=advance(work.state, outcome),
            order_url=order.url,
            finalize_url=order.finalize,
            deadline=order.expires.replace(microsecond=0) if order.expires else None,
        )
        # At once, before anything else is asked: an order nobody remembers is an order lost.
        self._persist(work, issuance, f"{issuer_name(work.certificate)} took the order for {listing(seen.names)}")
        work.order = order
        return outcome

    def _present(self, work: Work) -> Step:
        """Choose a challenge for each pending authorization, remember the choice, present them all."""
        assert work.issuance
        session = self._session(work)
        order = work.order or (yield from self._fetch_order(work, session))
        if order is None:
            return Outcome.ORDER_GONE
        outcome = order_outcome(order.status)
        if outcome is Outcome.ORDER_INVALID:
            return (yield from self._explain(work, session, order))
        if outcome is not Outcome.ORDER_PENDING:
            work.order = order
            return outcome
        seen = self._observe(work.certificate)
        chosen, to_answer = [], []
        for url in order.authorizations:
            authorization = yield from call(session.account_uri, session.authorization, url)
            if authorization.status == "valid":
                continue
            if authorization.status != "pending":
                raise _authorization_failure(authorization)
            challenge, answered = self._choose(seen, authorization, session)
            chosen.append(challenge)
            to_answer += [] if answered else [challenge.url]
        work.order, work.to_answer = None, tuple(to_answer)
        challenges = tuple(chosen)
        if challenges != work.issuance.challenges:
            names = listing([challenge.identifier for challenge in challenges])
            self._persist(
                work, structs.replace(work.issuance, challenges=challenges), f"Presenting the challenge for {names}"
            )
        for solver, presentation in self._presentations(seen, work):
            yield from call(SOLVER_POOL, solver.present, presentation)
        return Outcome.PRESENTED

    def _choose(self, seen: Observed, authorization: Authorization, session: Session) -> tuple[PendingChallenge, bool]:
        """The challenge to solve for a pending authorization, and whether it was answered already."""
        name = f"*.{authorization.identifier.value}" if authorization.wildcard else authorization.identifier.value
        offered = {challenge.type: challenge for challenge in authorization.challenges}
        specs = seen.issuer.spec.acme.solvers if seen.issuer else ()
        for spec in specs:
            solver = self._solvers.get(solver_name(spec))
            challenge = offered.get(solver.challenge_type) if solver else None
            if challenge and challenge.token:
                chosen = api.PendingChallenge(
                    identifier=name,
                    type=challenge.type,
                    url=challenge.url,
                    token=challenge.token,
                    key_authorization=session.key_authorization(challenge.token),
                    solver=solver_name(spec),
                )
                return chosen, challenge.status != "pending"
        solvable = sorted({s.challenge_type for spec in specs if (s := self._solvers.get(solver_name(spec)))})
        raise PermanentError(
            Reason.NOT_PREAUTHORIZED,
            f"The CA has not validated {name} for this account and offers {listing(sorted(offered)) or 'no challenge'};"
            f" {issuer_name(seen.certificate)} solves {listing(solvable) or 'none'}. "
            "Have the name validated at the CA, or add a solver to the issuer.",
        )

    def _presentations(self, seen: Observed, work: Work) -> list[tuple[Solver, Presentation]]:
        """What each solver has to serve for this order; its settings are read again from the issuer each time."""
        assert work.issuance
        ident = presentation_id(seen.certificate.metadata.uid, work.issuance.order_url)
        found = []
        for spec in seen.issuer.spec.acme.solvers if seen.issuer else ():
            mine = tuple(each for each in work.issuance.challenges if each.solver == solver_name(spec))
            if mine:
                found.append((self._solvers[mine[0].solver], Presentation(ident, seen.certificate, spec, mine)))
        return found

    def _submit(self, work: Work) -> Step:
        """Look once whether each challenge is served as seen from here; then tell the CA to validate."""
        session, seen = self._session(work), self._observe(work.certificate)
        waited = self._clock.monotonic() - work.since
        for solver, presentation in self._presentations(seen, work) if work.to_answer else []:
            missing = yield from call(SOLVER_POOL, solver.is_ready, presentation)
            if missing and waited < SELF_CHECK_LIMIT.total_seconds():
                if waited > PATIENCE:
                    # Somebody may have deleted what was presented.
                    yield from call(SOLVER_POOL, solver.present, presentation)
                pause = SELF_CHECKS[min(work.looks, len(SELF_CHECKS) - 1)]
                work.looks += 1
                asks = when(seen.now + SELF_CHECK_LIMIT - timedelta(seconds=waited))
                text = f"Waiting for the challenge to be served: {missing}. The CA is asked {asks} all the same"
                return Wait(pause, Finding(Reason.ORDER_PENDING, text))
        for url in work.to_answer:
            yield from call(session.account_uri, session.answer, url)
        work.to_answer = ()
        return Outcome.SUBMITTED

    def _await_validation(self, work: Work) -> Step:
        session = self._session(work)
        if work.looks == 0:
            return self._look_again(work, None)
        order = yield from self._fetch_order(work, session)
        if order is None:
            return Outcome.ORDER_GONE
        outcome = order_outcome(order.status)
        late = self._clock.monotonic() - work.since > PATIENCE
        if outcome is Outcome.ORDER_INVALID or (outcome is Outcome.ORDER_PENDING and late):
            outcome = yield from self._explain(work, session, order)
        return self._look_again(work, order) if outcome is Outcome.ORDER_PENDING else outcome

    def _finalize(self, work: Work) -> Step:
        assert work.issuance
        session, seen, issuance = self._session(work), self._observe(work.certificate), work.issuance
        pair = self._secrets.next_key(work.certificate)
        if pair is None:
            # Before finalize a lost key costs nothing: a new one, for the same order.
            yield from self._secrets.store_next_key(seen, issuance.request_hash, seen.secret)
            pair = self._secrets.next_key(work.certificate)
            if pair is None:
                raise TemporaryError("The Secret with the next key is removed again and again")
        csr = pair[1]
        issuance = structs.replace(issuance, state=State.FINALIZING)
        self._persist(work, issuance, f"Waiting for {issuer_name(work.certificate)} to issue for {listing(seen.names)}")
        # From here on an error leaves open whether the CA got it: the next step is to look, not to send again.
        self._move(work, Outcome.FINALIZED)
        order = yield from call(session.account_uri, session.finalize, issuance.finalize_url, csr)
        if order.status == "valid" and order.certificate:
            work.order = order
            return Outcome.ORDER_VALID
        return self._look_again(work, order)

    def _collect(self, work: Work) -> Step:
        """Finalize was, or may have been, sent: see how far the order is; fetch, check and install the certificate."""
        assert work.issuance
        session, certificate = self._session(work), work.certificate
        order = work.order or (yield from self._fetch_order(work, session))
        work.order = None
        if order is None:
            raise PermanentError(
                Reason.ORDER_GONE,
                f"{issuer_name(certificate)} no longer knows the finalized order {work.issuance.order_url}.",
            )
        outcome = order_outcome(order.status)
        if outcome is Outcome.ORDER_INVALID:
            return (yield from self._explain(work, session, order))
        if outcome is Outcome.ORDER_PROCESSING or (outcome is Outcome.ORDER_VALID and not order.certificate):
            return self._look_again(work, order)
        if outcome is not Outcome.ORDER_VALID:
            return outcome
        chain = yield from call(session.account_uri, session.certificate, order.certificate)
        seen, pair = self._observe(certificate), self._secrets.next_key(certificate)
        if pair is None:
            raise PermanentError(
                Reason.KEY_LOST, "The Secret with the key of this order was deleted; its certificate is of no use."
            )
        try:
            key_hash = pem.private_key_facts(pair[0])[0]
        except ValueError as error:
            raise PermanentError(Reason.KEY_LOST, f"The Secret with the key of this order holds {error}.") from error
        if why := pem.refusal(chain, key_hash, seen.names, seen.now):
            account = self._account(seen)
            if account and self._asked(seen, account) != work.issuance.request_hash:
                return Outcome.REQUEST_CHANGED
            raise PermanentError(
                Reason.CERTIFICATE_REJECTED, f"The certificate from {issuer_name(certificate)} is not used: {why}."
            )
        self._secrets.install(seen, chain, pair[0], work.issuance.account_uri)
        return Outcome.STORED

    def _conclude(self, work: Work) -> Step:
        """Record the end of the attempt, then clean up: neither Ready nor the next issuance waits for that."""
        (self._record_success if work.state is State.ISSUED else self._record_failure)(work)
        yield from self._clean_up(work)
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
        """The order as the CA has it; None when the CA does not know it any more."""
        assert work.issuance
        url = work.issuance.order_url
        try:
            order: Order = yield from call(session.account_uri, session.order, url)
        except PermanentError as error:
            if error.reason is Reason.ORDER_GONE:
                return None
            raise
        return order

    def _look_again(self, work: Work, order: Order | None) -> Wait:
        """When to look at the order next: the CA's Retry-After, else ever later; until the order's own deadline."""
        assert work.issuance
        deadline = work.issuance.deadline
        if deadline and self._clock.now() > deadline:
            raise PermanentError(
                Reason.ORDER_GONE, f"The CA did not finish the order before it expired {when(deadline)}."
            )
        pause = LOOKS[min(work.looks, len(LOOKS) - 1)]
        if order and order.retry_after is not None:
            pause = max(order.retry_after, MOMENT)
        work.looks += 1
        issuer, names = issuer_name(work.certificate), listing(self._observe(work.certificate).names)
        doing = f"check {names}" if work.state is State.SUBMITTED else f"issue for {names}"
        status = f" (order {order.status} since {when(work.issuance.started_at)})" if order else ""
        return Wait(pause, Finding(Reason.ORDER_PENDING, f"Waiting for {issuer} to {doing}{status}"))

    def _explain(self, work: Work, session: Session, order: Order) -> Generator[Any, Any, Outcome]:
        """Why an order is invalid, or still pending: its authorizations know. Raises PermanentError with the reason."""
        for url in order.authorizations:
            authorization = yield from call(session.account_uri, session.authorization, url)
            if authorization.status not in {"pending", "valid"}:
                raise _authorization_failure(authorization)
        if order_outcome(order.status) is not Outcome.ORDER_INVALID:
            return Outcome.ORDER_PENDING
        names = listing(self._observe(work.certificate).names)
        if order.error:
            failure = judge(order.error, retry_after=None, doing=f"issuing for {names}")
            raise failure
        raise PermanentError(Reason.ORDER_INVALID, f"The CA gave up the order for {names} and does not say why.")

    def _leave_order(self, work: Work) -> Generator[Any, Any, None]:
        """Give the order up without counting a failure: the spec asks for something else, or the order expired."""
        assert work.issuance
        session = self._accounts.session(work.issuance.account_uri)
        try:
            if session and work.issuance.challenges:
                order = yield from self._fetch_order(work, session)
                for url in order.authorizations if order else ():
                    authorization = yield from call(session.account_uri, session.authorization, url)
                    if authorization.status == "pending":
                        yield from call(session.account_uri, session.deactivate, url)
        except (TemporaryError, PermanentError) as error:
            log.info("%s: the order given up keeps its authorizations: %s", work.certificate.key, error)
        yield from self._clean_up(work)
        if work.stored:
            self._write(work, None, Finding(Reason.ORDER_PENDING, "Ordering anew"), issuing=True)

    def _record_success(self, work: Work) -> None:
        assert work.issuance
        seen, status = self._observe(work.certificate), work.certificate.status
        assert seen.secret
        facts = seen.secret.certificate
        assert facts
        finding = Finding(
            Reason.ISSUED,
            f"Certificate for {listing(seen.names)} from {issuer_name(seen.certificate)} written to Secret "
            f"{seen.secret.key}: valid until {when(facts.not_after)}, "
            f"renews {when(renewal_time(seen.certificate.spec, facts))}",
        )
        self._write(
            work,
            None,
            finding,
            issuing=False,
            issuer_ref=work.issuance.issuer_ref,
            account_uri=work.issuance.account_uri,
            revision=status.revision + 1,
            renew_now=work.issuance.renew_now,
            failed_attempts=0,
            last_failure_time=None,
            next_attempt_time=None,
            last_problem=None,
            recent_orders=self._recent(work, Reason.ISSUED),
        )
        report(self._cluster, "Certificate", work.certificate, Reason.ISSUED, finding.message)

    def _record_failure(self, work: Work) -> None:
        assert work.failure
        error, seen = work.failure, self._observe(work.certificate)
        failures = work.certificate.status.failed_attempts + 1
        usable = seen.secret.certificate if seen.secret and unfit(seen) is None else None
        ca_side = error.reason in CA_REASONS or bool(error.problem and side(error.problem) is Side.CA)
        until = seen.now + pause_after_failure(failures, ca_side=ca_side, certificate=usable, now=seen.now)
        keeps = f" The present certificate is valid until {when(usable.not_after)}" if usable else ""
        message = f"{str(error).rstrip('.')}. Next attempt {when(until)}.{keeps}"
        problem = error.problem
        last = api.LastProblem(problem.type, problem.words()[:1024], problem.identifiers()[:100]) if problem else None
        self._write(
            work,
            None,
            Finding(error.reason, message),
            issuing=False,
            failed_attempts=failures,
            last_failure_time=seen.now,
            next_attempt_time=until,
            last_problem=last,
            recent_orders=self._recent(work, error.reason),
        )
        report(self._cluster, "Certificate", work.certificate, error.reason, message, warning=True)
        if error.reason is Reason.ACCOUNT_UNKNOWN:
            self._accounts.close(issuer_key(work.certificate))
            self._enqueue(issuer_key(work.certificate))

    def _recent(self, work: Work, outcome: Reason) -> tuple[api.RecentOrder, ...]:
        seen, meta, issuance = self._observe(work.certificate), work.certificate.metadata, work.issuance
        order = api.RecentOrder(
            time=seen.now,
            set_hash=names_hash(seen.names),
            generation=issuance.generation if issuance else meta.generation,
            outcome=outcome,
            renew_now=issuance.renew_now if issuance else meta.annotations.get(api.ANNOTATION_RENEW_NOW, ""),
            account_uri=issuance.account_uri if issuance else "",
        )
        return (*work.certificate.status.recent_orders, order)[-RECENT_ORDERS:]

    def _clean_up(self, work: Work) -> Generator[Any, Any, None]:
        """Take away what the issuance left. What fails here is found by the sweep: it must not hold up anything."""
        try:
            if work.issuance and work.issuance.challenges:
                ident = presentation_id(work.certificate.metadata.uid, work.issuance.order_url)
                for name in {challenge.solver for challenge in work.issuance.challenges} & set(self._solvers):
                    yield from call(SOLVER_POOL, self._solvers[name].clean_up, ident)
            self._secrets.drop_next_key(self._observe(work.certificate))
        except (TemporaryError, PermanentError) as error:
            log.warning("%s: clean-up is left to the sweep: %s", work.certificate.key, error)

    # --- sweeps: they only heal ---------------------------------------------------------------------------------------

    def sweep_due(self) -> None:
        """Enqueue every Certificate whose renewal or next attempt is due: a clock may have been set, a timer missed."""
        now = self._clock.now()
        for certificate in self._cluster.store(api.CERTIFICATE).all():
            status = certificate.status
            if any(due and due <= now for due in (status.renewal_time, status.next_attempt_time)):
                self._enqueue(Key("Certificate", certificate.metadata.namespace, certificate.metadata.name))

    def sweep_challenges(self) -> None:
        """Remove what is presented for no order: a crash between an order's end and its clean-up leaves that."""
        live = {
            presentation_id(certificate.metadata.uid, certificate.status.issuance.order_url)
            for certificate in self._cluster.store(api.CERTIFICATE).all()
            if certificate.status.issuance
        }
        for solver in self._solvers.values():
            for left in [ident for ident in solver.leftovers() if ident not in live]:
                log.info("Removing challenge %s, which belongs to no order", left)
                try:
                    solver.clean_up(left)
                except (TemporaryError, PermanentError) as error:
                    log.warning("Challenge %s is left to the next sweep: %s", left, error)


# Failures that say nothing about the names: the next attempt need not spare them.
CA_REASONS = {Reason.ORDER_GONE, Reason.KEY_LOST, Reason.CERTIFICATE_REJECTED}


def _authorization_failure(authorization: Authorization) -> PermanentError:
    """Why an authorization that is neither pending nor valid ended, in the CA's words."""
    name = authorization.identifier.value
    problem = next((challenge.error for challenge in authorization.challenges if challenge.error), None)
    if problem is None:
        return PermanentError(
            Reason.CHALLENGE_FAILED, f"The authorization for {name} is {authorization.status}; the CA does not say why."
        )
    named = structs.replace(problem, identifier=problem.identifier or name)
    failure = judge(structs.replace(named, status=0), retry_after=None, doing=f"validating {name}")
    assert isinstance(failure, PermanentError)
    return failure
