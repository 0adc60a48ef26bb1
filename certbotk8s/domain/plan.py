"""What a Certificate needs, and whether it may have it now.

`Observed -> need -> hold`, each a chain of small checks in the order of the list; the first that speaks decides.
Nothing here looks anywhere: the reconciler gathers `Observed` first. `Ready` is computed from spec, Secret and time,
never from the state of an issuance.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING

from msgspec import json, structs

from certbotk8s.domain import api
from certbotk8s.domain.bindings import account_for, missing
from certbotk8s.domain.names import common_name, listing, names_hash
from certbotk8s.domain.policy import Standing, allowed, claim, is_allowed, policy_of
from certbotk8s.domain.reasons import Reason
from certbotk8s.domain.renewal import LONGEST_PAUSE, renewal_time, shortest_interval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from certbotk8s.domain.api import Certificate, Issuer, SecretFacts


# An issuer that was not looked at yet is ready in a moment.
ISSUER_LOOK = timedelta(seconds=10)
# An order of somebody else for the same name ends much sooner as a rule, and then wakes those that wait.
CLAIM_LOOK = timedelta(minutes=1)
# Characters of status.renewNow.
RENEW_NOW_MAX = 256


@dataclass(frozen=True)
class Observed:
    """All that a decision about a Certificate rests on.

    `names` are the wanted names, normalised; none, and `invalid` says why, when the spec cannot be understood. `secret`
    is the Secret of that name if it is one of ours. `rivals` are the other live Certificates of the namespace with the
    same secretName. `labels` are those of its namespace, None when they are not known; `contenders` the Certificates of
    other namespaces that have to do with the same ClusterIssuer and with one of the names.
    """

    certificate: Certificate
    names: tuple[str, ...]
    invalid: Finding | None
    issuer: Issuer | None
    secret: SecretFacts | None
    rivals: tuple[Certificate, ...]
    now: datetime
    labels: Mapping[str, str] | None = None
    contenders: tuple[Certificate, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What a check found: the reason for machines, the sentence for people, and until when it holds by itself.

    `aside` is for the log alone: what only administrators may know.
    """

    reason: Reason
    message: str
    until: datetime | None = None
    aside: str = ""


def when(time: datetime) -> str:
    """An absolute time as messages give it."""
    return f"{time:%Y-%m-%d %H:%M} UTC"


def issuer_name(certificate: Certificate, ref: api.IssuerRef | None = None) -> str:
    """The issuer as messages call it, or another that it referred to: `Issuer shop/ca` or `ClusterIssuer ca`."""
    ref = ref or certificate.spec.issuer_ref
    return f"{ref.kind} {ref.name if ref.kind == 'ClusterIssuer' else f'{certificate.metadata.namespace}/{ref.name}'}"


def profile(seen: Observed) -> str:
    """The ACME profile to ask for: the Certificate's, else the issuer's; "" leaves the choice to the CA."""
    return seen.certificate.spec.profile or (seen.issuer.spec.acme.profile if seen.issuer else "")


def key_size(key: api.PrivateKeySpec) -> int:
    """The wanted size in bits."""
    return key.size or {"RSA": 2048, "ECDSA": 256}[key.algorithm]


def request_hash(seen: Observed, *, issuer_uid: str, account_uri: str, account_key: str = "") -> str:
    """What an order under way was placed for. When this changes before finalize, the order is given up.

    `account_key` is the thumbprint of the account's key: answers to challenges are made of it.
    """
    spec = seen.certificate.spec
    cn = "" if seen.invalid else common_name(spec, seen.issuer.spec.acme if seen.issuer else None)
    key = structs.replace(spec.private_key, size=key_size(spec.private_key))
    asked = (names_hash(seen.names), cn, structs.astuple(key), profile(seen), issuer_uid, account_uri, account_key)
    return hashlib.sha256(json.encode(asked)).hexdigest()


def order_set(seen: Observed, account_uri: str) -> str:
    """Equal for two orders that a CA answers with one and the same: server, account, profile, set of names.

    The server, because any server can give its accounts the URI of another's.
    """
    server = seen.issuer.spec.acme.server if seen.issuer else ""
    return hashlib.sha256(f"{server} {account_uri} {profile(seen)} {names_hash(seen.names)}".encode()).hexdigest()


