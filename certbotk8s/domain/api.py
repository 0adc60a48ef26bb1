"""The API objects that the controller reads, as far as it reads them.

The YAML in `crds/` is the contract; these Structs mirror the fields that the code uses, and a test walks both and fails
on a difference. Objects of Kubernetes itself are cut down to the members that are looked at. All Structs are frozen: a
cache hands the same object to every thread.

Field names are those of the API (camelCase on the wire). Times are UTC datetimes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

GROUP = "certbotk8s.io"
VERSION = "v1"
API_VERSION = f"{GROUP}/{VERSION}"
FIELD_MANAGER = "certbotk8s"

# Annotations and labels, all of them; a new one is added to the reference in docs first.
ANNOTATION_ISSUER = f"{GROUP}/issuer"
ANNOTATION_CLUSTER_ISSUER = f"{GROUP}/cluster-issuer"
ANNOTATION_RENEW_NOW = f"{GROUP}/renew-now"
ANNOTATION_ADOPT = f"{GROUP}/adopt"
ANNOTATION_CERTIFICATE = f"{GROUP}/certificate"
ANNOTATION_CERTIFICATE_UID = f"{GROUP}/certificate-uid"
ANNOTATION_ACCOUNT_URI = f"{GROUP}/account-uri"
ANNOTATION_DISCARDED = f"{GROUP}/discarded"
ANNOTATION_ROLLOVER = f"{GROUP}/rollover"
ANNOTATION_RESPONDER_ADDRESS = f"{GROUP}/responder-address"
LABEL_ROLE = f"{GROUP}/role"
ROLE_TLS = "tls"
ROLE_NEXT_KEY = "next-key"
ROLE_CHALLENGE = "challenge"


class Struct(msgspec.Struct, frozen=True, gc=False, rename="camel", omit_defaults=True):
    """What every API type here is: immutable, camelCase on the wire, defaults left out."""


class OwnerReference(Struct, frozen=True):
    """metav1.OwnerReference."""

    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool = False
    block_owner_deletion: bool = False


class ObjectMeta(Struct, frozen=True):
    """metav1.ObjectMeta, without what nothing here reads (managedFields above all)."""

    name: str
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    owner_references: tuple[OwnerReference, ...] = ()
    finalizers: tuple[str, ...] = ()


class Resource(Struct, frozen=True):
    """Any object with metadata."""

    metadata: ObjectMeta

    @property
    def key(self) -> str:
        """`namespace/name`, or `name` of a cluster-scoped object: how messages and caches call it."""
        meta = self.metadata
        return f"{meta.namespace}/{meta.name}" if meta.namespace else meta.name


class Condition(Struct, frozen=True):
    """metav1.Condition."""

    type: str
    status: str
    reason: str
    message: str
    last_transition_time: datetime
    observed_generation: int = 0


# --- Certificate ------------------------------------------------------------------------------------------------------


class IssuerRef(Struct, frozen=True):
    """Which Issuer or ClusterIssuer signs."""

    name: str
    kind: str = "Issuer"
    group: str = GROUP


class PrivateKeySpec(Struct, frozen=True):
    """Key of the certificate. `size` 0 means the algorithm's default: RSA 2048, ECDSA 256."""

    algorithm: str = "RSA"
    size: int = 0
    encoding: str = "PKCS1"
    rotation_policy: str = "Always"


class CertificateSpec(Struct, frozen=True):
    """What the user wants."""

    secret_name: str
    issuer_ref: IssuerRef
    dns_names: tuple[str, ...] = ()
    common_name: str = ""
    private_key: PrivateKeySpec = PrivateKeySpec()
    renew_before: str = ""
    renew_before_percentage: int = 0
    profile: str = ""


class PendingChallenge(Struct, frozen=True):
    """A challenge chosen for an authorization; enough to present, answer and clean up after a restart.

    `key_authorization` is RFC 8555 section 8.1; `solver` is the entry point's name.
    """

    identifier: str
    type: str
    url: str
    token: str
    key_authorization: str
    solver: str


class Issuance(Struct, frozen=True):
    """An issuance under way: the least that must survive a crash. The CA's order is the truth about how far it is.

    `state` is a `domain.issuance.State`; `request_hash` tells whether the spec still asks for the same thing;
    `order_set` is equal for orders that a CA would take for one; `deadline` is the order's `expires`, else a day after
    finalize. `names` are those that the order is for, whatever the spec says by now.
    """

    generation: int
    attempt: int
    request_hash: str
    order_set: str
    state: str
    started_at: datetime
    issuer_ref: IssuerRef
    account_uri: str = msgspec.field(default="", name="accountURI")
    key_secret_name: str = ""
    order_url: str = msgspec.field(default="", name="orderURL")
    finalize_url: str = msgspec.field(default="", name="finalizeURL")
    certificate_url: str = msgspec.field(default="", name="certificateURL")
    deadline: datetime | None = None
    names: tuple[str, ...] = ()
    renew_now: str = ""
    challenges: tuple[PendingChallenge, ...] = ()


