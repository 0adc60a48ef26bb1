"""Brings an Issuer or ClusterIssuer to open accounts at its CA, and says how they are.

How one account is opened is reconcile.opening; this looks when that is due, and writes status. The Secrets that an
issuer names are watched: what somebody changes there is seen at once.
"""

from __future__ import annotations

import base64
import binascii
import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from msgspec import structs

from certbotk8s.domain import api
from certbotk8s.domain.errors import Conflict, PermanentError, TemporaryError
from certbotk8s.domain.names import listing
from certbotk8s.domain.plan import Finding, set_condition, when
from certbotk8s.domain.policy import check_policy
from certbotk8s.domain.problems import reason
from certbotk8s.domain.reasons import Reason
from certbotk8s.domain.renewal import STEP_LADDER, rung
from certbotk8s.ports import Key, Server
from certbotk8s.reconcile import keyring
from certbotk8s.reconcile.indexes import BY_ISSUER, BY_ORDERED_FROM, certificate_key, store_index, store_key
from certbotk8s.reconcile.opening import Opening, slots
from certbotk8s.reconcile.status import report

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from certbotk8s.domain.api import AccountStatus, Issuer
    from certbotk8s.domain.errors import Problem
    from certbotk8s.ports import Authority, Clock, Cluster, KeyMaker, Steps
    from certbotk8s.reconcile.accounts import Account, Accounts, Inputs
    from certbotk8s.reconcile.opening import Slot

log = logging.getLogger(__name__)

# A refusal is for good until somebody changes something; once an hour a change on the CA's side is looked for.
REFUSED_PAUSE = timedelta(hours=1)
# How often it is looked whether orders under way still need a former account, or tried again to tell the contact.
SETTLING_PAUSE = timedelta(minutes=5)
# What only a change of a Secret mends.
_IN_SECRETS = frozenset(
    {Reason.EAB_SECRET_MISSING, Reason.EAB_KEY_INVALID, Reason.ACCOUNT_KEY_MISSING, Reason.ACCOUNT_KEY_INVALID}
)


@dataclass(frozen=True)
class Attempt:
    """The last try to open an account, which failed: with what, how it ended, when the next one is due."""

    inputs: Inputs
    finding: Finding
    problem: Problem | None
    errors: int
    due: float


