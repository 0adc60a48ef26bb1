"""What the core needs of the outside, as Protocols: the API server, the CA, the solvers, the clock.

Reconcilers know these and nothing behind them; `main` chooses who stands behind. Every method does one thing once:
nothing here waits, polls or retries longer than one call takes. Errors are `TemporaryError` or `PermanentError`
(domain.errors).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeAlias, TypeVar

from certbotk8s.domain.addresses import Egress

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from datetime import datetime, timedelta
    from threading import Condition as Waiter

    from certbotk8s.domain.acme import Account, Authorization, Directory, Identifier, Order
    from certbotk8s.domain.api import Certificate, Kind, PendingChallenge, Resource, SolverSpec
    from certbotk8s.domain.reasons import Reason

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R", bound="Resource")
R_co = TypeVar("R_co", bound="Resource", covariant=True)


# --- time -------------------------------------------------------------------------------------------------------------


class Clock(Protocol):
    """The only source of time."""

    def now(self) -> datetime:
        """UTC wall clock: what certificates, Retry-After dates and status speak of."""

    def monotonic(self) -> float:
        """Seconds of a clock that never steps and counts while the machine sleeps (CLOCK_BOOTTIME)."""

    def wait(self, waiter: Waiter, timeout: float | None) -> None:
        """`waiter.wait(timeout)` by this clock; `waiter` is held by the caller. May return early."""


# --- the API server ---------------------------------------------------------------------------------------------------


class Store(Protocol[R_co]):
    """A watched collection. Reads show the own writes at once, those of others a little later."""

    def get(self, key: str) -> R_co | None:
        """The object `namespace/name` (or `name` of a cluster-scoped one), or None."""

    def find(self, index: str, value: str) -> Sequence[R_co]:
        """The objects whose index function gave that value, in order of their keys; costs no scan."""

    def all(self) -> Sequence[R_co]:
        """Every object: for sweeps, never per event."""


class Cluster(Protocol):
    """The API server: cached collections, live reads, and writes."""

    def store(self, kind: Kind[R]) -> Store[R]:
        """The watched collection of that kind; KeyError if it is not watched."""

    def get(self, kind: Kind[R], namespace: str, name: str) -> R | None:
        """A live read; None when there is no such object."""

    def create(self, kind: Kind[R], manifest: Mapping[str, Any]) -> R:
        """POST; raises AlreadyExists when the name is taken."""

    def apply(self, kind: Kind[R], manifest: Mapping[str, Any], *, subresource: str = "") -> R:
        """Server-side apply with our field manager, forced.

        `metadata.uid` and `metadata.resourceVersion` in the manifest are preconditions: raises Conflict when they do
        not hold. Without a uid the object is created when it is not there. With `subresource="status"` the status is
        replaced as a whole (PUT): an apply would leave what another manager, a backup's restore say, has written there.
        """

    def delete(self, kind: Kind[Any], namespace: str, name: str, *, uid: str = "", version: str = "") -> None:
        """Delete (in the background); no object, or one of another uid, is no error.

        Raises Conflict when its resourceVersion is not `version`, if that is given.
        """

    def watch_secret(self, namespace: str, name: str, on_change: Callable[[], None]) -> Callable[[], None]:
        """Call `on_change` whenever that one Secret appears, changes or goes, until the returned function is called."""

    def event(self, about: Reference, reason: Reason, message: str, *, warning: bool = False) -> None:
        """Record an Event, later and at most once for the same words in a while. Never raises."""


class Reference(NamedTuple):
    """An object that an Event is about."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str


# --- the CA -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """An ACME server: its directory URL, and the PEM roots to trust besides none (empty: the system's)."""

    url: str
    ca_bundle: bytes = b""


@dataclass(frozen=True)
class Binding:
    """An external account binding (RFC 8555 section 7.3.4). `hmac_key` is the Secret's text as found."""

    key_id: str
    hmac_key: bytes = field(repr=False)
    algorithm: str = "HS256"


