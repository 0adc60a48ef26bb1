"""Names that belong to somebody: what a ClusterIssuer's policy allows to a namespace, and who has a name already.

Patterns and names are compared in the one form of `domain.names`. A pattern is a name (that name alone), `*.z` (one
label below z, and the wildcard name `*.z`), `**.z` (whatever is below z, wildcard names too) or `**` (every name). So a
wildcard name is allowed only by a pattern that covers all that it covers.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from certbotk8s.domain import api
from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.issuance import State
from certbotk8s.domain.names import names_hash, normalise, wanted_names
from certbotk8s.domain.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from certbotk8s.domain.api import Certificate, Issuer, IssuerRef, LabelSelector, Policy, PolicyRule

ALL_NAMESPACES = "*"


# --- the rules --------------------------------------------------------------------------------------------------------


def policy_of(issuer: Issuer | None) -> Policy | None:
    """The policy of a ClusterIssuer that has one; whatever else there is allows every name."""
    return issuer.spec.policy if isinstance(issuer, api.ClusterIssuer) else None


def check_policy(issuer: Issuer) -> None:
    """Raise PermanentError(InvalidSpec), which names the place, when a pattern of the policy is none."""
    policy = policy_of(issuer)
    for number, rule in enumerate(policy.rules if policy else ()):
        for place, pattern in enumerate(rule.dns_names):
            try:
                _parse(pattern)
            except PermanentError as error:
                where = f"spec.policy.rules[{number}].dnsNames[{place}]"
                text = f"{where}: {error} Nothing is ordered through this issuer until that is mended"
                raise PermanentError(Reason.INVALID_SPEC, text) from error


def allowed(policy: Policy, namespace: str, labels: Mapping[str, str] | None) -> tuple[str, ...]:
    """The patterns of all rules that are for that namespace; `labels` None are not known, so that no selector fits."""
    rules = [rule for rule in policy.rules if _is_for(rule, namespace, labels)]
    return tuple(dict.fromkeys(pattern for rule in rules for pattern in rule.dns_names))


def is_allowed(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the patterns covers the name, of a wildcard all that it covers."""
    return any(_covers(pattern, name) for pattern in patterns)


def _is_for(rule: PolicyRule, namespace: str, labels: Mapping[str, str] | None) -> bool:
    if rule.namespace_selector is None:
        return namespace in rule.namespaces or ALL_NAMESPACES in rule.namespaces
    return labels is not None and _selects(rule.namespace_selector, labels)


