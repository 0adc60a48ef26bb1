"""How watched objects are found without a scan: the indexes that `main` declares, and the queue keys of objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from certbotk8s.domain import api
from certbotk8s.domain.policy import places, places_against
from certbotk8s.ports import Key

if TYPE_CHECKING:
    from certbotk8s.domain.api import Certificate, Ingress, IssuerRef, SecretFacts
    from certbotk8s.ports import Store

BY_SECRET = "secret"  # noqa: S105 - the name of an index
BY_ISSUER = "issuer"
BY_NAME = "name"
BY_NAMESPACE = "namespace"
BY_ORDER_SET = "order set"
BY_ORDERED_FROM = "ordered from"
BY_TOKEN = "token"  # noqa: S105
BY_INGRESS = "ingress"
BY_OWNER = "owner"
BY_TLS = "tls"


def certificate_key(certificate: Certificate) -> Key:
    """The queue key of a Certificate."""
    return Key("Certificate", certificate.metadata.namespace, certificate.metadata.name)


def issuer_key(certificate: Certificate, ref: IssuerRef | None = None) -> Key:
    """The queue key of the Certificate's issuer, or of another that it referred to."""
    ref = ref or certificate.spec.issuer_ref
    return Key(ref.kind, "" if ref.kind == "ClusterIssuer" else certificate.metadata.namespace, ref.name)


def store_key(key: Key) -> str:
    """What a store calls the object of a queue key."""
    return f"{key.namespace}/{key.name}" if key.namespace else key.name


def secret_key(certificate: Certificate) -> str:
    """What a store calls the Secret that a Certificate names."""
    return f"{certificate.metadata.namespace}/{certificate.spec.secret_name}"


def _by_namespace(certificate: Certificate) -> list[str]:
    return [certificate.metadata.namespace] if certificate.spec.issuer_ref.kind == "ClusterIssuer" else []


def _by_order_set(certificate: Certificate) -> list[str]:
    return [certificate.status.issuance.order_set] if certificate.status.issuance else []


def _by_ordered_from(certificate: Certificate) -> list[str]:
    issuance = certificate.status.issuance
    return [store_index(issuer_key(certificate, issuance.issuer_ref))] if issuance else []


def _by_token(certificate: Certificate) -> list[str]:
    issuance = certificate.status.issuance
    return [challenge.token for challenge in issuance.challenges] if issuance else []


def _by_ingress(certificate: Certificate) -> list[str]:
    owners = certificate.metadata.owner_references
    return [owner.uid for owner in owners if owner.kind == "Ingress" and owner.controller]


def _by_owner(secret: SecretFacts) -> list[str]:
    meta = secret.metadata
    next_key = meta.labels.get(api.LABEL_ROLE) == api.ROLE_NEXT_KEY
    return [meta.annotations.get(api.ANNOTATION_CERTIFICATE_UID, "")] if next_key else []


def _by_tls(ingress: Ingress) -> list[str]:
    return [f"{ingress.metadata.namespace}/{entry.secret_name}" for entry in ingress.spec.tls if entry.secret_name]


CERTIFICATE_INDEXES = {
    BY_SECRET: lambda certificate: [secret_key(certificate)],
    BY_ISSUER: lambda certificate: [store_index(issuer_key(certificate))],
    # What has to do with a ClusterIssuer, by its names: see domain.policy.
    BY_NAME: places,
    # Certificates that a ClusterIssuer signs.
    BY_NAMESPACE: _by_namespace,
    # An order under way, by what CAs tell orders apart by.
    BY_ORDER_SET: _by_order_set,
    # An order under way, by its issuer.
    BY_ORDERED_FROM: _by_ordered_from,
    # Pending challenges: what the HTTP-01 responder asks.
    BY_TOKEN: _by_token,
    # The UID of the Ingress that a Certificate was made for.
    BY_INGRESS: _by_ingress,
}
# Next-key Secrets by the UID of their Certificate.
SECRET_INDEXES = {BY_OWNER: _by_owner}
# Ingresses by the Secrets that they name, which are the names of their Certificates too.
INGRESS_INDEXES = {BY_TLS: _by_tls}


def contenders(store: Store[Certificate], certificate: Certificate) -> list[Certificate]:
    """The Certificates of other namespaces that have to do with a ClusterIssuer of its, and with one of its names."""
    found = [other for place in places_against(certificate) for other in store.find(BY_NAME, place)]
    namespace = certificate.metadata.namespace
    return list({each.key: each for each in found if each.metadata.namespace != namespace}.values())


def store_index(issuer: Key) -> str:
    """The value of BY_ISSUER and BY_ORDERED_FROM for an issuer."""
    return "/".join(issuer)
