"""Test data: plausible objects, each with keyword arguments for what a test is about.

`certificate()`, `issuer()`, `ingress()` and `tls_secret()` fit each other: out of `observed()` comes a Certificate that
is up to date. Keys are made once for each name and kept, since making them costs time.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from certbotk8s.domain import api
from certbotk8s.domain.names import names_hash, wanted_names
from certbotk8s.domain.plan import Observed
from certbotk8s.domain.reasons import Reason
from tests.fakes.clock import START

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

NOW = START
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
NAME = "shop.example.test"
CURVES: dict[int, type[ec.EllipticCurve]] = {256: ec.SECP256R1, 384: ec.SECP384R1, 521: ec.SECP521R1}

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


# --- API objects ------------------------------------------------------------------------------------------------------


def metadata(name: str, namespace: str = "shop", *, uid: str = "", age: timedelta = DAY, **more: Any) -> api.ObjectMeta:
    """Metadata of an object that is `age` old; its uid is made from its name."""
    uid = uid or f"uid-of-{name}"
    return api.ObjectMeta(name, namespace, uid, "1", creation_timestamp=NOW - age, **{"generation": 1, **more})


def condition(kind: str, status: str, reason: Reason, message: str = "", **more: Any) -> api.Condition:
    """A condition that came an hour ago, of generation 1."""
    return api.Condition(kind, status, reason, message, **{"last_transition_time": NOW - HOUR, **more})


def certificate(
    name: str = "web-tls",
    *,
    namespace: str = "shop",
    names: Iterable[str] = (NAME,),
    secret_name: str = "",
    issuer_name: str = "letsencrypt",
    issuer_kind: str = "Issuer",
    key: api.PrivateKeySpec | None = None,
    status: Mapping[str, Any] | None = None,
    uid: str = "",
    age: timedelta = DAY,
    generation: int = 1,
    annotations: Mapping[str, str] | None = None,
    owner_references: tuple[api.OwnerReference, ...] = (),
    deletion_timestamp: datetime | None = None,
    **spec: Any,
) -> api.Certificate:
    """A Certificate for an ECDSA key; `secret_name` "" means its own name, `**spec` are more fields of the spec."""
    return api.Certificate(
        metadata(
            name,
            namespace,
            uid=uid,
            age=age,
            generation=generation,
            annotations=dict(annotations or {}),
            owner_references=owner_references,
            deletion_timestamp=deletion_timestamp,
        ),
        api.CertificateSpec(
            secret_name=secret_name or name,
            issuer_ref=api.IssuerRef(issuer_name, issuer_kind),
            dns_names=tuple(names),
            private_key=key or api.PrivateKeySpec("ECDSA"),
            **spec,
        ),
        api.CertificateStatus(**(status or {})),
    )


def recent_order(outcome: str = Reason.ISSUED, *, age: timedelta = HOUR, **more: Any) -> api.RecentOrder:
    """An order of the past, placed for generation 1."""
    return api.RecentOrder(NOW - age, **{"set_hash": names_hash([NAME]), "generation": 1, "outcome": outcome, **more})


def issuer(
    name: str = "letsencrypt",
    *,
    namespace: str = "shop",
    ready: str = "True",
    message: str = "",
    generation: int = 1,
    seen_generation: int | None = None,
    uid: str = "",
    accounts: tuple[api.AccountStatus, ...] = (),
    solvers: tuple[api.SolverSpec, ...] = (api.SolverSpec(api.Http01Spec(api.IngressSolverSpec("traefik"))),),
    policy: api.Policy | None = None,
    **acme: Any,
) -> api.Issuer:
    """An Issuer (a ClusterIssuer where `namespace` is "", or with a policy); `ready` "" means no condition.

    `**acme` is its spec.
    """
    given = {"server": "https://ca.example.test/dir", "private_key_secret_ref": api.SecretKeyRef(f"{name}-key"), **acme}
    seen = generation if seen_generation is None else seen_generation
    reason = Reason.READY if ready == "True" else Reason.EAB_REFUSED
    conditions = (condition("Ready", ready, reason, message, observed_generation=seen),) if ready else ()
    spec, status = api.AcmeSpec(solvers=solvers, **given), api.IssuerStatus(conditions, seen, accounts)
    if namespace and policy is None:
        return api.Issuer(metadata(name, namespace, uid=uid, generation=generation), api.IssuerSpec(spec), status)
    meta = metadata(name, "", uid=uid, generation=generation)
    return api.ClusterIssuer(meta, api.ClusterIssuerSpec(spec, policy), status)


def ingress(
    name: str = "web",
    *,
    namespace: str = "shop",
    hosts: Iterable[str] = (NAME,),
    secret_name: str = "web-tls",
    class_name: str = "traefik",
    annotations: Mapping[str, str] | None = None,
    uid: str = "",
    tls: tuple[api.IngressTLS, ...] | None = None,
) -> api.Ingress:
    """An Ingress with a TLS entry and a rule for each host, annotated to be served by ClusterIssuer `letsencrypt`."""
    hosts = tuple(hosts)
    marks = {api.ANNOTATION_CLUSTER_ISSUER: "letsencrypt"} if annotations is None else dict(annotations)
    return api.Ingress(
        metadata(name, namespace, uid=uid, annotations=marks),
        api.IngressSpec(
            class_name,
            (api.IngressTLS(hosts, secret_name),) if tls is None else tls,
            tuple(api.IngressRule(host) for host in hosts),
        ),
    )


def facts(
    names: Iterable[str] = (NAME,), *, life: timedelta = 90 * DAY, age: timedelta = DAY, **more: Any
) -> api.CertificateFacts:
    """Facts of a certificate with an ECDSA key, issued `age` ago."""
    given: dict[str, Any] = {
        "not_before": NOW - age,
        "not_after": NOW - age + life,
        "serial_number": "1a2b",
        "names_hash": names_hash(names),
        "public_key_hash": "hash of a key",
        "key_algorithm": "ECDSA",
        "key_size": 256,
        "issuer": "CN=Example CA E1",
    }
    return api.CertificateFacts(**(given | more))


def tls_secret(
    of: api.Certificate | None = None,
    *,
    holds: api.CertificateFacts | None = None,
    owner: str | None = None,
    owner_uid: str | None = None,
    role: str = api.ROLE_TLS,
    life: timedelta = 90 * DAY,
    age: timedelta = DAY,
    **more: Any,
) -> api.SecretFacts:
    """Facts of the Secret that serves the Certificate `of`. `owner` "" makes it nobody's; `**more` replaces facts."""
    of = of or certificate()
    name, uid = of.metadata.name if owner is None else owner, of.metadata.uid if owner_uid is None else owner_uid
    held = holds or facts(wanted_names(of.spec), life=life, age=age)
    marks = {api.ANNOTATION_CERTIFICATE: name, api.ANNOTATION_CERTIFICATE_UID: uid} if name else {}
    given: dict[str, Any] = {
        "type": "kubernetes.io/tls",
        "certificate": held,
        "public_key_hash": held.public_key_hash,
        "key_encoding": "PKCS1",
    }
    labels = {api.LABEL_ROLE: role} if name and role else {}
    return api.SecretFacts(
        metadata(of.spec.secret_name, of.metadata.namespace, age=age, annotations=marks, labels=labels),
        **(given | more),
    )


