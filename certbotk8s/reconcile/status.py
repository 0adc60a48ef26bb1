"""Writes a Certificate's status, and says the same sentence in the condition, the Event and the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from msgspec import structs

from certbotk8s.domain import api
from certbotk8s.domain.attempt import Ending
from certbotk8s.domain.errors import Conflict
from certbotk8s.domain.issuance import State
from certbotk8s.domain.plan import Finding, conditions, issuer_name, unfit
from certbotk8s.domain.renewal import renewal_time
from certbotk8s.ports import Reference

if TYPE_CHECKING:
    from certbotk8s.domain.api import Certificate, Issuance
    from certbotk8s.domain.plan import Observed
    from certbotk8s.domain.reasons import Reason
    from certbotk8s.ports import Cluster

log = logging.getLogger(__name__)


def report(
    cluster: Cluster,
    kind: str,
    about: api.Resource,
    reason: Reason,
    message: str,
    *,
    warning: bool = False,
    **more: object,
) -> None:
    """One sentence about an object: as an Event, and in the log; there with `more`, which are keys of `logs.KEYS`."""
    meta = about.metadata
    version = "networking.k8s.io/v1" if kind == "Ingress" else api.API_VERSION
    cluster.event(Reference(version, kind, meta.namespace, meta.name, meta.uid), reason, message, warning=warning)
    level = logging.WARNING if warning else logging.INFO
    log.log(level, "%s", message, extra={"kind": kind, "object": about.key, "reason": str(reason)} | more)


def report_order(
    cluster: Cluster, certificate: Certificate, issuance: Issuance, url: str, ending: Ending, finding: Finding
) -> None:
    """How an order ended: its Event, and its line in the log, from which audits are made (docs/policy.md)."""
    report(
        cluster,
        "Certificate",
        certificate,
        finding.reason,
        finding.message,
        warning=ending is Ending.FAILED,
        outcome=str(ending),
        namespace=certificate.metadata.namespace,
        names=issuance.names,
        issuer=issuer_name(certificate, issuance.issuer_ref),
        account=issuance.account_uri,
        order=url,
    )


def write_status(
    cluster: Cluster,
    seen: Observed,
    issuance: Issuance | None,
    finding: Finding | None,
    *,
    issuing: bool,
    **changes: Any,
) -> Certificate:
    """The Certificate with its status as it should stand; writes only when that differs.

    Raises Conflict when somebody else has changed the issuance meanwhile: then what we know is not to be trusted. A
    mere change of spec or metadata is no reason to lose an order: the write is repeated on top of it, once. Finalizing
    is not written on top of another spec: nobody turns back from it.
    """
    certificate = seen.certificate
    facts = seen.secret.certificate if seen.secret and unfit(seen) is None else None
    if facts:
        changes |= {
            "serial_number": facts.serial_number,
            "not_before": facts.not_before,
            "not_after": facts.not_after,
            "renewal_time": renewal_time(certificate.spec, facts),
        }
    status = structs.replace(
        certificate.status,
        conditions=conditions(seen, issuing=issuing, finding=finding),
        observed_generation=certificate.metadata.generation,
        issuance=issuance,
        **changes,
    )
    if status == certificate.status:
        return certificate
    try:
        return _apply(cluster, certificate, status)
    except Conflict:
        meta = certificate.metadata
        live = cluster.get(api.CERTIFICATE, meta.namespace, meta.name)
        if live is None or live.metadata.uid != meta.uid or live.status != certificate.status:
            raise
        if issuance and issuance.state == State.FINALIZING and live.metadata.generation != meta.generation:
            raise
        return _apply(cluster, live, status)


def _apply(cluster: Cluster, certificate: Certificate, status: api.CertificateStatus) -> Certificate:
    meta = certificate.metadata
    manifest = {
        "apiVersion": api.API_VERSION,
        "kind": "Certificate",
        "metadata": {
            "name": meta.name,
            "namespace": meta.namespace,
            "uid": meta.uid,
            "resourceVersion": meta.resource_version,
        },
        "status": api.to_wire(status),
    }
    return cluster.apply(api.CERTIFICATE, manifest, subresource="status")
