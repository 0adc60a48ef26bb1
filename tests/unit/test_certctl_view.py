"""What certctl says about a Certificate, as a function of the object and the time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from certbotk8s.certctl.reader import Change
from certbotk8s.certctl.renew import verdict
from certbotk8s.certctl.table import table
from certbotk8s.certctl.view import (
    Detail,
    Event,
    detail_document,
    detail_lines,
    document,
    head,
    issuer_status,
    row,
    state,
    summary,
)
from certbotk8s.domain.api import CERTIFICATE, ISSUER, Certificate
from certbotk8s.domain.reasons import Reason

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)


def condition(kind: str, status: str, reason: Reason, message: str) -> dict[str, Any]:
    since = "2026-11-21T11:00:00Z"
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": since}


READY = condition("Ready", "True", Reason.READY, "Valid until 2027-01-19 12:00 UTC for shop.example.test")
NOT_READY = condition("Ready", "False", Reason.SECRET_MISSING, "There is no Secret shop/web-tls yet")
ISSUED = condition("Issuing", "False", Reason.ISSUED, "Written")
ORDERING = condition("Issuing", "True", Reason.ORDER_PENDING, "Waiting for the CA to check shop.example.test")
LIMITED = condition("Issuing", "True", Reason.RATE_LIMITED, "5 in 7 days. Next attempt 2026-11-21 12:42 UTC.")
NO_ISSUER = condition("Issuing", "False", Reason.ISSUER_NOT_FOUND, "ClusterIssuer letsencrypt does not exist.")
SAME_NAMES = condition("Issuing", "False", Reason.SAME_NAMES, "Waiting for shop/other, which orders the same names")
OTHERS = condition("Issuing", "False", Reason.ORDERS_LIMITED, "Waiting for other orders of Issuer shop/ca to end")
FAILED = condition("Issuing", "False", Reason.CHALLENGE_FAILED, "CA got 404. Next attempt 2026-11-21 12:42 UTC.")


def certificate(
    *conditions: dict[str, Any],
    name: str = "web-tls",
    names: tuple[str, ...] = ("shop.example.test",),
    ends: timedelta | None = 59 * DAY,
    age: timedelta = DAY,
    renew_now: str = "",
    **status: Any,
) -> Certificate:
    wire = {
        "metadata": {
            "name": name,
            "namespace": "shop",
            "uid": "uid-1",
            "creationTimestamp": (NOW - age).isoformat(),
            "annotations": {"certbotk8s.io/renew-now": renew_now} if renew_now else {},
        },
        "spec": {
            "secretName": "web-secret",
            "issuerRef": {"name": "letsencrypt", "kind": "ClusterIssuer"},
            "dnsNames": names,
        },
        "status": {
            "conditions": conditions,
            **(
                {"notAfter": (NOW + ends).isoformat(), "renewalTime": (NOW + ends - 30 * DAY).isoformat()}
                if ends
                else {}
            ),
            **status,
        },
    }
    return CERTIFICATE.decode(msgspec.json.encode(wire))


@pytest.mark.parametrize(
    ("seen", "ready", "issuing", "attention", "message"),
    [
        (certificate(READY, ISSUED), True, False, False, READY["message"]),
        (certificate(NOT_READY, ORDERING, ends=None), False, True, False, ORDERING["message"]),
        (certificate(READY, ORDERING), True, True, False, ORDERING["message"]),
        (certificate(READY, LIMITED), True, True, True, LIMITED["message"]),
        (certificate(READY, FAILED, failedAttempts=3), True, False, True, FAILED["message"]),
        (certificate(NOT_READY, ends=None), False, False, True, NOT_READY["message"]),
        (certificate(NOT_READY, SAME_NAMES, ends=None), False, False, False, SAME_NAMES["message"]),
        (certificate(NOT_READY, OTHERS, ends=None), False, False, False, OTHERS["message"]),
        (certificate(READY, NO_ISSUER), True, False, False, READY["message"]),
        (certificate(READY, NO_ISSUER, ends=9 * DAY), True, False, True, NO_ISSUER["message"]),
        (certificate(READY, NO_ISSUER, renew_now="v2"), True, False, True, NO_ISSUER["message"]),
        (certificate(READY, NO_ISSUER, renew_now="v2", renewNow="v2"), True, False, False, READY["message"]),
        (certificate(READY, ISSUED, ends=-3 * DAY), False, False, True, "Expired 3d ago"),
        (certificate(READY, FAILED, ends=-DAY, failedAttempts=9), False, False, True, FAILED["message"]),
        (
            certificate(ends=None),
            False,
            False,
            True,
            "Waiting for the controller, which has not looked at it yet",
        ),
        (
            certificate(ends=None, age=timedelta(seconds=1)),
            False,
            False,
            False,
            "Waiting for the controller, which has not looked at it yet",
        ),
    ],
)
def test_state_says_what_matters_now(
    seen: Certificate, ready: bool, issuing: bool, attention: bool, message: str
) -> None:
    """The message is that of the issuance while there is one or it failed, else Ready's; a dead controller is noticed.

    Fails when an expired certificate counts as ready because its condition still says so, when a rate limit needs no
    attention, or when a missing issuer is told although nothing is to be ordered.
    """
    found = state(seen, NOW)
    assert (found.ready, found.issuing, found.attention, found.message) == (ready, issuing, attention, message)


def test_table_is_short_and_wide_is_complete() -> None:
    """Rows are relative and short, with `wide` absolute and complete; the namespace shows only when asked for.

    Fails when RENEWS shows a time that has passed, or wide shortens the names.
    """
    many = certificate(READY, FAILED, failedAttempts=3, names=("a.example.test", "b.example.test"), ends=9 * DAY)
    rows = [row(each, NOW, wide=False, namespaces=True) for each in (certificate(READY), many, certificate(ends=None))]
    assert table([head(wide=False, namespaces=True), *rows]) == [
        "NAMESPACE  NAME     READY  NAMES              ISSUER       EXPIRES  RENEWS  STATUS",
        "shop       web-tls  yes    shop.example.test  letsencrypt  59d      29d     Up to date",
        "shop       web-tls  yes    a.example.test +1  letsencrypt  9d       now     CA got 404. Next attempt in 42m.",
        "shop       web-tls  no     shop.example.test  letsencrypt  -        -       "
        "Waiting for the controller, which has not looked at it yet",
    ]
    assert dict(zip(head(wide=True, namespaces=False), row(many, NOW, wide=True, namespaces=False), strict=True)) == {
        "NAME": "web-tls",
        "READY": "yes",
        "NAMES": "a.example.test,b.example.test",
        "ISSUER": "ClusterIssuer/letsencrypt",
        "SECRET": "web-secret",
        "EXPIRES": "2026-11-30T12:00:00Z",
        "RENEWS": "2026-10-31T12:00:00Z",
        "STATUS": "CA got 404. Next attempt 2026-11-21 12:42 UTC.",
    }


def test_summary_points_at_the_first_that_needs_attention() -> None:
    """The line below the table counts, and gives the command that shows the first problem.

    Fails when one that is merely being issued is pointed at.
    """
    good, ordering = certificate(READY), certificate(NOT_READY, ORDERING, ends=None)
    bad = certificate(NOT_READY, name="old-tls", ends=None)
    assert summary([good], NOW) == "1 certificate: 1 ready"
    assert summary([good, ordering], NOW) == "2 certificates: 1 ready, 1 issuing"
    assert summary([ordering, bad], NOW) == (
        "2 certificates: 0 ready, 1 issuing; 1 needs attention (certctl status -n shop old-tls)"
    )
    assert summary([bad, bad], NOW) == (
        "2 certificates: 0 ready; 2 need attention, first: certctl status -n shop old-tls"
    )


def test_document_is_stable_and_complete() -> None:
    """Programs find RFC 3339 times, null for what is not there, and the conditions as they stand.

    Fails when a member is dropped because it is empty.
    """
    found = document(certificate(READY, ends=timedelta(days=59, microseconds=1)), NOW)
    assert list(found) == [
        "namespace",
        "name",
        "ready",
        "issuing",
        "needsAttention",
        "status",
        "names",
        "issuer",
        "secretName",
        "serialNumber",
        "notBefore",
        "notAfter",
        "renewalTime",
        "failedAttempts",
        "lastFailureTime",
        "nextAttemptTime",
        "lastProblem",
        "conditions",
    ]
    assert (found["notAfter"], found["notBefore"], found["serialNumber"]) == ("2027-01-19T12:00:00Z", None, None)
    assert found["conditions"] == [READY]


def busy() -> Detail:
    """A renewal under way after failures, with something of everything."""
    seen = certificate(
        READY,
        ORDERING,
        serialNumber="3f",
        notBefore="2026-10-22T12:00:00Z",
        failedAttempts=2,
        lastFailureTime="2026-11-21T11:50:00Z",
        nextAttemptTime="2026-11-21T12:42:00Z",
        lastProblem={"type": "unauthorized", "detail": "got 404\x1b[2J", "identifiers": ["shop.example.test"]},
        recentOrders=[
            {"time": "2026-10-22T12:00:00Z", "setHash": "h", "generation": 1, "outcome": "Issued"},
            {"time": "2026-11-21T11:49:00Z", "setHash": "h", "generation": 1, "outcome": "ChallengeFailed"},
        ],
        issuance={
            "generation": 1,
            "attempt": 3,
            "requestHash": "h",
            "orderSet": "s",
            "state": "Submitted",
            "startedAt": "2026-11-21T11:59:48Z",
            "issuerRef": {"name": "letsencrypt"},
            "orderURL": "https://ca.example.test/order/812",
            "deadline": "2026-11-28T12:00:00Z",
            "challenges": [
                {
                    "identifier": "shop.example.test",
                    "type": "http-01",
                    "url": "https://ca.example.test/chall/1",
                    "token": "TOKEN",
                    "keyAuthorization": "TOKEN.THUMB",
                    "solver": "http01-ingress",
                }
            ],
        },
    )
    event = {
        "metadata": {"name": "e"},
        "type": "Warning",
        "reason": "ChallengeFailed",
        "message": "CA got 404\nfrom 192.0.2.7",
        "lastTimestamp": "2026-11-21T11:50:00Z",
    }
    return Detail(seen, "ready: account registered", (msgspec.convert(event, Event),))


def test_detail_shows_everything_on_harmless_lines() -> None:
    """One Certificate in detail: spec, issuer, validity, failures, order, history and events, each where it belongs.

    Fails when the order's URL is left out, or the CA's escape sequence reaches the terminal.
    """
    assert detail_lines(busy(), NOW) == [
        "Certificate shop/web-tls is ready: Waiting for the CA to check shop.example.test",
        "  names     shop.example.test",
        "  issuer    ClusterIssuer letsencrypt, ready: account registered",
        "  secret    shop/web-secret",
        "  serial    3f",
        "  valid     2026-10-22T12:00:00Z to 2027-01-19T12:00:00Z, 59d left",
        "  renews    2026-12-20T12:00:00Z, in 29d",
        "  failures  2 in a row, the last 10m ago",
        "  next try  2026-11-21T12:42:00Z, in 42m",
        "  problem   unauthorized: got 404[2J (shop.example.test)",
        "  order     Submitted, begun 12s ago, open until 2026-11-28T12:00:00Z",
        "            https://ca.example.test/order/812",
        "            shop.example.test by http-01",
        "",
        "conditions",
        "  TYPE     STATUS  REASON        SINCE    MESSAGE",
        "  Ready    True    Ready         60m ago  Valid until 2027-01-19 12:00 UTC for shop.example.test",
        "  Issuing  True    OrderPending  60m ago  Waiting for the CA to check shop.example.test",
        "",
        "recent orders",
        "  PLACED   OUTCOME          ACCOUNT",
        "  11m ago  ChallengeFailed  -",
        "  30d ago  Issued           -",
        "",
        "events",
        "  LAST SEEN  TYPE     REASON           MESSAGE",
        "  10m ago    Warning  ChallengeFailed  CA got 404 from 192.0.2.7",
    ]


def test_detail_says_a_long_sentence_once() -> None:
    """Where Ready and Issuing carry the same message, the second refers to the first.

    Fails when every condition repeats it.
    """
    ready = condition("Ready", "False", Reason.CHALLENGE_FAILED, FAILED["message"])
    lines = detail_lines(Detail(certificate(ready, FAILED, ends=None), "ready", ()), NOW)
    assert [line.split("  ")[-1] for line in lines[-2:]] == [FAILED["message"], "as above"]


def test_detail_document_gives_no_token_away() -> None:
    """The detail for programs has the order and the history, but no token. Fails when the issuance is dumped whole."""
    found = detail_document(busy(), NOW)
    assert found["order"] == {
        "state": "Submitted",
        "startedAt": "2026-11-21T11:59:48Z",
        "deadline": "2026-11-28T12:00:00Z",
        "url": "https://ca.example.test/order/812",
        "challenges": [{"identifier": "shop.example.test", "type": "http-01"}],
    }
    assert [each["outcome"] for each in found["recentOrders"]] == ["Issued", "ChallengeFailed"]
    assert found["issuerStatus"] == "ready: account registered"
    assert found["events"][0]["reason"] == "ChallengeFailed"
    assert b"TOKEN" not in msgspec.json.encode(found)


def test_issuer_is_described_in_a_sentence_part() -> None:
    """A missing, an unseen and a refused issuer read differently. Fails when a missing one counts as unseen."""
    wire = {
        "metadata": {"name": "ca"},
        "spec": {"acme": {"server": "https://ca", "privateKeySecretRef": {"name": "k"}}},
    }
    refused = condition("Ready", "False", Reason.EAB_REFUSED, "The CA refused key id kid-1")
    assert issuer_status(None) == "which does not exist"
    assert issuer_status(ISSUER.decode(msgspec.json.encode(wire))) == "which the controller has not looked at yet"
    seen = ISSUER.decode(msgspec.json.encode({**wire, "status": {"conditions": [refused]}}))
    assert issuer_status(seen) == "not ready: The CA refused key id kid-1"


# --- certctl renew --wait ---------------------------------------------------------------------------------------------

OLD_FAILURE: dict[str, Any] = {"failedAttempts": 1, "lastFailureTime": "2026-11-20T12:00:00Z"}
NEW_FAILURE: dict[str, Any] = {"failedAttempts": 2, "lastFailureTime": "2026-11-21T12:00:05Z"}
CARRIED_OUT: dict[str, Any] = {"serialNumber": "8a", "renewNow": "v2"}


@pytest.mark.parametrize(
    ("asked", "after", "renewed", "message"),
    [
        (certificate(READY), certificate(READY, ORDERING, renew_now="v2"), None, ""),
        (certificate(READY), certificate(READY, ORDERING, renew_now="v2", renewNow="v2"), None, ""),
        (certificate(READY), certificate(READY, ISSUED, renew_now="v2", renewNow="v1"), None, ""),
        (certificate(READY), certificate(READY, SAME_NAMES, renew_now="v2"), None, ""),
        (certificate(READY), certificate(READY, NO_ISSUER, renew_now="v2"), False, NO_ISSUER["message"]),
        (
            certificate(READY),
            certificate(READY, ISSUED, renew_now="v2", **CARRIED_OUT),
            True,
            "serial 8a, valid until 2027-01-19T12:00:00Z",
        ),
        (
            certificate(READY, FAILED, **OLD_FAILURE),
            certificate(READY, FAILED, renew_now="v2", **OLD_FAILURE),
            None,
            "",
        ),
        (
            certificate(READY, FAILED, **OLD_FAILURE),
            certificate(READY, FAILED, renew_now="v2", **NEW_FAILURE),
            False,
            FAILED["message"],
        ),
        (certificate(READY), certificate(READY, FAILED, renew_now="v2", **NEW_FAILURE), False, FAILED["message"]),
        (
            certificate(READY),
            certificate(READY, renew_now="v3"),
            False,
            "the annotation certbotk8s.io/renew-now was changed by someone else",
        ),
    ],
)
def test_renewal_is_judged_by_what_came_after_the_request(
    asked: Certificate, after: Certificate, renewed: bool | None, message: str
) -> None:
    """Done only when this very request was carried out and the certificate is Ready; failed only by a new failure.

    Fails when a failure that stood before the request ends the wait, or when any Ready=True counts as done.
    """
    meta = msgspec.structs.replace(asked.metadata, annotations={"certbotk8s.io/renew-now": "v2"})
    found = verdict(msgspec.structs.replace(asked, metadata=meta), Change(after))
    assert (found.renewed if found else None, found.message if found else "") == (renewed, message)


def test_renewal_of_a_deleted_certificate_has_failed() -> None:
    """Deletion, and another object of the same name, end the wait. Fails when only the name is compared."""
    asked = certificate(READY, renew_now="v2")
    other = msgspec.structs.replace(asked, metadata=msgspec.structs.replace(asked.metadata, uid="uid-2"))
    for change in (Change(asked, gone=True), Change(other)):
        found = verdict(asked, change)
        assert found is not None
        assert (found.renewed, found.message) == (False, "it was deleted")