def renew_wish(certificate: Certificate) -> str:
    """The value of the annotation that asks for a renewal, as far as status can keep it; "" for none."""
    return certificate.metadata.annotations.get(api.ANNOTATION_RENEW_NOW, "")[:RENEW_NOW_MAX]


def rollover_wish(issuer: Issuer) -> str:
    """The value of the annotation that asks for a new account key, as far as status can keep it; "" for none."""
    return issuer.metadata.annotations.get(api.ANNOTATION_ROLLOVER, "")[:RENEW_NOW_MAX]


# --- who owns a Secret ------------------------------------------------------------------------------------------------


class Ownership(Enum):
    """How a Secret stands to a Certificate that names it."""

    OURS = "ours"
    # Written for a Certificate that is gone (deleted and applied again, restored, renamed): taken over as it is.
    LEFT = "left"
    # Of another live Certificate that names the same Secret.
    RIVAL = "rival"
    # Of somebody else altogether: never overwritten, taken only when adoption is asked for.
    FOREIGN = "foreign"


def ownership(secret: SecretFacts, certificate: Certificate, rivals: Sequence[Certificate]) -> Ownership:
    """A tls Secret belongs to the Certificate *name* in its annotation; the UID only tells whether to rewrite it."""
    owner = secret.metadata.annotations.get(api.ANNOTATION_CERTIFICATE)
    if not owner:
        return Ownership.FOREIGN
    if owner == certificate.metadata.name:
        uid = secret.metadata.annotations.get(api.ANNOTATION_CERTIFICATE_UID)
        labelled = secret.metadata.labels.get(api.LABEL_ROLE) == api.ROLE_TLS
        return Ownership.OURS if uid == certificate.metadata.uid and labelled else Ownership.LEFT
    return Ownership.RIVAL if any(rival.metadata.name == owner for rival in rivals) else Ownership.LEFT


def adoption_asked(certificate: Certificate) -> bool:
    """Whether a foreign Secret that fits may become ours."""
    return certificate.metadata.annotations.get(api.ANNOTATION_ADOPT) == "true"


# --- what is needed ---------------------------------------------------------------------------------------------------


def _secret_missing(seen: Observed) -> Finding | None:
    if seen.secret is None or ownership(seen.secret, seen.certificate, seen.rivals) is not Ownership.OURS:
        name = f"{seen.certificate.metadata.namespace}/{seen.certificate.spec.secret_name}"
        return Finding(Reason.SECRET_MISSING, f"There is no Secret {name} yet")
    return None


def _secret_invalid(seen: Observed) -> Finding | None:
    secret = seen.secret
    if secret is None:
        return None
    if secret.problem or secret.certificate is None:
        return Finding(Reason.SECRET_INVALID, f"Secret {secret.key} cannot be used: {secret.problem}")
    if secret.certificate.public_key_hash != secret.public_key_hash:
        return Finding(Reason.SECRET_INVALID, f"In Secret {secret.key} tls.key is not the key of tls.crt")
    return None


def _names_changed(seen: Observed) -> Finding | None:
    if seen.secret and seen.secret.certificate and seen.secret.certificate.names_hash != names_hash(seen.names):
        return Finding(Reason.NAMES_CHANGED, f"The certificate in Secret {seen.secret.key} is for other names")
    return None


def _key_changed(seen: Observed) -> Finding | None:
    wanted = seen.certificate.spec.private_key
    size = key_size(wanted)
    if seen.secret and seen.secret.certificate:
        have = seen.secret.certificate
        if (have.key_algorithm, have.key_size, seen.secret.key_encoding) != (wanted.algorithm, size, wanted.encoding):
            return Finding(
                Reason.KEY_CHANGED,
                f"The key in Secret {seen.secret.key} is {have.key_algorithm} {have.key_size} "
                f"({seen.secret.key_encoding}), wanted is {wanted.algorithm} {size} ({wanted.encoding})",
            )
    return None


def _expired(seen: Observed) -> Finding | None:
    if seen.secret and seen.secret.certificate and seen.secret.certificate.not_after <= seen.now:
        return Finding(Reason.EXPIRED, f"The certificate expired {when(seen.secret.certificate.not_after)}")
    return None


def _renewing(seen: Observed) -> Finding | None:
    if seen.secret and seen.secret.certificate:
        due = renewal_time(seen.certificate.spec, seen.secret.certificate)
        if due <= seen.now:
            return Finding(Reason.RENEWING, f"Renewal is due since {when(due)}")
    return None


