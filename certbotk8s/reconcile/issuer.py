"""Brings an Issuer or ClusterIssuer to an open account at its CA.

The account key and, beside it, the account's URI are in the Secret that `privateKeySecretRef` names: after a restart
the account is open without a request. The CA is asked for the account of a key first (`onlyReturnExisting`), and only
when it knows none is one registered: an external account binding may be good for one use.
"""

from __future__ import annotations

import base64
import binascii
import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from msgspec import structs

from certbotk8s.domain import api, pem
from certbotk8s.domain.errors import AlreadyExists, Conflict, PermanentError, TemporaryError
from certbotk8s.domain.names import listing
from certbotk8s.domain.plan import Finding, issuer_ready, set_condition, when
from certbotk8s.domain.problems import reason
from certbotk8s.domain.reasons import Reason
from certbotk8s.domain.renewal import STEP_LADDER, rung
from certbotk8s.ports import Binding, Key, Server, call
from certbotk8s.reconcile.accounts import Account
from certbotk8s.reconcile.indexes import BY_ISSUER, certificate_key, store_index, store_key
from certbotk8s.reconcile.status import report

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from certbotk8s.domain.api import Issuer
    from certbotk8s.domain.errors import Problem
    from certbotk8s.ports import Authority, Clock, Cluster, KeyMaker, Steps
    from certbotk8s.reconcile.accounts import Accounts

log = logging.getLogger(__name__)

# Members of the account key's Secret and of the binding's, where the reference names none.
ACCOUNT_KEY = "tls.key"
HMAC_KEY = "secret"
# Beside the account key: at which server its account is.
SERVER_KEY = "server"
# A refusal is for good until somebody changes something; once an hour a change on the CA's side is looked for.
REFUSED_PAUSE = timedelta(hours=1)


