"""What certctl says about Certificates: rows, the summary below them, one in detail.

Pure functions of objects and the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from certbotk8s.certctl.table import absolute, printable, relative, relative_times, span, table
from certbotk8s.domain.api import Condition, Resource, Struct, find_condition, to_wire
from certbotk8s.domain.plan import renew_wish
from certbotk8s.domain.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from certbotk8s.domain.api import Certificate, Issuer

# With one of these an issuance makes headway or goes on by itself soon; with any other something holds it up.
HEADWAY = {
    Reason.SECRET_MISSING,
    Reason.SECRET_INVALID,
    Reason.NAMES_CHANGED,
    Reason.KEY_CHANGED,
    Reason.EXPIRED,
    Reason.RENEWING,
    Reason.RENEW_NOW,
    Reason.ORDER_PENDING,
    Reason.SAME_NAMES,
    Reason.ORDERS_LIMITED,
}
# Issuing=False for one of these is an issuance that went well.
SUCCESSES = {Reason.ISSUED, Reason.ADOPTED}
# A controller that runs has looked at a new object long before.
_UNSEEN = timedelta(seconds=30)


class EventSeries(Struct, frozen=True):
    """v1 EventSeries: the same event again and again."""

    last_observed_time: datetime | None = None


class Event(Resource, frozen=True):
    """v1 Event, as far as it is shown."""

    type: str = ""
    reason: str = ""
    message: str = ""
    event_time: datetime | None = None
    first_timestamp: datetime | None = None
    last_timestamp: datetime | None = None
    series: EventSeries | None = None

    @property
    def time(self) -> datetime | None:
        """When it last happened; which of the times is set depends on who wrote it."""
        series = self.series.last_observed_time if self.series else None
        return series or self.last_timestamp or self.event_time or self.first_timestamp


@dataclass(frozen=True)
class State:
    """How a Certificate stands. `attention`: it does not go on by itself, or not soon."""

    ready: bool
    issuing: bool
    attention: bool
    message: str


@dataclass(frozen=True)
class Detail:
    """A Certificate and what belongs to it. `issuer` is what is known of its issuer, as a sentence part."""

    certificate: Certificate
    issuer: str
    events: tuple[Event, ...]


def names(certificate: Certificate) -> tuple[str, ...]:
    """The names asked for."""
    return certificate.spec.dns_names or (certificate.spec.common_name,)


def state(certificate: Certificate, now: datetime) -> State:
    """How it stands now, also where the controller has not said so: it may not be running."""
    status, made = certificate.status, certificate.metadata.creation_timestamp
    ready, issuing = find_condition(status.conditions, "Ready"), find_condition(status.conditions, "Issuing")
    spoken = ready or issuing
    if spoken is None:
        late = made is None or now - made > _UNSEEN
        message = "Waiting for the controller, which has not looked at it yet"
        return State(ready=False, issuing=False, attention=late, message=message)
    expired = status.not_after is not None and status.not_after <= now
    is_ready = ready is not None and ready.status == "True" and not expired
    is_issuing = issuing is not None and issuing.status == "True"
    asked = renew_wish(certificate)
    due = status.renewal_time is not None and status.renewal_time <= now
    # Where no certificate is wanted any more, an Issuing=False is left over from when one was.
    wanted = not is_ready or due or asked not in ("", status.renew_now) or status.failed_attempts > 0
    if issuing and (is_issuing or (wanted and issuing.reason not in SUCCESSES)):
        return State(is_ready, is_issuing, expired or issuing.reason not in HEADWAY, issuing.message)
    message = f"Expired {relative(status.not_after, now)}" if status.not_after and expired else spoken.message
    return State(is_ready, is_issuing, not is_ready, message)


# --- the table --------------------------------------------------------------------------------------------------------


def head(*, wide: bool, namespaces: bool) -> list[str]:
    """The first row of the table."""
    columns = ["NAME", "READY", "NAMES", "ISSUER", *(["SECRET"] if wide else []), "EXPIRES", "RENEWS", "STATUS"]
    return ["NAMESPACE", *columns] if namespaces else columns


def row(certificate: Certificate, now: datetime, *, wide: bool, namespaces: bool) -> list[str]:
    """A Certificate as a row. Times are relative, with `wide` absolute and complete."""
    status, spec = certificate.status, certificate.spec
    seen = state(certificate, now)
    first, *others = names(certificate)
    if wide:
        cells = [
            ",".join(names(certificate)),
            f"{spec.issuer_ref.kind}/{spec.issuer_ref.name}",
            spec.secret_name,
            absolute(status.not_after),
            absolute(status.renewal_time),
            seen.message,
        ]
    else:
        calm = seen.ready and not (seen.issuing or seen.attention)
        cells = [
            f"{first} +{len(others)}" if others else first,
            spec.issuer_ref.name,
            _left(status.not_after, now, "expired"),
            _left(status.renewal_time, now, "now"),
            # That it is valid, and until when, stands in the columns before.
            "Up to date" if calm else relative_times(seen.message, now),
        ]
    cells = [certificate.metadata.name, "yes" if seen.ready else "no", *cells]
    return [printable(cell) for cell in ([certificate.metadata.namespace, *cells] if namespaces else cells)]


def summary(certificates: Sequence[Certificate], now: datetime) -> str:
    """The line below the table: how many of each, and where to look first."""
    seen = [(certificate, state(certificate, now)) for certificate in certificates]
    counts = {
        "ready": sum(each.ready for _, each in seen),
        "issuing": sum(each.issuing for _, each in seen),
    }
    total = f"{len(seen)} certificate{'s' if len(seen) != 1 else ''}"
    text = f"{total}: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "ready")
    concerned = [certificate for certificate, each in seen if each.attention]
    if not concerned:
        return text
    meta = concerned[0].metadata
    need = "1 needs attention" if len(concerned) == 1 else f"{len(concerned)} need attention, first:"
    command = f"certctl status -n {meta.namespace} {meta.name}"
    return f"{text}; {need} {f'({command})' if len(concerned) == 1 else command}"


def document(certificate: Certificate, now: datetime) -> dict[str, Any]:
    """A Certificate for programs. Members are only ever added; times are RFC 3339, `null` where there is none."""
    status, spec, seen = certificate.status, certificate.spec, state(certificate, now)
    return {
        "namespace": certificate.metadata.namespace,
        "name": certificate.metadata.name,
        "ready": seen.ready,
        "issuing": seen.issuing,
        "needsAttention": seen.attention,
        "status": seen.message,
        "names": list(names(certificate)),
        "issuer": {"kind": spec.issuer_ref.kind, "name": spec.issuer_ref.name},
        "secretName": spec.secret_name,
        "serialNumber": status.serial_number or None,
        "notBefore": _moment(status.not_before),
        "notAfter": _moment(status.not_after),
        "renewalTime": _moment(status.renewal_time),
        "failedAttempts": status.failed_attempts,
        "lastFailureTime": _moment(status.last_failure_time),
        "nextAttemptTime": _moment(status.next_attempt_time),
        "lastProblem": to_wire(status.last_problem) if status.last_problem else None,
        "conditions": [to_wire(condition) for condition in status.conditions],
    }


# --- one in detail ----------------------------------------------------------------------------------------------------


def detail_document(detail: Detail, now: datetime) -> dict[str, Any]:
    """`document`, and what belongs to the Certificate."""
    status = detail.certificate.status
    order = status.issuance
    return {
        **document(detail.certificate, now),
        "issuerStatus": detail.issuer,
        "order": order
        and {
            "state": order.state,
            "startedAt": _moment(order.started_at),
            "deadline": _moment(order.deadline),
            "url": order.order_url or None,
            "challenges": [{"identifier": each.identifier, "type": each.type} for each in order.challenges],
        },
        "recentOrders": [
            {"time": _moment(each.time), "outcome": each.outcome, "accountURI": each.account_uri or None}
            for each in status.recent_orders
        ],
        "events": [
            {"time": _moment(each.time), "type": each.type, "reason": each.reason, "message": each.message}
            for each in detail.events
        ],
    }


def detail_lines(detail: Detail, now: datetime) -> list[str]:
    """A Certificate and what belongs to it, for people."""
    certificate, status = detail.certificate, detail.certificate.status
    seen = state(certificate, now)
    facts = [
        ("names", ", ".join(names(certificate))),
        ("issuer", f"{certificate.spec.issuer_ref.kind} {certificate.spec.issuer_ref.name}, {detail.issuer}"),
        ("secret", f"{certificate.metadata.namespace}/{certificate.spec.secret_name}"),
    ]
    if status.serial_number:
        facts.append(("serial", status.serial_number))
    if status.not_after:
        life = f"{absolute(status.not_before)} to {absolute(status.not_after)}"
        facts.append(("valid", f"{life}, {_ends(status.not_after, now)}"))
    if status.renewal_time:
        facts.append(("renews", _moment_and_span(status.renewal_time, now)))
    if status.failed_attempts:
        last = f", the last {relative(status.last_failure_time, now)}" if status.last_failure_time else ""
        facts.append(("failures", f"{status.failed_attempts} in a row{last}"))
    if status.next_attempt_time:
        facts.append(("next try", _moment_and_span(status.next_attempt_time, now)))
    if status.last_problem:
        blamed = f" ({', '.join(status.last_problem.identifiers)})" if status.last_problem.identifiers else ""
        facts.append(("problem", f"{status.last_problem.type}: {status.last_problem.detail}{blamed}"))
    if order := status.issuance:
        until = f", open until {absolute(order.deadline)}" if order.deadline else ""
        facts.append(("order", f"{order.state}, begun {relative(order.started_at, now)}{until}"))
        facts += [("", text) for text in (order.order_url,) if text]
        facts += [("", f"{each.identifier} by {each.type}") for each in order.challenges]
    message = relative_times(seen.message, now).removesuffix(".")
    lines = [
        printable(f"Certificate {certificate.key} is {'ready' if seen.ready else 'not ready'}: {message}"),
        *table([(title, printable(text)) for title, text in facts], indent="  "),
    ]
    sections = {
        "conditions": _conditions(status.conditions, now),
        "recent orders": [
            ["PLACED", "OUTCOME", "ACCOUNT"],
            *([_ago(each.time, now), each.outcome, each.account_uri or "-"] for each in reversed(status.recent_orders)),
        ],
        "events": [
            ["LAST SEEN", "TYPE", "REASON", "MESSAGE"],
            *([_ago(each.time, now), each.type, each.reason, each.message] for each in detail.events),
        ],
    }
    for title, rows in sections.items():
        if len(rows) > 1:
            lines += ["", title, *table([[printable(cell) for cell in each] for each in rows], indent="  ")]
    return lines


def issuer_status(issuer: Issuer | None) -> str:
    """What is known of an issuer, as a sentence part."""
    if issuer is None:
        return "which does not exist"
    ready = find_condition(issuer.status.conditions, "Ready")
    if ready is None:
        return "which the controller has not looked at yet"
    return f"{'ready' if ready.status == 'True' else 'not ready'}: {ready.message}"


def _conditions(conditions: Sequence[Condition], now: datetime) -> list[list[str]]:
    rows = [["TYPE", "STATUS", "REASON", "SINCE", "MESSAGE"]]
    said = ""
    for each in conditions:
        message = "as above" if each.message == said else each.message
        rows.append([each.type, each.status, each.reason, _ago(each.last_transition_time, now), message])
        said = each.message
    return rows


def _left(time: datetime | None, now: datetime, over: str) -> str:
    if time is None:
        return "-"
    return over if time <= now else span(time - now)


def _ends(time: datetime, now: datetime) -> str:
    return f"expired {relative(time, now)}" if time <= now else f"{span(time - now)} left"


def _ago(time: datetime | None, now: datetime) -> str:
    return relative(min(time, now), now) if time else "-"


def _moment_and_span(time: datetime, now: datetime) -> str:
    return f"{absolute(time)}, {relative(time, now)}"


def _moment(time: datetime | None) -> str | None:
    return absolute(time) if time else None