def _renew_now(seen: Observed) -> Finding | None:
    asked = renew_wish(seen.certificate)
    if asked and asked != seen.certificate.status.renew_now:
        return Finding(Reason.RENEW_NOW, "Renewal was asked for")
    return None


# A certificate that fails one of these does not serve what the spec asks for: Ready is False.
UNFIT = (
    _secret_missing,  # no Secret, or not ours
    _secret_invalid,  # no pair that can be read
    _names_changed,  # exactly the wanted names
    _key_changed,  # the wanted kind of key
    _expired,  # still valid
)
# One that fails only these does its work; its successor is wanted. renew-now first: it may jump the shortest interval.
DUE = (_renew_now, _renewing)


def unfit(seen: Observed) -> Finding | None:
    """Why the Secret does not serve the spec, or None."""
    return next((finding for check in UNFIT if (finding := check(seen))), None)


def misfit(seen: Observed) -> Finding | None:
    """Why the Secret would not serve the spec even if it were ours, or None: what adoption asks."""
    return next((finding for check in UNFIT[1:] if (finding := check(seen))), None)


def need(seen: Observed) -> Finding | None:
    """Why a certificate is wanted, or None when nothing is to be done before `renewal_time`."""
    return unfit(seen) or next((finding for check in DUE if (finding := check(seen))), None)


# --- whether it may be ordered now ------------------------------------------------------------------------------------


def _invalid(seen: Observed) -> Finding | None:
    return seen.invalid


def _secret_conflict(seen: Observed) -> Finding | None:
    """Two Certificates that name one Secret would re-issue in turn for ever: the owner goes on, the other waits."""
    if not seen.rivals:
        return None
    meta = seen.certificate.metadata
    names = {rival.metadata.name for rival in seen.rivals} | {meta.name}
    owner = seen.secret.metadata.annotations.get(api.ANNOTATION_CERTIFICATE) if seen.secret else None
    if owner not in names:

        def age(certificate: Certificate) -> tuple[float, str]:
            made = certificate.metadata.creation_timestamp
            return (made.timestamp() if made else 0.0, certificate.metadata.name)

        owner = min((*seen.rivals, seen.certificate), key=age).metadata.name
    if owner == meta.name:
        return None
    return Finding(
        Reason.SECRET_CONFLICT,
        f"Secret {meta.namespace}/{seen.certificate.spec.secret_name} belongs to Certificate {meta.namespace}/{owner}, "
        "which names it too. Nothing is ordered: give this Certificate its own secretName, or delete one of the two.",
    )


def issuer_ready(issuer: Issuer) -> api.Condition | None:
    """The Ready condition of an Issuer, if it speaks of its present spec."""
    condition = api.find_condition(issuer.status.conditions, "Ready")
    return condition if condition and condition.observed_generation == issuer.metadata.generation else None


def immutable(seen: Observed) -> Finding | None:
    """Why the Secret can take no new certificate: `immutable` is never fought."""
    if seen.secret is None or not seen.secret.immutable:
        return None
    return Finding(
        Reason.SECRET_IMMUTABLE,
        f"Secret {seen.secret.key} is immutable, so that no new certificate can be written to it. Nothing is ordered "
        "until it is deleted, or another secretName is chosen",
    )


def _issuer(seen: Observed) -> Finding | None:
    name = issuer_name(seen.certificate)
    if seen.issuer is None:
        return Finding(Reason.ISSUER_NOT_FOUND, f"{name} does not exist. This goes on by itself when it appears.")
    ready = issuer_ready(seen.issuer)
    if ready is None:
        return Finding(Reason.ISSUER_NOT_READY, f"Waiting for {name} to become ready", seen.now + ISSUER_LOOK)
    if ready.status != "True":
        return Finding(Reason.ISSUER_NOT_READY, f"Waiting for {name}, which is not ready: {ready.message}")
    return None


def _not_allowed(seen: Observed) -> Finding | None:
    """The policy comes before any order: names that the CA has validated for the account need no proof."""
    policy = policy_of(seen.issuer)
    if policy is None:
        return None
    namespace = seen.certificate.metadata.namespace
    patterns = allowed(policy, namespace, seen.labels)
    refused = [name for name in seen.names if not is_allowed(patterns, name)]
    if not refused:
        return None
    return Finding(
        Reason.NOT_ALLOWED,
        f"{issuer_name(seen.certificate)} does not allow {listing(refused)} to namespace {namespace}. Nothing is "
        "ordered: ask for other names, or have an administrator add a rule to its spec.policy. Allowed to this "
        f"namespace: {listing(patterns, most=10) or 'nothing'}",
    )


