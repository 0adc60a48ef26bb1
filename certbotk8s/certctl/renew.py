"""`certctl renew`: ask for a new certificate now, and wait for it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, NamedTuple

from certbotk8s.certctl.errors import CertctlError, tell
from certbotk8s.certctl.reader import Reader, log_to_stderr
from certbotk8s.certctl.table import absolute, printable, span
from certbotk8s.certctl.view import HEADWAY, SUCCESSES, state
from certbotk8s.clock import SystemClock
from certbotk8s.domain.api import ANNOTATION_RENEW_NOW, find_condition

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from certbotk8s.certctl.reader import Change, Connection
    from certbotk8s.domain.api import Certificate
    from certbotk8s.ports import Clock


class Verdict(NamedTuple):
    """How a renewal ended."""

    renewed: bool
    message: str


def verdict(asked: Certificate, change: Change) -> Verdict | None:
    """How the renewal that was asked for ended; None while it goes on.

    `asked` is the Certificate as it stood when the annotation had been set: a failure that it shows already is an old
    one. Times are not compared with this machine's, whose clock may differ.
    """
    certificate, status = change.certificate, change.certificate.status
    value = asked.metadata.annotations[ANNOTATION_RENEW_NOW]
    if change.gone or certificate.metadata.uid != asked.metadata.uid:
        return Verdict(renewed=False, message="it was deleted")
    ready, issuing = find_condition(status.conditions, "Ready"), find_condition(status.conditions, "Issuing")
    under_way = issuing is not None and issuing.status == "True"
    if status.renew_now == value and ready and ready.status == "True" and not under_way:
        until = f", valid until {absolute(status.not_after)}" if status.not_after else ""
        return Verdict(renewed=True, message=f"serial {status.serial_number}{until}")
    if issuing and not under_way and issuing.reason not in SUCCESSES | HEADWAY:
        before = find_condition(asked.status.conditions, "Issuing")
        failed_anew = status.last_failure_time not in (None, asked.status.last_failure_time)
        if failed_anew or before is None or before != issuing:
            return Verdict(renewed=False, message=issuing.message)
    carried_out = status.issuance is not None and status.issuance.renew_now == value
    if certificate.metadata.annotations.get(ANNOTATION_RENEW_NOW) != value and not carried_out:
        return Verdict(renewed=False, message=f"the annotation {ANNOTATION_RENEW_NOW} was changed by someone else")
    return None


def renew(connection: Connection, names: Sequence[str], *, wait: bool, timeout: timedelta) -> bool:
    """Ask for every renewal, then with `wait` wait for all of them; whether all went well."""
    reader, clock = Reader(connection), SystemClock()
    deadline = clock.monotonic() + timeout.total_seconds()
    asked: list[Certificate] = []
    good = True
    for name in dict.fromkeys(names):
        # Each value orders once, whatever the clocks of two machines say.
        value = f"{clock.now():%Y-%m-%dT%H:%M:%SZ}-{secrets.token_hex(4)}"
        try:
            asked.append(reader.ask_renewal(name, value))
        except CertctlError as error:
            good = False
            tell(error)
        else:
            print(f"Renewal of {asked[-1].key} requested", flush=True)
    if wait:
        log_to_stderr()
        for certificate in asked:
            try:
                print(_await(reader, certificate, clock, deadline, span(timeout)), flush=True)
            except CertctlError as error:
                good = False
                tell(error)
    return good


def _await(reader: Reader, asked: Certificate, clock: Clock, deadline: float, patience: str) -> str:
    """What to say of the renewed Certificate; CertctlError when it failed or took too long."""
    meta = asked.metadata
    hint = f"certctl status -n {meta.namespace} {meta.name} shows more"
    last = asked
    for change in reader.changes(meta.namespace, clock, name=meta.name, deadline=deadline):
        last = change.certificate
        end = verdict(asked, change)
        if end and end.renewed:
            return printable(f"Renewed {asked.key}: {end.message}")
        if end:
            raise CertctlError(f"{asked.key} was not renewed: {end.message.removesuffix('.')}", hint)
    seen = state(last, clock.now())
    begun = seen.issuing or seen.attention
    found = f"last seen: {seen.message.removesuffix('.')}" if begun else "the controller has not begun with it"
    raise CertctlError(f"{asked.key} was not renewed within {patience}; {found}", f"it goes on by itself; {hint}")
