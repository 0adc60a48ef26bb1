"""How an attempt to issue ended: what is said of it, and what of it stays in the Certificate's status."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

from certbotk8s.domain import api
from certbotk8s.domain.names import listing, names_hash
from certbotk8s.domain.plan import Finding, Observed, issuer_name, issuer_version, renew_wish, unfit, when
from certbotk8s.domain.problems import Side, side
from certbotk8s.domain.reasons import Reason
from certbotk8s.domain.renewal import pause_after_failure, renewal_time

if TYPE_CHECKING:
    from certbotk8s.domain.errors import PermanentError

RECENT_ORDERS = 10


class Ending(StrEnum):
    """How an order ended, as the log tells: one line for each order."""

    ISSUED = "issued"  # its certificate is in the Secret
    FAILED = "failed"  # at the CA, or the CA lost it; `reason` tells
    ABANDONED = "abandoned"  # by us, before finalize or with its Certificate
    DISCARDED = "discarded"  # what it issued is not what is asked for


# Failures that say nothing about the names: the next attempt need not spare them.
_CA_REASONS = {Reason.ORDER_GONE, Reason.ORDER_UNFINISHED, Reason.KEY_LOST, Reason.CERTIFICATE_REJECTED}


def success(seen: Observed, issuance: api.Issuance, facts: api.CertificateFacts) -> tuple[Finding, dict[str, Any]]:
    """The sentence, and the changed fields of the status, after the Secret was written; `facts` of what was written."""
    secret = f"{seen.certificate.metadata.namespace}/{seen.certificate.spec.secret_name}"
    due = renewal_time(seen.certificate.spec, facts)
    finding = Finding(
        Reason.ISSUED,
        f"Certificate for {listing(seen.names)} from {issuer_name(seen.certificate)} written to Secret {secret}: "
        f"valid until {when(facts.not_after)}, renews {when(due)}",
    )
    return finding, {
        "issuer_ref": issuance.issuer_ref,
        "account_uri": issuance.account_uri,
        # Also when the Secret is gone again: the shortest interval to the next issuance is reckoned from these.
        "serial_number": facts.serial_number,
        "not_before": facts.not_before,
        "not_after": facts.not_after,
        "renewal_time": due,
        "revision": seen.certificate.status.revision + 1,
        "renew_now": issuance.renew_now,
        "failed_attempts": 0,
        "last_failure_time": None,
        "next_attempt_time": None,
        "last_problem": None,
        "recent_orders": recent(seen, issuance, Reason.ISSUED),
    }


def failure(seen: Observed, issuance: api.Issuance | None, error: PermanentError) -> tuple[Finding, dict[str, Any]]:
    """The sentence, and the changed fields of the status, after the attempt failed."""
    failures = seen.certificate.status.failed_attempts + 1
    usable = seen.secret.certificate if seen.secret and unfit(seen) is None else None
    ca_side = error.reason in _CA_REASONS or bool(error.problem and side(error.problem) is Side.CA)
    until = seen.now + pause_after_failure(failures, ca_side=ca_side, certificate=usable, now=seen.now)
    keeps = f" The present certificate is valid until {when(usable.not_after)}" if usable else ""
    problem = error.problem
    return Finding(error.reason, f"{str(error).rstrip('.')}. Next attempt {when(until)}.{keeps}"), {
        "failed_attempts": failures,
        "last_failure_time": seen.now,
        "next_attempt_time": until,
        "last_problem": api.LastProblem(problem.type, problem.words()[:1024], problem.identifiers()[:100])
        if problem
        else None,
        "recent_orders": recent(seen, issuance, error.reason),
    }


def recent(seen: Observed, issuance: api.Issuance | None, outcome: Reason) -> tuple[api.RecentOrder, ...]:
    """The recent orders of the status with this one at the end; the oldest go, but never the last success.

    Who holds a name is reckoned from that (domain.policy), however often its renewal failed since.
    """
    meta = seen.certificate.metadata
    order = api.RecentOrder(
        time=seen.now,
        set_hash=names_hash((issuance.names if issuance else ()) or seen.names),
        generation=issuance.generation if issuance else meta.generation,
        outcome=outcome,
        renew_now=issuance.renew_now if issuance else renew_wish(seen.certificate),
        account_uri=issuance.account_uri if issuance else "",
        order_url=issuance.order_url if issuance else "",
        issuer=issuer_version(seen.issuer),
    )
    orders = (*seen.certificate.status.recent_orders, order)
    last = next((each for each in reversed(orders) if each.outcome == Reason.ISSUED), order)
    kept = orders[-RECENT_ORDERS:]
    return kept if last in kept else (last, *kept[1:])