class IssuerReconciler:
    """Reconciles Issuers and ClusterIssuers; `namespace` is where a ClusterIssuer's Secrets are."""

    def __init__(
        self,
        *,
        cluster: Cluster,
        clock: Clock,
        authority: Authority,
        key_maker: KeyMaker,
        accounts: Accounts,
        namespace: str,
        enqueue: Callable[[Key], None],
        servers: Sequence[str] = (),
    ) -> None:
        """`servers` are the only ones that Issuers may name; none: any. ClusterIssuers are the administrators' own."""
        self._servers = servers
        self._cluster = cluster
        self._clock = clock
        self._authority = authority
        self._key_maker = key_maker
        self._accounts = accounts
        self._namespace = namespace
        self._enqueue = enqueue
        self._attempts: dict[Key, dict[str, Attempt]] = {}
        self._watched: dict[Key, dict[str, Callable[[], None]]] = {}

    def __call__(self, key: Key) -> Steps:
        """One reconcile: open the accounts that are not open for the present spec, keys and bindings."""
        issuer = self._cluster.store(api.ISSUER_KINDS[key.kind]).get(store_key(key))
        wanted = slots(issuer) if issuer and not issuer.metadata.deletion_timestamp else ()
        names = {slot.name for slot in wanted}
        self._watch(key, {name for slot in wanted for name in _secrets(slot)})
        self._accounts.close_all(key, but=names)
        attempts = {name: one for name, one in self._attempts.pop(key, {}).items() if name in names}
        if issuer is None or not wanted:
            return None
        self._attempts[key] = attempts
        former = self._former(key, issuer, wanted)
        for account in former:
            self._keep(key, issuer, account)
        pauses: list[timedelta | None] = [SETTLING_PAUSE if former else None]
        for slot in wanted:
            pauses.append((yield from self._attend(key, issuer, slot, attempts)))
        self._write(key, issuer, wanted, former)
        return min((pause for pause in pauses if pause), default=None)

    def _former(self, key: Key, issuer: Issuer, wanted: Sequence[Slot]) -> tuple[AccountStatus, ...]:
        """Accounts that the spec has no more, which orders under way name: those are collected with them.

        Of a binding that was removed, or of another `privateKeySecretRef`. What became of accounts whose Secret is
        still in use stands in that (reconcile.opening).
        """
        in_use = {slot.secret for slot in wanted}
        under_way = {
            certificate.status.issuance.account_uri
            for certificate in self._cluster.store(api.CERTIFICATE).find(BY_ORDERED_FROM, store_index(key))
            if certificate.status.issuance
        }
        return tuple(
            one for one in issuer.status.accounts if one.uri in under_way and one.key_secret_name not in {"", *in_use}
        )

    def _keep(self, key: Key, issuer: Issuer, former: AccountStatus) -> None:
        """Its session, from its own Secret, which alone proves whose key it is: status is only where to look."""
        if self._accounts.session(key, former.uri):
            return
        secret = self._cluster.get(api.SECRET, key.namespace or self._namespace, former.key_secret_name)
        if secret is None:
            return
        acme = issuer.spec.acme
        ring = keyring.read(secret, acme.private_key_secret_ref.key or keyring.ACCOUNT_KEY)
        for known in ring.notes.accounts:
            account_key = known.key.encode() or ring.key
            try:
                if known.uri == former.uri and self._authority.thumbprint(account_key) == known.thumbprint:
                    server = Server(known.server, _ca_bundle(acme.ca_bundle))
                    self._accounts.keep(key, self._authority.session(server, account_key, known.uri))
            except PermanentError as error:
                about = {"kind": key.kind, "object": issuer.key, "reason": str(error.reason)}
                log.warning("The former account %s cannot be used: %s", former.uri, error, extra=about)

    def _attend(
        self, key: Key, issuer: Issuer, slot: Slot, attempts: dict[str, Attempt]
    ) -> Generator[Any, Any, timedelta | None]:
        """Open one account, if that is due; when to look at it again."""
        home = key.namespace or self._namespace
        binding = slot.binding
        opening = Opening(
            key=key,
            issuer=issuer,
            slot=slot,
            home=home,
            secret=self._cluster.get(api.SECRET, home, slot.secret),
            binding_secret=self._cluster.get(api.SECRET, home, binding.key_secret_ref.name) if binding else None,
            cluster=self._cluster,
            authority=self._authority,
            key_maker=self._key_maker,
            accounts=self._accounts,
        )
        account, inputs = self._accounts.of(key, slot.name), opening.inputs()
        if account and account.inputs == inputs and not account.unsettled:
            return None
        last = attempts.get(slot.name)
        if last and last.inputs == inputs:
            left = last.due - self._clock.monotonic()
            if left > 0:
                return timedelta(seconds=left)
        else:
            last = None
        try:
            self._check(key, issuer)
            account = yield from opening.run(Server(issuer.spec.acme.server, _ca_bundle(issuer.spec.acme.ca_bundle)))
        except Conflict:
            raise
        except (PermanentError, TemporaryError) as error:
            attempts[slot.name] = self._failed(opening, error, last)
            self._accounts.close(key, slot.name)
            return timedelta(seconds=attempts[slot.name].due - self._clock.monotonic())
        attempts.pop(slot.name, None)
        before = self._accounts.of(key, slot.name)
        self._accounts.put(key, account)
        if before is None or before.inputs != account.inputs:
            for certificate in self._cluster.store(api.CERTIFICATE).find(BY_ISSUER, store_index(key)):
                self._enqueue(certificate_key(certificate))
        return SETTLING_PAUSE if account.unsettled else None

    def _check(self, key: Key, issuer: Issuer) -> None:
        check_policy(issuer)
        server = issuer.spec.acme.server
        if self._servers and key.kind == "Issuer" and server not in self._servers:
            raise PermanentError(
                Reason.SERVER_NOT_ALLOWED,
                f"Issuers of this cluster may not use {server}. Allowed are {listing(self._servers, most=20)}; "
                "others go with a ClusterIssuer, or when an administrator adds them to --issuer-servers.",
            )

    def _failed(self, opening: Opening, error: PermanentError | TemporaryError, last: Attempt | None) -> Attempt:
        text, errors = str(error).rstrip("."), last.errors + 1 if last else 1
        if isinstance(error, TemporaryError):
            pause = error.retry_after or rung(STEP_LADDER, errors)
            why = reason(error.problem) if error.problem else Reason.CA_UNAVAILABLE
            text = f"{text}. Tried again by itself"
        else:
            pause, why = REFUSED_PAUSE, error.reason
            if why in _IN_SECRETS:
                text = f"{text}. This goes on by itself when the Secret changes"
            else:
                again = when(self._clock.now() + pause)
                text = f"{text}. Next attempt {again}, or at once when the issuer or its Secret changes"
        due = self._clock.monotonic() + pause.total_seconds()
        return Attempt(opening.inputs(), Finding(why, text), error.problem, errors, due)

    def _watch(self, key: Key, secrets: set[str]) -> None:
        """Be told when one of these Secrets changes, and no other."""
        watched = self._watched.pop(key, {})
        for name in watched.keys() - secrets:
            watched.pop(name)()
        for name in sorted(secrets - watched.keys()):
            home = key.namespace or self._namespace
            watched[name] = self._cluster.watch_secret(home, name, lambda: self._enqueue(key))
        if watched:
            self._watched[key] = watched

    # --- saying it ----------------------------------------------------------------------------------------------------

    def _write(self, key: Key, issuer: Issuer, wanted: Sequence[Slot], former: tuple[AccountStatus, ...]) -> None:
        """Ready when all accounts are open; else what those say that are not."""
        meta, before = issuer.metadata, issuer.status
        attempts = self._attempts[key]
        failed = [attempts[slot.name] for slot in wanted if slot.name in attempts]
        opened = {slot.name: self._accounts.of(key, slot.name) for slot in wanted if slot.name not in attempts}
        there = [account for account in opened.values() if account]
        if failed:
            finding = Finding(
                failed[0].finding.reason,
                _each(
                    issuer, {slot.name: attempts[slot.name].finding.message for slot in wanted if slot.name in attempts}
                ),
            )
        elif len(there) == len(wanted):
            finding = Finding(
                Reason.ACCOUNT_REGISTERED,
                _each(issuer, {account.status.name: _ready(account, issuer) for account in there}),
            )
        else:
            return  # one was closed just now, and its reconcile is on the way
        problem = next((attempt.problem for attempt in failed if attempt.problem), None)
        known = {account.key_secret_name: account for account in before.accounts}
        known |= {account.status.key_secret_name: account.status for account in there}
        rolled = {account.rollover for account in there}
        condition = api.find_condition(before.conditions, "Ready")
        status = structs.replace(
            before,
            conditions=set_condition(
                before.conditions,
                "Ready",
                status=not failed,
                finding=finding,
                generation=meta.generation,
                now=self._clock.now(),
            ),
            observed_generation=meta.generation,
            accounts=(*(known[slot.secret] for slot in wanted if slot.secret in known), *former),
            rollover=rolled.pop() if len(rolled) == 1 and not failed else before.rollover,
            last_problem=api.LastProblem(problem.type, problem.words()[:1024]) if problem else None,
        )
        if status == before:
            return
        manifest = {
            "apiVersion": api.API_VERSION,
            "kind": key.kind,
            "metadata": {
                "name": meta.name,
                **({"namespace": meta.namespace} if meta.namespace else {}),
                "uid": meta.uid,
                "resourceVersion": meta.resource_version,
            },
            "status": api.to_wire(status),
        }
        written = self._cluster.apply(api.ISSUER_KINDS[key.kind], manifest, subresource="status")
        if condition is None or (condition.status, condition.reason) != ("False" if failed else "True", finding.reason):
            report(self._cluster, key.kind, written, finding.reason, finding.message, warning=bool(failed))


def _secrets(slot: Slot) -> tuple[str, ...]:
    return (slot.secret, slot.binding.key_secret_ref.name) if slot.binding else (slot.secret,)


def _each(issuer: Issuer, said: dict[str, str]) -> str:
    """What is said of each account; of the only one without its name."""
    named = issuer.spec.acme.bindings
    return "; ".join(f"{name}: {text}" if named else text for name, text in said.items())


def _ready(account: Account, issuer: Issuer) -> str:
    status = account.status
    bound = f", bound to key id {status.bound_key_id}" if status.bound_key_id else ""
    text = f"Account {status.uri} at {issuer.spec.acme.server} is ready{bound}"
    return f"{text}. {account.note}".rstrip(".") if account.note else text


def _ca_bundle(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PermanentError(
            Reason.CA_BUNDLE_INVALID, "spec.acme.caBundle is not base64 of PEM certificates; correct it."
        ) from error