def _name_claimed(seen: Observed) -> Finding | None:
    """Whose the name is stays untold: tenants of a cluster need not know each other."""
    found = claim(seen.certificate, seen.names, seen.contenders, policy_of(seen.issuer), seen.now)
    if found is None:
        return None
    issuer, mine, other = issuer_name(seen.certificate), seen.certificate.key, found.holder.key
    if found.asked == found.held:
        what = f"{found.asked} is"
    elif found.asked.startswith("*."):
        what = f"{found.asked} covers a name that is"
    else:
        what = f"{found.asked} is covered by a wildcard name that is"
    if found.standing is Standing.HOLDS:
        return Finding(
            Reason.NAME_CLAIMED,
            f"{what} held by another namespace through {issuer}. Nothing is ordered: this goes on by itself when it is "
            "given up there, or when a rule in spec.policy of the issuer lists both namespaces for it",
            aside=f"{mine} asks for {found.asked}, but {other} holds {found.held} through {issuer}",
        )
    return Finding(
        Reason.NAME_CLAIMED,
        f"{what} being ordered by another namespace through {issuer}. This goes on by itself if that comes to nothing",
        until=seen.now + CLAIM_LOOK,
        aside=f"{mine} asks for {found.asked}, but {other} is ordering {found.held} through {issuer}",
    )


def account_name(seen: Observed) -> str | None:
    """The name of the issuer's account that is for certificates of this shape; None when none is."""
    if seen.issuer is None:
        return None
    return account_for(seen.issuer.spec.acme, seen.names, seen.certificate.spec.private_key.algorithm)


def _binding(seen: Observed) -> Finding | None:
    if seen.issuer is None or account_name(seen) is not None:
        return None
    lack = missing(seen.issuer.spec.acme, seen.names, seen.certificate.spec.private_key.algorithm)
    return Finding(
        Reason.NO_BINDING_FITS,
        f"No binding of {issuer_name(seen.certificate)} is for {lack}. Nothing is ordered until one is added to "
        "spec.acme.bindings of the issuer, or this Certificate is changed",
    )


def issuer_version(issuer: Issuer | None) -> str:
    """Which issuer, as of which spec; "" for none."""
    return f"{issuer.metadata.uid}/{issuer.metadata.generation}" if issuer else ""


def _put_off(seen: Observed) -> datetime | None:
    """The next attempt's time, if it lies ahead. One further than anybody waits was told by a clock that was wrong."""
    until = seen.certificate.status.next_attempt_time
    return until if until and seen.now < until <= seen.now + LONGEST_PAUSE else None


def asked_to_wait(seen: Observed) -> Finding | None:
    """Until when the CA asked to be left alone (Retry-After), as status kept it over a restart; None for not at all.

    A changed spec is another request, for which nobody has asked that.
    """
    certificate = seen.certificate
    condition = api.find_condition(certificate.status.conditions, "Issuing")
    until = _put_off(seen)
    if condition is None or until is None:
        return None
    if condition.reason == Reason.ORDER_PENDING:
        # Looking at an order, whatever the spec says by now; without one it says nothing.
        return Finding(Reason.ORDER_PENDING, condition.message, until) if certificate.status.issuance else None
    asked = condition.reason in {Reason.RATE_LIMITED, Reason.CA_UNAVAILABLE}
    if not asked or condition.observed_generation != certificate.metadata.generation:
        return None
    return Finding(Reason(condition.reason), condition.message, until)


def _backing_off(seen: Observed) -> Finding | None:
    status, generation = seen.certificate.status, seen.certificate.metadata.generation
    until = _put_off(seen)
    if until is None:
        return None
    # A changed spec or issuer, or a new wish to renew, is a new request: the old failure says nothing about it.
    last = status.recent_orders[-1] if status.recent_orders else None
    if last is None or last.generation != generation or last.renew_now != renew_wish(seen.certificate):
        return None
    if last.issuer and last.issuer != issuer_version(seen.issuer):
        return None
    condition = api.find_condition(status.conditions, "Issuing")
    if condition and condition.reason == last.outcome and condition.reason in set(Reason):
        return Finding(Reason(condition.reason), condition.message, until)
    # Something else was said meanwhile.
    text = f"The last attempt failed ({last.outcome}). Next attempt {when(until)}"
    return Finding(Reason.BACKING_OFF, text, until)