@dataclass(frozen=True)
class Attempt:
    """The last try to open the account, which failed: with what, how it ended, when the next one is due."""

    generation: int
    binding_version: str
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
        self._attempts: dict[Key, Attempt] = {}
        self._watched: dict[Key, tuple[str, Callable[[], None]]] = {}

    def __call__(self, key: Key) -> Steps:
        """One reconcile: open the account if it is not open for the present spec."""
        issuer = self._cluster.store(api.ISSUER_KINDS[key.kind]).get(store_key(key))
        if issuer is None or issuer.metadata.deletion_timestamp:
            self._accounts.close(key)
            self._attempts.pop(key, None)
            self._watch(key, "")
            return None
        binding = issuer.spec.acme.external_account_binding
        self._watch(key, binding.key_secret_ref.name if binding else "")
        account = self._accounts.of(key)
        meta = issuer.metadata
        if account and (account.issuer_uid, account.generation) == (meta.uid, meta.generation):
            return None
        secret = self._cluster.get(api.SECRET, self._home(key), binding.key_secret_ref.name) if binding else None
        version = secret.metadata.resource_version if secret else ""
        last = self._attempts.get(key)
        if last and (last.generation, last.binding_version) == (meta.generation, version):
            left = last.due - self._clock.monotonic()
            if left > 0:
                self._write_failure(key, issuer, last)  # once more, where that did not succeed
                return timedelta(seconds=left)
        else:
            last = None
        try:
            yield from self._open(key, issuer, secret)
        except Conflict:
            raise
        except PermanentError as error:
            pause = REFUSED_PAUSE
            if error.reason in {Reason.EAB_SECRET_MISSING, Reason.EAB_KEY_INVALID}:
                text = f"{str(error).rstrip('.')}. This goes on by itself when the Secret changes"
            else:
                again = when(self._clock.now() + pause)
                text = (
                    f"{str(error).rstrip('.')}. Next attempt {again}, or at once when the issuer or its Secret changes"
                )
            finding, problem, errors = Finding(error.reason, text), error.problem, 1
        except TemporaryError as error:
            errors = last.errors + 1 if last else 1
            pause = error.retry_after or rung(STEP_LADDER, errors)
            why = reason(error.problem) if error.problem else Reason.CA_UNAVAILABLE
            finding, problem = Finding(why, f"{str(error).rstrip('.')}. Tried again by itself"), error.problem
        else:
            self._attempts.pop(key, None)
            return None
        attempt = Attempt(meta.generation, version, finding, problem, errors, self._due(pause))
        self._attempts[key] = attempt
        self._accounts.close(key)
        self._write_failure(key, issuer, attempt)
        return pause

    def _due(self, pause: timedelta) -> float:
        return self._clock.monotonic() + pause.total_seconds()

    def _home(self, key: Key) -> str:
        return key.namespace or self._namespace

    def _watch(self, key: Key, secret: str) -> None:
        """Be told when the binding's Secret changes; "" for none."""
        watched = self._watched.get(key)
        if watched and watched[0] == secret:
            return
        if watched:
            watched[1]()
            del self._watched[key]
        if secret:
            stop = self._cluster.watch_secret(self._home(key), secret, lambda: self._enqueue(key))
            self._watched[key] = (secret, stop)

    # --- the account --------------------------------------------------------------------------------------------------

    def _open(self, key: Key, issuer: Issuer, binding_secret: api.Secret | None) -> Generator[Any, Any, None]:
        acme = issuer.spec.acme
        if self._servers and key.kind == "Issuer" and acme.server not in self._servers:
            raise PermanentError(
                Reason.SERVER_NOT_ALLOWED,
                f"Issuers of this cluster may not use {acme.server}. Allowed are {listing(self._servers, most=20)}; "
                "others go with a ClusterIssuer, or when an administrator adds them to --issuer-servers.",
            )
        server = Server(acme.server, _ca_bundle(acme.ca_bundle))
        secret = self._account_secret(key, issuer)
        member = acme.private_key_secret_ref.key or ACCOUNT_KEY
        key_pem = pem.secret_value(secret.data, member)
        if not key_pem:
            raise PermanentError(
                Reason.ACCOUNT_KEY_INVALID,
                f"Secret {secret.key}, which spec.acme.privateKeySecretRef names, has no member {member}.",
            )
        uri = secret.metadata.annotations.get(api.ANNOTATION_ACCOUNT_URI, "")
        known = (
            uri
            and pem.secret_value(secret.data, SERVER_KEY).decode(errors="replace") == acme.server
            and not self._accounts.is_doubted(key, uri)
        )
        bound = next((account.bound_key_id for account in issuer.status.accounts if account.uri == uri), "")
        if not known:
            uri, bound = yield from self._register(key, issuer, server, key_pem, binding_secret)
            self._keep_uri(secret, uri, acme.server)
        ready = issuer_ready(issuer)
        if not known or ready is None or ready.status != "True":
            # Of a new or changed spec the profile is checked; an account reopened after a restart asks nothing.
            yield from self._check_profile(issuer, server)
        session = self._authority.session(server, key_pem, uri)
        account = api.AccountStatus(
            name="default",
            uri=uri,
            key_thumbprint=self._authority.thumbprint(key_pem),
            bound_key_id=bound,
            contact=acme.email,
        )
        to = f", bound to key id {bound}" if bound else ""
        finding = Finding(Reason.ACCOUNT_REGISTERED, f"Account {uri} at {acme.server} is ready{to}")
        self._write(key, issuer, finding, ready=True, accounts=(account,), last_problem=None)
        meta = issuer.metadata
        self._accounts.put(key, Account(session, meta.uid, meta.generation))
        for certificate in self._cluster.store(api.CERTIFICATE).find(BY_ISSUER, store_index(key)):
            self._enqueue(certificate_key(certificate))

    def _register(
        self, key: Key, issuer: Issuer, server: Server, key_pem: bytes, binding_secret: api.Secret | None
    ) -> Generator[Any, Any, tuple[str, str]]:
        """(account URI, key id bound to) of the account of this key, found or made."""
        acme = issuer.spec.acme
        asked = acme.external_account_binding
        directory = yield from call(acme.server, self._authority.directory, server)
        uri = yield from call(acme.server, self._authority.find_account, server, key_pem)
        if uri:
            return uri, asked.key_id if asked else ""
        binding = self._binding(key, asked, binding_secret) if asked else None
        if directory.external_account_required and binding is None:
            raise PermanentError(
                Reason.EAB_REQUIRED,
                f"{acme.server} demands an external account binding. Get a key id and an HMAC key from the CA and name "
                "them in spec.acme.externalAccountBinding.",
            )
        uri = yield from call(acme.server, self._authority.register, server, key_pem, acme.email, binding)
        return uri, asked.key_id if asked else ""

    def _check_profile(self, issuer: Issuer, server: Server) -> Generator[Any, Any, None]:
        asked = issuer.spec.acme.profile
        if asked:
            directory = yield from call(server.url, self._authority.directory, server)
            if asked not in directory.profiles:
                offered = listing(sorted(directory.profiles), most=20) or "none"
                raise PermanentError(
                    Reason.UNKNOWN_PROFILE, f"{server.url} offers no profile {asked}. Its profiles: {offered}."
                )

    def _binding(self, key: Key, asked: api.ExternalAccountBinding, secret: api.Secret | None) -> Binding:
        name, member = f"{self._home(key)}/{asked.key_secret_ref.name}", asked.key_secret_ref.key or HMAC_KEY
        if secret is None:
            raise PermanentError(
                Reason.EAB_SECRET_MISSING,
                f"Secret {name}, which spec.acme.externalAccountBinding.keySecretRef names, does not exist.",
            )
        hmac_key = pem.secret_value(secret.data, member)
        if not hmac_key:
            has = listing(sorted(secret.data)) or "no member"
            raise PermanentError(
                Reason.EAB_SECRET_MISSING,
                f"Secret {name} has no member {member} with the HMAC key of key id {asked.key_id}; it has {has}.",
            )
        return Binding(asked.key_id, hmac_key, asked.key_algorithm)

    def _account_secret(self, key: Key, issuer: Issuer) -> api.Secret:
        """The Secret of the account key; a new key when there is none."""
        ref, home = issuer.spec.acme.private_key_secret_ref, self._home(key)
        secret = self._cluster.get(api.SECRET, home, ref.name)
        if secret:
            return secret
        content = base64.b64encode(self._key_maker.account_key()).decode()
        manifest = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": ref.name, "namespace": home},
            "type": "Opaque",
            "data": {ref.key or ACCOUNT_KEY: content},
        }
        try:
            return self._cluster.create(api.SECRET, manifest)
        except AlreadyExists:
            raise Conflict(f"Secret {home}/{ref.name} appeared just now") from None

    def _keep_uri(self, secret: api.Secret, uri: str, server: str) -> None:
        meta = secret.metadata
        self._cluster.apply(
            api.SECRET,
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {
                    "name": meta.name,
                    "namespace": meta.namespace,
                    "uid": meta.uid,
                    "resourceVersion": meta.resource_version,
                    "annotations": {api.ANNOTATION_ACCOUNT_URI: uri},
                },
                "type": secret.type,
                "data": {SERVER_KEY: base64.b64encode(server.encode()).decode()},
            },
        )

    # --- saying it ----------------------------------------------------------------------------------------------------

    def _write_failure(self, key: Key, issuer: Issuer, attempt: Attempt) -> None:
        problem = attempt.problem
        last_problem = api.LastProblem(problem.type, problem.words()[:1024]) if problem else None
        self._write(key, issuer, attempt.finding, ready=False, last_problem=last_problem)

    def _write(self, key: Key, issuer: Issuer, finding: Finding, *, ready: bool, **changes: Any) -> None:
        meta, now = issuer.metadata, self._clock.now()
        before = api.find_condition(issuer.status.conditions, "Ready")
        status = structs.replace(
            issuer.status,
            conditions=set_condition(
                issuer.status.conditions, "Ready", status=ready, finding=finding, generation=meta.generation, now=now
            ),
            observed_generation=meta.generation,
            **changes,
        )
        if status == issuer.status:
            return
        kind = api.ISSUER_KINDS[key.kind]
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
        written = self._cluster.apply(kind, manifest, subresource="status")
        if before is None or (before.status, before.reason) != ("True" if ready else "False", finding.reason):
            report(self._cluster, key.kind, written, finding.reason, finding.message, warning=not ready)


def _ca_bundle(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PermanentError(
            Reason.CA_BUNDLE_INVALID, "spec.acme.caBundle is not base64 of PEM certificates; correct it."
        ) from error