class RecentOrder(Struct, frozen=True):
    """One order of the past: what budgets and the shortest interval between two issuances are reckoned from.

    `issuer` is the UID and the generation of the issuer at its end, as `domain.plan.issuer_version` gives them.
    """

    time: datetime
    set_hash: str
    generation: int
    outcome: str
    renew_now: str = ""
    account_uri: str = msgspec.field(default="", name="accountURI")
    order_url: str = msgspec.field(default="", name="orderURL")
    issuer: str = ""


class LastProblem(Struct, frozen=True):
    """The CA's own words about the last failure (RFC 7807 problem document, cut to size)."""

    type: str
    detail: str
    identifiers: tuple[str, ...] = ()


class CertificateStatus(Struct, frozen=True):
    """What the controller found and did. Written by the controller alone."""

    conditions: tuple[Condition, ...] = ()
    observed_generation: int = 0
    not_before: datetime | None = None
    not_after: datetime | None = None
    renewal_time: datetime | None = None
    serial_number: str = ""
    issuer_ref: IssuerRef | None = None
    account_uri: str = msgspec.field(default="", name="accountURI")
    revision: int = 0
    renew_now: str = ""
    failed_attempts: int = 0
    last_failure_time: datetime | None = None
    next_attempt_time: datetime | None = None
    last_problem: LastProblem | None = None
    recent_orders: tuple[RecentOrder, ...] = ()
    issuance: Issuance | None = None


class Certificate(Resource, frozen=True):
    """certbotk8s.io/v1 Certificate."""

    spec: CertificateSpec
    status: CertificateStatus = CertificateStatus()


# --- Issuer and ClusterIssuer -----------------------------------------------------------------------------------------


class SecretKeyRef(Struct, frozen=True):
    """A Secret in the Issuer's namespace (a ClusterIssuer's: the controller's), and the member to read."""

    name: str
    key: str = ""


class ExternalAccountBinding(Struct, frozen=True):
    """RFC 8555 section 7.3.4."""

    key_id: str = msgspec.field(name="keyID")
    key_secret_ref: SecretKeyRef
    key_algorithm: str = "HS256"


class BindingSpec(Struct, frozen=True):
    """One of several bindings, each with an account of its own; `shapes` are `domain.bindings.Shape`s, none: all."""

    name: str
    external_account_binding: ExternalAccountBinding
    shapes: tuple[str, ...] = ()


class IngressSolverSpec(Struct, frozen=True):
    """HTTP-01 through a temporary Ingress."""

    ingress_class_name: str = ""


class Http01Spec(Struct, frozen=True):
    """HTTP-01 (RFC 8555 section 8.3)."""

    ingress: IngressSolverSpec | None = None


class SolverSpec(Struct, frozen=True):
    """One way to solve challenges."""

    http01: Http01Spec | None = None


class AcmeSpec(Struct, frozen=True):
    """How to reach the CA and who we are there."""

    server: str
    private_key_secret_ref: SecretKeyRef
    email: str = ""
    external_account_binding: ExternalAccountBinding | None = None
    ca_bundle: str = ""
    disable_account_key_generation: bool = False
    account_key_algorithm: str = "ECDSA"
    bindings: tuple[BindingSpec, ...] = ()
    common_name: str = "Auto"
    max_concurrent_orders: int = 200
    profile: str = ""
    solvers: tuple[SolverSpec, ...] = ()


class IssuerSpec(Struct, frozen=True):
    """Only ACME."""

    acme: AcmeSpec


class LabelSelectorRequirement(Struct, frozen=True):
    """metav1.LabelSelectorRequirement: `operator` In, NotIn, Exists or DoesNotExist."""

    key: str
    operator: str
    values: tuple[str, ...] = ()


class LabelSelector(Struct, frozen=True):
    """metav1.LabelSelector."""

    match_labels: dict[str, str] = {}
    match_expressions: tuple[LabelSelectorRequirement, ...] = ()


class PolicyRule(Struct, frozen=True):
    """Names for namespaces, which are listed (`*`: all) or selected by their labels."""

    dns_names: tuple[str, ...]
    namespaces: tuple[str, ...] = ()
    namespace_selector: LabelSelector | None = None


class Policy(Struct, frozen=True):
    """Which namespaces may have which names; what no rule allows is refused."""

    rules: tuple[PolicyRule, ...]


class ClusterIssuerSpec(IssuerSpec, frozen=True):
    """An Issuer's, and who may have what."""

    policy: Policy | None = None


class AccountStatus(Struct, frozen=True):
    """An account at the CA: `key_thumbprint` is RFC 7638, `bound_key_id` the EAB key id that it is known to have,
    `contact` the address that the CA was told, `key_secret_name` the Secret with its key.
    """

    name: str
    uri: str
    key_thumbprint: str
    bound_key_id: str = msgspec.field(default="", name="boundKeyID")
    contact: str = ""
    key_secret_name: str = ""


class IssuerStatus(Struct, frozen=True):
    """What the controller found out about the CA and the account there."""

    conditions: tuple[Condition, ...] = ()
    observed_generation: int = 0
    accounts: tuple[AccountStatus, ...] = ()
    rollover: str = ""
    last_problem: LastProblem | None = None