def _too_soon(seen: Observed) -> Finding | None:
    """Whatever makes a fresh certificate unwanted again (a fight over its Secret, say) costs one order per interval."""
    status = seen.certificate.status
    issued = [order for order in status.recent_orders if order.outcome == Reason.ISSUED]
    if not issued or not (status.not_before and status.not_after) or _renew_now(seen):
        return None
    last = issued[-1]
    interval = shortest_interval(status.not_after - status.not_before)
    # A time further ahead than that was told by a clock that was wrong.
    if last.generation != seen.certificate.metadata.generation or abs(seen.now - last.time) >= interval:
        return None
    until = last.time + interval
    meta = seen.certificate.metadata
    return Finding(
        Reason.BACKING_OFF,
        f"The last certificate was issued {when(last.time)}; the next is ordered {when(until)}, "
        f"or now with: certctl renew -n {meta.namespace} {meta.name}",
        until,
    )


# Without these nothing is done at all.
BLOCKS = (
    _invalid,  # there is something to ask for
    _secret_conflict,  # the Secret is ours to write
)
# For these an order under way is given up as well, as long as it is not finalized.
REFUSALS = (
    _not_allowed,  # the issuer's policy allows the names to the namespace
    _name_claimed,  # and no other namespace has them already
    _binding,  # and the issuer has an account for such certificates
)
HOLDS = (
    *BLOCKS,
    immutable,  # and can be written
    _issuer,  # there is somebody to ask
    *REFUSALS,  # for these names
    asked_to_wait,  # who may be asked now
    _backing_off,  # the last failure is far enough away
    _too_soon,  # and so is the last success
)


def blocked(seen: Observed) -> Finding | None:
    """Why not even a Secret that was left behind may be taken over, or None."""
    return next((finding for check in BLOCKS if (finding := check(seen))), None)


def hold(seen: Observed) -> Finding | None:
    """Why nothing may be ordered now, or None."""
    return next((finding for check in HOLDS if (finding := check(seen))), None)


def refused(seen: Observed) -> Finding | None:
    """Why such a certificate may not be had, whatever is under way, or None."""
    return next((finding for check in REFUSALS if (finding := check(seen))), None)


# --- what is said -----------------------------------------------------------------------------------------------------


def ready_message(seen: Observed) -> str:
    """The sentence of Ready=True."""
    assert seen.secret
    assert seen.secret.certificate
    facts = seen.secret.certificate
    due = renewal_time(seen.certificate.spec, facts)
    return f"Valid until {when(facts.not_after)} for {listing(seen.names)}; renews {when(due)}"


def set_condition(
    conditions: tuple[api.Condition, ...], kind: str, *, status: bool, finding: Finding, generation: int, now: datetime
) -> tuple[api.Condition, ...]:
    """The conditions with that one in place; its transition time moves only when its status does."""
    old = api.find_condition(conditions, kind)
    value = "True" if status else "False"
    since = old.last_transition_time if old and old.status == value else now.replace(microsecond=0)
    new = api.Condition(kind, value, finding.reason, finding.message[:1024], since, generation)
    if old is None:
        return (*conditions, new)
    return tuple(new if condition is old else condition for condition in conditions)


def conditions(seen: Observed, *, issuing: bool, finding: Finding | None) -> tuple[api.Condition, ...]:
    """Ready and Issuing as they should stand.

    `finding` says what is being done, waited for, or was refused. A Certificate that is not Ready says that in both
    conditions: `kubectl get` shows Ready's message, and the reader wants to know what holds it up.
    """
    current, generation = seen.certificate.status.conditions, seen.certificate.metadata.generation
    lack = unfit(seen)
    if lack is None:
        ready = Finding(Reason.READY, ready_message(seen))
    else:
        ready = finding or lack
    current = set_condition(current, "Ready", status=lack is None, finding=ready, generation=generation, now=seen.now)
    issued = api.find_condition(current, "Issuing")
    if finding is None and lack is None and issued and issued.reason != Reason.ISSUED:
        finding = ready  # what was waited for, or went wrong, is over
    if finding:
        current = set_condition(
            current, "Issuing", status=issuing, finding=finding, generation=generation, now=seen.now
        )
    return current