def _selects(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """As a metav1.LabelSelector does: all of its requirements hold; one without any selects everything."""
    holds = {
        "In": lambda each: labels.get(each.key) in each.values,
        "NotIn": lambda each: labels.get(each.key) not in each.values,
        "Exists": lambda each: each.key in labels,
        "DoesNotExist": lambda each: each.key not in labels,
    }
    exact = all(labels.get(key) == value for key, value in selector.match_labels.items())
    return exact and all(holds[each.operator](each) for each in selector.match_expressions)


@lru_cache(maxsize=16384)
def _parse(pattern: str) -> tuple[str, str]:
    """(`**`, `*` or "", the rest of the pattern, normalised); raises PermanentError(InvalidSpec) when it is none."""
    if pattern == "**":
        return pattern, ""
    depth, _, zone = pattern.partition(".")
    if depth not in {"*", "**"}:
        depth, zone = "", pattern
    if not zone or "*" in zone:
        raise PermanentError(
            Reason.INVALID_SPEC, f'"{pattern}" is no pattern such as app.example.org, *.example.org or **.example.org.'
        )
    return depth, normalise(zone)


def _covers(pattern: str, name: str) -> bool:
    try:
        depth, zone = _parse(pattern)
    except PermanentError:
        return False  # what cannot be understood allows nothing
    if depth == "**":
        return not zone or name.endswith(f".{zone}")
    return (name.partition(".")[2] if depth else name) == zone


# --- who has a name already -------------------------------------------------------------------------------------------


class Standing(IntEnum):
    """How a Certificate stands to the names that it wants from an issuer."""

    NONE = 0  # not asked for, refused, or given up for now
    ASKS = 1  # not looked at yet, or being ordered
    FINALIZES = 2  # the CA was asked to issue: that cannot be called back
    HOLDS = 3  # it was issued for exactly these names, and is still valid


class Claim(NamedTuple):
    """A name that is asked for, and the Certificate of another namespace that stands against it with a name of its."""

    asked: str
    holder: Certificate
    held: str
    standing: Standing


def standing(certificate: Certificate, ref: IssuerRef, now: datetime) -> Standing:
    """How it stands to its names at that issuer, by what the controller itself has recorded.

    Neither a Secret nor the spec proves that a name was ever issued, since tenants write both.
    """
    status, meta = certificate.status, certificate.metadata
    if meta.deletion_timestamp:
        return Standing.NONE
    last = next((order for order in reversed(status.recent_orders) if order.outcome == Reason.ISSUED), None)
    valid = status.not_after is not None and status.not_after > now
    if last and valid and status.issuer_ref == ref and last.set_hash == names_hash(_names(certificate)):
        return Standing.HOLDS
    if status.issuance and status.issuance.issuer_ref == ref:
        return Standing.FINALIZES if status.issuance.state == State.FINALIZING else Standing.ASKS
    issuing = api.find_condition(status.conditions, "Issuing")
    asks = status.observed_generation != meta.generation or (issuing and issuing.status == "True")
    return Standing.ASKS if asks and certificate.spec.issuer_ref == ref else Standing.NONE


def claim(
    certificate: Certificate,
    names: Sequence[str],
    contenders: Iterable[Certificate],
    policy: Policy | None,
    now: datetime,
) -> Claim | None:
    """What stands against ordering these names, or None. `contenders` are Certificates of other namespaces.

    Who holds a name keeps it; of those that ask the oldest goes on; one that was sent to be issued is waited for. A
    rule that lists both namespaces, and allows both names, ends the question.
    """
    ref = certificate.spec.issuer_ref
    if standing(certificate, ref, now) is Standing.HOLDS:
        return None
    found = []
    for other in contenders:
        stands = standing(other, ref, now)
        if stands is Standing.NONE or (stands is Standing.ASKS and _age(certificate) < _age(other)):
            continue
        for asked, held in ((one, their) for their in _names(other) for one in names if overlap(one, their)):
            if not (policy and _shared(policy, certificate, other, asked, held)):
                found.append(Claim(asked, other, held, stands))
    return max(found, key=lambda each: each.standing, default=None)


def overlap(name: str, other: str) -> bool:
    """Whether a certificate for one of the names serves a host of the other."""
    if name == other:
        return True
    if name.startswith("*."):
        return other.partition(".")[2] == name[2:]
    return other.startswith("*.") and name.partition(".")[2] == other[2:]


def bearing(certificate: Certificate) -> tuple[object, ...]:
    """All that `standing` is reckoned from, but the time: while this stays, nothing changes for others."""
    status, issuance = certificate.status, certificate.status.issuance
    issuing = api.find_condition(status.conditions, "Issuing")
    return (
        certificate.spec.issuer_ref,
        _names(certificate),
        certificate.metadata.deletion_timestamp,
        status.observed_generation == certificate.metadata.generation,
        issuing and issuing.status,
        issuance and (issuance.issuer_ref, issuance.state == State.FINALIZING),
        status.issuer_ref,
        status.not_after,
        status.recent_orders,
    )


def places(certificate: Certificate) -> list[str]:
    """Where an index finds a Certificate: by each ClusterIssuer that it has to do with, its names, and what is over."""
    names = _names(certificate) if (issuers := _cluster_issuers(certificate)) else ()
    below = dict.fromkeys(f".{name.partition('.')[2]}" for name in names if not name.startswith("*."))
    return [f"{issuer}/{place}" for issuer in issuers for place in (*names, *below)]


def places_against(certificate: Certificate) -> list[str]:
    """Where the Certificates are found with which it may share a name: an equal one, a wildcard over it, one below."""
    names = _names(certificate) if (issuers := _cluster_issuers(certificate)) else ()
    others = [f".{name[2:]}" if name.startswith("*.") else f"*.{name.partition('.')[2]}" for name in names]
    return [f"{issuer}/{place}" for issuer in issuers for place in dict.fromkeys((*names, *others))]


def _cluster_issuers(certificate: Certificate) -> list[str]:
    status = certificate.status
    refs = (certificate.spec.issuer_ref, status.issuer_ref, status.issuance.issuer_ref if status.issuance else None)
    return list(dict.fromkeys(ref.name for ref in refs if ref and ref.kind == "ClusterIssuer"))


def _names(certificate: Certificate) -> tuple[str, ...]:
    try:
        return wanted_names(certificate.spec)
    except PermanentError:
        return ()


def _age(certificate: Certificate) -> tuple[float, str]:
    made = certificate.metadata.creation_timestamp
    return made.timestamp() if made else 0.0, certificate.key


def _shared(policy: Policy, one: Certificate, other: Certificate, asked: str, held: str) -> bool:
    both = {one.metadata.namespace, other.metadata.namespace}
    rules = [rule for rule in policy.rules if both <= set(rule.namespaces)]
    return any(is_allowed(rule.dns_names, asked) and is_allowed(rule.dns_names, held) for rule in rules)