def observed(of: api.Certificate | None = None, **more: Any) -> Observed:
    """What is seen of a Certificate that is up to date with its issuer; `**more` are members to put in their place."""
    of = of or certificate()
    ref = of.spec.issuer_ref
    given: dict[str, Any] = {
        "certificate": of,
        "names": () if more.get("invalid") else wanted_names(of.spec),
        "invalid": None,
        "issuer": issuer(ref.name, namespace="" if ref.kind == "ClusterIssuer" else of.metadata.namespace),
        "secret": tls_secret(of),
        "rivals": (),
        "now": NOW,
    }
    return Observed(**(given | more))


def changed(of: api.Certificate, *, spec: Mapping[str, Any] | None = None, **meta: Any) -> api.Certificate:
    """The same Certificate with other fields of its spec and metadata."""
    return msgspec.structs.replace(
        of,
        spec=msgspec.structs.replace(of.spec, **(spec or {})),
        metadata=msgspec.structs.replace(of.metadata, **meta),
    )


# --- keys and certificates, real ones ---------------------------------------------------------------------------------


@cache
def private_key(name: str = "leaf", algorithm: str = "ECDSA", size: int = 256) -> PrivateKey:
    """The key of that name."""
    return rsa.generate_private_key(65537, size) if algorithm == "RSA" else ec.generate_private_key(CURVES[size]())


def key_pem(key: PrivateKey | None = None, encoding: str = "PKCS1") -> bytes:
    """A private key as PEM: PKCS1 (of an ECDSA key SEC 1) or PKCS8."""
    form = serialization.PrivateFormat.PKCS8 if encoding == "PKCS8" else serialization.PrivateFormat.TraditionalOpenSSL
    return (key or private_key()).private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


@dataclass(frozen=True)
class CA:
    """A certification authority: `served` are the certificates that it sends along with a leaf."""

    certificate: x509.Certificate
    key: PrivateKey
    served: tuple[x509.Certificate, ...]


@cache
def authority(name: str = "Example CA E1", root: str = "Example Root X1") -> CA:
    """An intermediate below a root; the root is not served."""
    top, key = private_key(root), private_key(name)
    certificate = (
        _builder(x509_name(name), x509_name(root), key, start=NOW - 365 * DAY, life=3650 * DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(top, hashes.SHA256())
    )
    return CA(certificate, key, (certificate,))


def x509_name(common_name: str) -> x509.Name:
    """A name of one attribute."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def leaf(
    names: Sequence[str] = (NAME,),
    key: PrivateKey | None = None,
    *,
    life: timedelta = 90 * DAY,
    issuer: CA | None = None,
    start: datetime = NOW - HOUR,
) -> x509.Certificate:
    """A server certificate that is valid from `start` for `life`."""
    by = issuer or authority()
    return (
        _builder(x509_name(names[0]), by.certificate.subject, key or private_key(), start=start, life=life)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .sign(by.key, hashes.SHA256())
    )


def chain(
    names: Sequence[str] = (NAME,), key: PrivateKey | None = None, *, issuer: CA | None = None, **of_leaf: Any
) -> bytes:
    """The PEM chain of a `leaf`, as a CA serves it."""
    return pem(leaf(names, key, issuer=issuer, **of_leaf), *(issuer or authority()).served)


def pem(*certificates: x509.Certificate) -> bytes:
    """Certificates as PEM, in that order."""
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def secret_json(data: Mapping[str, bytes] | None = None, *, name: str = "web-tls", **meta: Any) -> bytes:
    """A tls Secret as the API server sends it; `data` is not yet base64."""
    encoded = {member: base64.b64encode(content).decode() for member, content in (data or {}).items()}
    about = {"name": name, "namespace": "shop", **meta}
    return msgspec.json.encode({"metadata": about, "type": "kubernetes.io/tls", "data": encoded})


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PrivateKey, *, start: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + life)
    )