class Issuer(Resource, frozen=True):
    """certbotk8s.io/v1 Issuer."""

    spec: IssuerSpec
    status: IssuerStatus = IssuerStatus()


class ClusterIssuer(Issuer, frozen=True):
    """certbotk8s.io/v1 ClusterIssuer: an Issuer for every namespace, with a policy."""

    spec: ClusterIssuerSpec


# --- Kubernetes' own --------------------------------------------------------------------------------------------------


class IngressTLS(Struct, frozen=True):
    """networking.k8s.io/v1 IngressTLS."""

    hosts: tuple[str, ...] = ()
    secret_name: str = ""


class IngressRule(Struct, frozen=True):
    """networking.k8s.io/v1 IngressRule: the host alone."""

    host: str = ""


class IngressSpec(Struct, frozen=True):
    """networking.k8s.io/v1 IngressSpec, as far as read."""

    ingress_class_name: str = ""
    tls: tuple[IngressTLS, ...] = ()
    rules: tuple[IngressRule, ...] = ()


class Ingress(Resource, frozen=True):
    """networking.k8s.io/v1 Ingress."""

    spec: IngressSpec = IngressSpec()


class IngressClass(Resource, frozen=True):
    """networking.k8s.io/v1 IngressClass: only whether it is the default matters."""


class Namespace(Resource, frozen=True):
    """v1 Namespace: its labels alone matter."""


class Secret(Resource, frozen=True):
    """A whole Secret, from a live read only: no cache holds one. `data` is base64 as on the wire."""

    type: str = "Opaque"
    data: dict[str, str] = {}
    immutable: bool = False

    def __repr__(self) -> str:
        """Names only: a Secret's content never reaches a log or a traceback."""
        return f"Secret({self.key}, keys={sorted(self.data)})"


class CertificateFacts(Struct, frozen=True):
    """What is kept of an X.509 certificate. Hashes are SHA-256, hex."""

    not_before: datetime
    not_after: datetime
    serial_number: str
    names_hash: str
    public_key_hash: str
    key_algorithm: str
    key_size: int
    issuer: str


class SecretFacts(Resource, frozen=True):
    """What the cache keeps of a Secret of ours: never PEM.

    `public_key_hash` is that of the private key in `tls.key` ("" when there is none that can be read);
    `problem` says why `tls.crt` or `tls.key` could not be read.
    """

    type: str = ""
    immutable: bool = False
    certificate: CertificateFacts | None = None
    public_key_hash: str = ""
    key_encoding: str = ""
    problem: str = ""


T = TypeVar("T", bound=Resource)


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A resource type of the API: where it lives, and how its JSON becomes an object.

    The decoder is made here, with the module, and so is every other of a Struct: msgspec prepares a type when it is
    first decoded, and two threads that do so at once, as the watches at a start, crash the interpreter.
    """

    group: str
    version: str
    plural: str
    kind: str
    type: type[T]
    namespaced: bool = True
    parse: Callable[[bytes | msgspec.Raw], T] | None = field(default=None, repr=False)
    _decoder: msgspec.json.Decoder[T] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_decoder", msgspec.json.Decoder(self.type))

    def decode(self, raw: bytes | msgspec.Raw) -> T:
        """An object from its JSON; raises msgspec.ValidationError for one of another shape."""
        return self.parse(raw) if self.parse else self._decoder.decode(raw)

    @property
    def api_version(self) -> str:
        """`group/version`, or `v1` of the core group."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The URL path; without a name that of the collection, without a namespace that of all namespaces."""
        parts = ["/apis", self.group, self.version] if self.group else ["/api", self.version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


CERTIFICATE = Kind(GROUP, VERSION, "certificates", "Certificate", Certificate)
ISSUER = Kind(GROUP, VERSION, "issuers", "Issuer", Issuer)
CLUSTER_ISSUER: Kind[Issuer] = Kind(GROUP, VERSION, "clusterissuers", "ClusterIssuer", ClusterIssuer, namespaced=False)
INGRESS = Kind("networking.k8s.io", "v1", "ingresses", "Ingress", Ingress)
INGRESS_CLASS = Kind("networking.k8s.io", "v1", "ingressclasses", "IngressClass", IngressClass, namespaced=False)
SECRET = Kind("", "v1", "secrets", "Secret", Secret)
NAMESPACE = Kind("", "v1", "namespaces", "Namespace", Namespace, namespaced=False)
ISSUER_KINDS: dict[str, Kind[Issuer]] = {"Issuer": ISSUER, "ClusterIssuer": CLUSTER_ISSUER}


def to_wire(value: Any) -> Any:
    """A Struct as the plain JSON value that the API server gets: camelCase, defaults left out, times to the second."""
    return msgspec.to_builtins(value, builtin_types=())


def find_condition(conditions: tuple[Condition, ...], kind: str) -> Condition | None:
    """The condition of that type, or None."""
    return next((c for c in conditions if c.type == kind), None)
