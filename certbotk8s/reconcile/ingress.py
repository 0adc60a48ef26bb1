"""Writes a Certificate for each Secret that an annotated Ingress names; the rest is the Certificate's own way.

A Certificate that is not owned by the Ingress is never touched. What the Ingress no longer names goes; the Secret
stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from certbotk8s.domain import api
from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.names import listing
from certbotk8s.domain.reasons import Reason
from certbotk8s.reconcile.indexes import BY_INGRESS, store_key
from certbotk8s.reconcile.status import report

if TYPE_CHECKING:
    from certbotk8s.domain.api import Certificate, Ingress
    from certbotk8s.ports import Cluster, Key, Steps


def is_annotated(ingress: Ingress | None) -> bool:
    """Whether an Ingress asks for certificates."""
    asked = (api.ANNOTATION_ISSUER, api.ANNOTATION_CLUSTER_ISSUER)
    return ingress is not None and any(name in ingress.metadata.annotations for name in asked)


def wanted(ingress: Ingress) -> tuple[dict[str, api.CertificateSpec] | None, list[str]]:
    """The Certificates that an Ingress asks for, by name, and what is wrong with it; None where that is not clear.

    One Certificate for each Secret: entries that name the same Secret make one, for all their hosts.
    """
    annotations, problems = ingress.metadata.annotations, []
    issuer = annotations.get(api.ANNOTATION_ISSUER, "")
    cluster_issuer = annotations.get(api.ANNOTATION_CLUSTER_ISSUER, "")
    if issuer and cluster_issuer:
        text = f"It has both annotations {api.ANNOTATION_ISSUER} and {api.ANNOTATION_CLUSTER_ISSUER}: keep one of them"
        return None, [text]
    if not issuer and not cluster_issuer:
        return {}, []
    ref = api.IssuerRef(issuer) if issuer else api.IssuerRef(cluster_issuer, kind="ClusterIssuer")
    hosts: dict[str, list[str]] = {}
    for number, entry in enumerate(ingress.spec.tls):
        if not entry.secret_name:
            problems.append(f"spec.tls[{number}] has no secretName: name the Secret for the certificate")
        elif not entry.hosts:
            problems.append(f"spec.tls[{number}] has no hosts: list the names for Secret {entry.secret_name}")
        else:
            hosts.setdefault(entry.secret_name, []).extend(entry.hosts)
    if not ingress.spec.tls:
        problems.append("It asks for a certificate but has no spec.tls: add an entry with hosts and a secretName")
    specs = {
        name: api.CertificateSpec(secret_name=name, issuer_ref=ref, dns_names=tuple(dict.fromkeys(names)))
        for name, names in hosts.items()
    }
    return specs, problems


class IngressReconciler:
    """Reconciles annotated Ingresses."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def __call__(self, key: Key) -> Steps:
        """One reconcile: the Certificates of this Ingress as it asks for them now."""
        yield from ()
        ingress = self._cluster.store(api.INGRESS).get(store_key(key))
        if ingress is None or ingress.metadata.deletion_timestamp:
            return None  # Kubernetes removes what it owned
        specs, problems = wanted(ingress)
        certificates = self._cluster.store(api.CERTIFICATE)
        owned = {each.metadata.name: each for each in certificates.find(BY_INGRESS, ingress.metadata.uid)}
        for name, spec in (specs or {}).items():
            there = owned.get(name)
            if there is None and certificates.get(f"{key.namespace}/{name}"):
                problems.append(
                    f"Certificate {key.namespace}/{name} exists and is not owned by this Ingress: it is left as it is"
                )
            elif there is None or _differs(there.spec, spec):
                try:
                    self._apply(ingress, name, spec, there)
                except PermanentError as error:
                    problems.append(f"Certificate {key.namespace}/{name} was refused: {error}")
        for name, certificate in owned.items():
            if specs is not None and name not in specs:
                self._cluster.delete(api.CERTIFICATE, key.namespace, name, uid=certificate.metadata.uid)
                text = f"Certificate {certificate.key} deleted: this Ingress no longer names it. Its Secret stays"
                report(self._cluster, "Ingress", ingress, Reason.CERTIFICATE_DELETED, text)
        for problem in problems:
            report(self._cluster, "Ingress", ingress, Reason.INGRESS_INVALID, f"{problem}.", warning=True)
        return None

    def _apply(self, ingress: Ingress, name: str, spec: api.CertificateSpec, there: Certificate | None) -> None:
        meta = ingress.metadata
        owner = {
            "apiVersion": api.INGRESS.api_version,
            "kind": "Ingress",
            "name": meta.name,
            "uid": meta.uid,
            "controller": True,
        }
        ref = spec.issuer_ref
        manifest: dict[str, Any] = {
            "apiVersion": api.API_VERSION,
            "kind": "Certificate",
            "metadata": {"name": name, "namespace": meta.namespace, "ownerReferences": [owner]},
            "spec": {
                "secretName": spec.secret_name,
                "issuerRef": {"name": ref.name, "kind": ref.kind},
                "dnsNames": list(spec.dns_names),
            },
        }
        for_names = f"Certificate {meta.namespace}/{name} for {listing(spec.dns_names)}"
        if there is None:
            self._cluster.create(api.CERTIFICATE, manifest)
            report(self._cluster, "Ingress", ingress, Reason.CERTIFICATE_CREATED, f"{for_names} created")
        else:
            manifest["metadata"]["uid"] = there.metadata.uid
            self._cluster.apply(api.CERTIFICATE, manifest)
            report(self._cluster, "Ingress", ingress, Reason.CERTIFICATE_UPDATED, f"{for_names} brought up to date")


def _differs(have: api.CertificateSpec, want: api.CertificateSpec) -> bool:
    """Only what comes from the Ingress is compared: the rest of the spec may be somebody else's."""
    return (have.secret_name, have.issuer_ref, have.dns_names) != (want.secret_name, want.issuer_ref, want.dns_names)