class Session(Protocol):
    """One account at one CA, shared by threads. One HTTP request per call; one refused for its nonce is sent again."""

    @property
    def account_uri(self) -> str:
        """RFC 8555 section 7.3: the account's URL, used as `kid`."""

    def key_authorization(self, token: str) -> str:
        """RFC 8555 section 8.1: `token.thumbprint`."""

    def new_order(self, identifiers: Sequence[Identifier], profile: str = "") -> Order:
        """POST newOrder (section 7.4)."""

    def order(self, url: str) -> Order:
        """POST-as-GET of an order (section 7.1.3)."""

    def authorization(self, url: str) -> Authorization:
        """POST-as-GET of an authorization (section 7.5)."""

    def answer(self, url: str) -> None:
        """Tell the CA that a challenge may be validated (section 7.5.1)."""

    def finalize(self, url: str, csr_der: bytes) -> Order:
        """POST the CSR (section 7.4). The answer has no `url` where the CA sends no Location."""

    def certificate(self, url: str) -> bytes:
        """The PEM chain, leaf first, as served (section 7.4.2)."""

    def deactivate(self, authorization_url: str) -> None:
        """Give up a pending authorization (section 7.5.2)."""

    def update_contact(self, contact: str) -> None:
        """Tell the CA the account's e-mail address, "" for none (section 7.3.2)."""

    def change_key(self, key_pem: bytes) -> None:
        """Give the account this key (section 7.3.5); the session goes on with it.

        After a TemporaryError the CA may or may not have done so: the session asks nothing more.
        """


class Authority(Protocol):
    """ACME servers, before there is an account."""

    def directory(self, server: Server) -> Directory:
        """Read the directory (section 7.1.1); every URL in it must be https."""

    def find_account(self, server: Server, key_pem: bytes) -> Account | None:
        """The account of this key (newAccount with onlyReturnExisting, section 7.3.1), or None."""

    def register(self, server: Server, key_pem: bytes, contact: str, binding: Binding | None) -> Account:
        """Create the account and agree to the terms."""

    def session(self, server: Server, key_pem: bytes, account_uri: str) -> Session:
        """A session for a known account; asks the CA nothing by itself."""

    def thumbprint(self, key_pem: bytes) -> str:
        """RFC 7638 thumbprint of the account key."""


class KeyMaker(Protocol):
    """The one source of private keys."""

    def account_key(self, algorithm: str) -> bytes:
        """A new account key, PKCS8 PEM: ECDSA P-256, or RSA 2048."""

    def certificate_key(self, algorithm: str, size: int, encoding: str) -> bytes:
        """A new private key, PEM in that encoding."""

    def csr(self, key_pem: bytes, dns_names: Sequence[str], common_name: str) -> bytes:
        """A DER CSR for these names; `common_name` "" leaves the subject empty."""


# --- solvers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Presentation:
    """The challenges of one order that one solver serves, and all that it may know to do so.

    `id` is stable for the order and unique among orders; it may name what the solver creates.
    """

    id: str
    certificate: Certificate
    spec: SolverSpec
    challenges: tuple[PendingChallenge, ...]


class Solver(Protocol):
    """Presents challenges and cleans them up. All three are idempotent, quick, and look or act only once."""

    challenge_type: str

    def present(self, presentation: Presentation) -> None:
        """Make the challenges answerable. PermanentError when that can never work."""

    def is_ready(self, presentation: Presentation) -> str:
        """ "" when a look from here finds every challenge answered, else what is missing, as a sentence part."""

    def clean_up(self, presentation_id: str) -> None:
        """Remove what `present` made, whether or not it ran to its end."""

    def leftovers(self) -> Iterable[str]:
        """The ids of presentations of which something still stands, for the sweep."""


@dataclass(frozen=True)
class SolverContext:
    """What a solver is made from. Third-party solvers get the same."""

    cluster: Cluster
    clock: Clock
    namespace: str
    http01_port: int
    nameservers: tuple[str, ...]
    egress: Egress = field(default_factory=Egress)


# --- work -------------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """What the queue holds: the name of an object, never the object."""

    kind: str
    namespace: str
    name: str


@dataclass(frozen=True)
class Call:
    """A call to the outside that a worker must not wait for: made by the pool of that name, at most `limit` at once."""

    pool: str
    function: Callable[[], Any]


# A reconcile is a generator: it yields a Call, is put aside, and goes on with the answer (or the error) on any worker.
# It returns after how long to come back at the latest, or None: only when something changes.
Steps: TypeAlias = "Generator[Call, Any, timedelta | None]"


def call(pool: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Generator[Call, Any, T]:
    """`answer = yield from call(pool, session.order, url)`: the typed way to yield a Call."""
    answer: T = yield Call(pool, partial(function, *args, **kwargs))
    return answer
