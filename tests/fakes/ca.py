"""A certificate authority in memory: `ports.Authority` and `ports.Session` with real keys and really signed chains.

`FakeCA` is the server; it keeps accounts, orders (RFC 8555 section 7.1.6) and what it signed, whoever asks.
`FakeAuthority` is the client of one process. An account's identical order that is still pending or ready is returned
again, as Boulder does, and so are valid authorizations. Nothing takes time but what a test holds back.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from certbotk8s.ca.jws import account_key
from certbotk8s.domain.acme import Account, Authorization, Challenge, Directory, Order
from certbotk8s.domain.errors import PermanentError, Problem, TemporaryError
from certbotk8s.domain.problems import Place, judge
from certbotk8s.domain.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from certbotk8s.domain.acme import Identifier
    from certbotk8s.ports import Binding, Clock, Server

T = TypeVar("T")
R = TypeVar("R", "FakeOrder", "FakeAuthorization")
PublicKey: TypeAlias = "ec.EllipticCurvePublicKey | rsa.RSAPublicKey"

LIFE = timedelta(days=90)
ORDER_LIFE = timedelta(days=7)


@dataclass(frozen=True)
class Leaf:
    """What is about to be signed; `FakeCA.alter` may change it."""

    public_key: PublicKey
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime


@dataclass
class FakeAccount:
    """An account, by the thumbprint of its key; `terms` is where new terms are to be agreed to, "" for none."""

    uri: str
    thumbprint: str
    contact: str
    bound_key_id: str
    deactivated: bool = False
    terms: str = ""


@dataclass
class FakeChallenge:
    """A challenge, as the CA has it."""

    url: str
    type: str
    token: str
    status: str = "pending"
    error: Problem | None = None


@dataclass
class FakeAuthorization:
    """An authorization of one account for one name."""

    url: str
    account: str
    identifier: Identifier
    challenges: list[FakeChallenge]
    expires: datetime
    status: str = "pending"


@dataclass
class FakeOrder:
    """An order; `csr` is there once it was finalized, `chain` once it was signed."""

    url: str
    account: str
    identifiers: tuple[Identifier, ...]
    profile: str
    authorizations: list[FakeAuthorization]
    expires: datetime
    processing: bool = False
    csr: x509.CertificateSigningRequest | None = None
    chain: bytes = b""
    error: Problem | None = None
    looks: int = 0

    @property
    def status(self) -> str:
        """RFC 8555 section 7.1.6."""
        states = {authorization.status for authorization in self.authorizations}
        if self.error or (self.csr is None and states - {"pending", "valid"}):
            return "invalid"
        if self.csr:
            return "processing" if self.processing else "valid"
        return "pending" if "pending" in states else "ready"


@dataclass
class _Fault:
    kind: str
    error: BaseException
    after: bool
    left: int


class FakeCA:
    """The server.

    `requests` are the calls in order, by kind: directory, findAccount, newAccount, newOrder, order, authorization,
    answer, finalize, certificate, deactivate, contact, keyChange. `before` and `after` are called around each with
    its kind and URL; what they raise comes out of it, and `after` raises when the CA has acted. `preauthorized` names
    need no challenge; `refused` ones cannot be ordered. `next_account` is the URI that new accounts get, if any is
    set. `key_algorithms` are the kinds of account keys that it takes, by their name in JWS (none: all),
    `refused_binding` what it says to a binding that is right otherwise. `ordered` is called with each new order,
    `alter` with what is about to be signed; `served` gives what is sent of a chain. `validate(name, token)` is asked
    when a challenge is answered: a Problem fails it, None passes it. While `holds_validation`, answered challenges
    stay `processing`; while `reuses_finalized`, identical orders that are `processing` or `valid` are returned again
    too; while `holds_issuance`, finalized orders do. Otherwise a finalized order is `processing` for
    `looks_until_valid` looks. Orders say when they expire unless `tells_expiry` is False.
    """

    def __init__(self, clock: Clock, url: str = "https://ca.example.test/directory") -> None:
        self.url = url
        self.origin = url.removesuffix("/directory")
        self.external_accounts: dict[str, str] = {}
        self.profiles: dict[str, str] = {}
        self.next_account = ""
        self.shows_contacts = self.shows_bindings = self.changes_keys = True
        self.key_algorithms: dict[str, type] = {}
        self.refused_binding: Problem | None = None
        self.preauthorized: set[str] = set()
        self.refused: set[str] = set()
        self.challenge_types: tuple[str, ...] = ("http-01", "dns-01")
        self.reuses_orders = True
        self.reuses_finalized = False
        self.reuses_authorizations = True
        self.holds_validation = False
        self.holds_issuance = False
        self.looks_until_valid = 1
        self.retry_after: timedelta | None = None
        self.tells_expiry = True
        self.life = LIFE
        self.validate: Callable[[str, str], Problem | None] = lambda _name, _token: None
        self.alter: Callable[[Leaf], Leaf] = lambda leaf: leaf
        self.served: Callable[[bytes], bytes] = lambda chain: chain
        self.ordered: Callable[[FakeOrder], None] = lambda _order: None
        self.before: Callable[[str, str], None] = lambda _kind, _url: None
        self.after: Callable[[str, str], None] = lambda _kind, _url: None
        self.requests: list[str] = []
        self.accounts: dict[str, FakeAccount] = {}
        self.orders: dict[str, FakeOrder] = {}
        self.issued: list[x509.Certificate] = []
        self._authorizations: dict[str, FakeAuthorization] = {}
        self._clock = clock
        self._numbers = itertools.count(1)
        self._faults: list[_Fault] = []

    # --- what tests say and ask ---------------------------------------------------------------------------------------

    def fail(self, kind: str, error: BaseException, *, after: bool = False, times: int = 1) -> None:
        """The next calls of that kind raise; with `after`, when the CA has acted."""
        self._faults.append(_Fault(kind, error, after, times))

    def be_well(self) -> None:
        """No call fails any more because a test said so."""
        self._faults.clear()

    def counts(self) -> Counter[str]:
        """How many requests there were of each kind."""
        return Counter(self.requests)

    def unfinalized(self) -> list[FakeOrder]:
        """The orders that could still be finalized."""
        return [order for order in self.orders.values() if order.status in {"pending", "ready"}]

    def pending_authorizations(self) -> list[FakeAuthorization]:
        """The authorizations that still wait for an answer."""
        return [authorization for authorization in self._authorizations.values() if authorization.status == "pending"]

    def validated(self, name: str) -> bool:
        """Whether an account holds a valid authorization for that name."""
        return any(one.status == "valid" and one.identifier.value == name for one in self._authorizations.values())

    def forget_orders(self) -> None:
        """Every order is gone: it answers 404 from now on."""
        self.orders.clear()

    def forget_accounts(self) -> None:
        """The CA has lost its accounts, and with them the orders and authorizations."""
        self.accounts.clear()
        self.orders.clear()
        self._authorizations.clear()

    def end_authorizations(self, status: str) -> None:
        """Authorizations that are pending or valid end: expired, revoked or deactivated."""
        for authorization in self._authorizations.values():
            if authorization.status in {"pending", "valid"}:
                authorization.status = status

    def validate_again(self) -> None:
        """Orders that were ready are pending again, and their challenges wait for an answer."""
        for order in self.orders.values():
            for authorization in order.authorizations if order.status == "ready" else ():
                authorization.status = "pending"
                for challenge in authorization.challenges:
                    challenge.status = "pending"

    def go_on(self) -> None:
        """Validate and issue what was held back."""
        self.holds_validation = self.holds_issuance = False
        for authorization in self._authorizations.values():
            for challenge in authorization.challenges:
                if challenge.status == "processing":
                    self._validate(authorization, challenge)
        for order in self.orders.values():
            order.processing = False

    # --- requests -----------------------------------------------------------------------------------------------------

    def request(self, kind: str, url: str, act: Callable[[], T]) -> T:
        """One request: counted, with the faults that tests want."""
        self.requests.append(kind)
        self.before(kind, url)
        self._fault(kind, after=False)
        answer = act()
        self._fault(kind, after=True)
        self.after(kind, url)
        return answer

    def _fault(self, kind: str, *, after: bool) -> None:
        for fault in self._faults:
            if fault.kind == kind and fault.after is after and fault.left > 0:
                fault.left -= 1
                raise fault.error

    def directory(self) -> Directory:
        """Section 7.1.1."""
        return Directory(
            new_nonce=f"{self.origin}/new-nonce",
            new_account=f"{self.origin}/new-account",
            new_order=f"{self.origin}/new-order",
            external_account_required=bool(self.external_accounts),
            profiles=dict(self.profiles),
        )

    def find_account(self, key_pem: bytes) -> Account | None:
        """Section 7.3.1."""
        self._check_key(key_pem)
        thumbprint = account_key(key_pem).thumbprint
        found = next((account for account in self.accounts.values() if account.thumbprint == thumbprint), None)
        if found and found.deactivated:
            raise _refused(Problem("unauthorized", "It is deactivated.", 403), "looking up the account", Place.ACCOUNT)
        return self._shown(found) if found else None

    def _shown(self, account: FakeAccount) -> Account:
        return Account(
            account.uri,
            account.contact if self.shows_contacts else None,
            account.bound_key_id if self.shows_bindings else "",
        )

    def _check_key(self, key_pem: bytes) -> None:
        if self.key_algorithms and type(load_pem_private_key(key_pem, None)) not in self.key_algorithms.values():
            problem = Problem("badPublicKey", "Not a kind of key.", 400, algorithms=tuple(self.key_algorithms))
            raise _refused(problem, "looking up the account", Place.ACCOUNT)

    def update_contact(self, account: str, contact: str) -> None:
        """Section 7.3.2."""
        self.accounts[account].contact = contact

    def change_key(self, account: str, key_pem: bytes) -> None:
        """Section 7.3.5."""
        thumbprint = account_key(key_pem).thumbprint
        if not self.changes_keys or any(each.thumbprint == thumbprint for each in self.accounts.values()):
            raise _refused(Problem("malformed", "That key is not taken.", 409), "changing the key", Place.ENDPOINT)
        self.accounts[account].thumbprint = thumbprint

    def register(self, key_pem: bytes, contact: str, binding: Binding | None) -> Account:
        """Section 7.3; an account that is there is found."""
        key, new_account = account_key(key_pem), f"{self.origin}/new-account"
        known = self.find_account(key_pem)
        if self.external_accounts and binding is None and not known:
            raise judge(
                Problem("externalAccountRequired", "No external account binding.", 403),
                retry_after=None,
                doing="registering an account",
                place=Place.ACCOUNT,
            )
        if binding and self.external_accounts:
            signed = key.bind(binding, new_account)
            right = self.external_accounts.get(binding.key_id)
            if not right or signed != key.bind(replace(binding, hmac_key=right.encode()), new_account):
                words = "binding JWS verification error" if right else "the field 'kid' references an unknown key"
                raise judge(
                    Problem("unauthorized", words, 403),
                    retry_after=None,
                    doing=f"registering an account with external account binding {binding.key_id}",
                    place=Place.BINDING,
                )
        if known:
            return known
        if binding and self.refused_binding:
            raise _refused(self.refused_binding, "registering an account", Place.BINDING)
        uri = self.next_account or f"{self.origin}/account/{next(self._numbers)}"
        bound = binding.key_id if binding and self.external_accounts else ""
        made = self.accounts[uri] = FakeAccount(uri, key.thumbprint, contact, bound)
        return self._shown(made)

    def new_order(self, account: str, identifiers: Sequence[Identifier], profile: str) -> FakeOrder:
        """Section 7.4."""
        wanted = tuple(sorted(set(identifiers)))
        if profile and profile not in self.profiles:
            raise _refused(Problem("invalidProfile", f"No profile {profile}.", 400), "placing an order", Place.ENDPOINT)
        for kind, name in wanted:
            if name in self.refused:
                problem = Problem("rejectedIdentifier", f"No certificates for {name}.", 400, identifier=name)
                raise _refused(problem, f"placing an order for {kind} {name}", Place.ENDPOINT)
        for order in self.orders.values() if self.reuses_orders else ():
            same = (order.account, order.identifiers, order.profile) == (account, wanted, profile)
            kept = {"pending", "ready"} | ({"processing", "valid"} if self.reuses_finalized else set())
            if same and order.status in kept and order.expires > self._clock.now():
                return order
        url = f"{self.origin}/order/{next(self._numbers)}"
        expires = self._clock.now() + ORDER_LIFE
        authorizations = [self._authorize(account, identifier) for identifier in wanted]
        order = self.orders[url] = FakeOrder(url, account, wanted, profile, authorizations, expires)
        self.ordered(order)
        return order

    def _authorize(self, account: str, identifier: Identifier) -> FakeAuthorization:
        for known in self._authorizations.values() if self.reuses_authorizations else ():
            if (known.account, known.identifier, known.status) == (account, identifier, "valid"):
                return known
        number = next(self._numbers)
        url = f"{self.origin}/authorization/{number}"
        types = ("dns-01",) if identifier.value.startswith("*.") else self.challenge_types
        challenges = [
            FakeChallenge(f"{self.origin}/challenge/{number}-{kind}", kind, f"{number}-{kind}".ljust(43, "t"))
            for kind in types
        ]
        made = FakeAuthorization(url, account, identifier, challenges, self._clock.now() + ORDER_LIFE)
        if identifier.value in self.preauthorized:
            made.status = "valid"
        self._authorizations[url] = made
        return made

    def order(self, account: str, url: str) -> FakeOrder:
        """Section 7.1.3: each look brings what is being issued nearer."""
        order = self._own(account, self.orders.get(url), url)
        order.looks += 1
        if order.csr and not self.holds_issuance and order.looks >= self.looks_until_valid:
            order.processing = False
        return order

    def authorization(self, account: str, url: str) -> FakeAuthorization:
        """Section 7.5."""
        return self._own(account, self._authorizations.get(url), url)

    def answer(self, account: str, url: str) -> None:
        """Section 7.5.1."""
        for authorization in self._authorizations.values():
            for challenge in authorization.challenges:
                if challenge.url == url:
                    self._own(account, authorization, url)
                    if authorization.status == "pending" and challenge.status == "pending":
                        challenge.status = "processing"
                        if not self.holds_validation:
                            self._validate(authorization, challenge)
                    return
        raise _not_found(url)

    def _validate(self, authorization: FakeAuthorization, challenge: FakeChallenge) -> None:
        challenge.error = self.validate(authorization.identifier.value, challenge.token)
        challenge.status = authorization.status = "invalid" if challenge.error else "valid"

    def finalize(self, account: str, url: str, csr_der: bytes) -> FakeOrder:
        """Section 7.4."""
        order = self._own(account, self.orders.get(url.removesuffix("/finalize")), url)
        doing = f"finalizing the order at {url}"
        if order.status != "ready":
            raise _refused(Problem("orderNotReady", f"The order is {order.status}.", 403), doing)
        try:
            csr = x509.load_der_x509_csr(csr_der)
            names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, x509.ExtensionNotFound):
            raise _refused(Problem("badCSR", "It cannot be read.", 400), doing) from None
        if set(names.get_values_for_type(x509.DNSName)) != {identifier.value for identifier in order.identifiers}:
            raise _refused(Problem("badCSR", "Its names are not those of the order.", 400), doing)
        order.csr, order.looks = csr, 0
        order.processing = self.holds_issuance or self.looks_until_valid > 0
        order.chain = self._sign(csr, names.get_values_for_type(x509.DNSName))
        return order

    def certificate(self, account: str, url: str) -> bytes:
        """Section 7.4.2."""
        order = self._own(account, self.orders.get(url.removesuffix("/certificate")), url)
        if order.status != "valid":
            raise _not_found(url)
        return self.served(order.chain)

    def deactivate(self, account: str, url: str) -> None:
        """Section 7.5.2."""
        self._own(account, self._authorizations.get(url), url).status = "deactivated"

    def _own(self, account: str, found: R | None, url: str) -> R:
        if not url.startswith(f"{self.origin}/"):
            raise PermanentError(
                Reason.CA_REFUSED, f"{url!r} was not asked: it is on no host of the directory {self.url}."
            )
        if found is None:
            raise _not_found(url)
        if found.account != account:
            raise _refused(Problem("unauthorized", "That belongs to another account.", 403), f"reading {url}")
        return found

    def _sign(self, csr: x509.CertificateSigningRequest, names: list[str]) -> bytes:
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
        now = self._clock.now().replace(microsecond=0)
        leaf = self.alter(Leaf(key, tuple(names), now, now + self.life))
        signed = sign_leaf(leaf)
        self.issued.append(signed)
        return b"".join(each.public_bytes(Encoding.PEM) for each in (signed, _signer()[1]))


def _refused(problem: Problem, doing: str, place: Place = Place.RESOURCE) -> TemporaryError | PermanentError:
    return judge(problem, retry_after=None, doing=doing, place=place)


def _not_found(url: str) -> TemporaryError | PermanentError:
    return _refused(Problem("malformed", "No such resource.", 404), f"reading {url}")


@cache
def _signer() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The key and the certificate that sign leaves; one for all tests."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fake CA")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromisoformat("2020-01-01T00:00:00Z"))
        .not_valid_after(datetime.fromisoformat("2050-01-01T00:00:00Z"))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def sign_leaf(leaf: Leaf) -> x509.Certificate:
    """A certificate as the CA signs it."""
    key, certificate = _signer()
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(certificate.subject)
        .public_key(leaf.public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(leaf.not_before)
        .not_valid_after(leaf.not_after)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in leaf.names]), critical=True)
        .sign(key, hashes.SHA256())
    )


@dataclass
class FakeAuthority:
    """`ports.Authority` of the CAs given, by directory URL; another server does not answer."""

    cas: dict[str, FakeCA] = field(default_factory=dict)

    @classmethod
    def of(cls, *cas: FakeCA) -> FakeAuthority:
        """The authority that reaches these."""
        return cls({ca.url: ca for ca in cas})

    def directory(self, server: Server) -> Directory:
        """Read the directory."""
        ca = self._ca(server)
        return ca.request("directory", ca.url, ca.directory)

    def find_account(self, server: Server, key_pem: bytes) -> Account | None:
        """The account of this key, or None."""
        ca = self._ca(server)
        return ca.request("findAccount", ca.url, lambda: ca.find_account(key_pem))

    def register(self, server: Server, key_pem: bytes, contact: str, binding: Binding | None) -> Account:
        """Create the account."""
        ca = self._ca(server)
        return ca.request("newAccount", ca.url, lambda: ca.register(key_pem, contact, binding))

    def session(self, server: Server, key_pem: bytes, account_uri: str) -> FakeSession:
        """A session; asks nothing."""
        return FakeSession(self._ca(server), self.thumbprint(key_pem), account_uri)

    def thumbprint(self, key_pem: bytes) -> str:
        """RFC 7638."""
        return account_key(key_pem).thumbprint

    def _ca(self, server: Server) -> FakeCA:
        try:
            return self.cas[server.url]
        except KeyError:
            raise TemporaryError(f"No answer from the CA's server {server.url}.") from None


@dataclass
class FakeSession:
    """`ports.Session`."""

    ca: FakeCA
    thumbprint: str
    account_uri: str

    def key_authorization(self, token: str) -> str:
        """RFC 8555 section 8.1."""
        return f"{token}.{self.thumbprint}"

    def new_order(self, identifiers: Sequence[Identifier], profile: str = "") -> Order:
        """Place an order."""
        return self._ask(
            "newOrder",
            f"{self.ca.origin}/new-order",
            lambda account: self._order(self.ca.new_order(account, identifiers, profile)),
        )

    def order(self, url: str) -> Order:
        """Look at an order."""
        return self._ask("order", url, lambda account: self._order(self.ca.order(account, url)))

    def authorization(self, url: str) -> Authorization:
        """Look at an authorization."""

        def look(account: str) -> Authorization:
            found = self.ca.authorization(account, url)
            value = found.identifier.value
            return Authorization(
                url=url,
                status=found.status,
                identifier=found.identifier._replace(value=value.removeprefix("*.")),
                wildcard=value.startswith("*."),
                challenges=tuple(
                    Challenge(each.type, each.url, each.status, each.token, each.error and _inside(each.error))
                    for each in found.challenges
                ),
                expires=found.expires,
            )

        return self._ask("authorization", url, look)

    def answer(self, url: str) -> None:
        """Answer a challenge."""
        self._ask("answer", url, lambda account: self.ca.answer(account, url))

    def finalize(self, url: str, csr_der: bytes) -> Order:
        """Send the CSR."""
        return self._ask("finalize", url, lambda account: self._order(self.ca.finalize(account, url, csr_der)))

    def certificate(self, url: str) -> bytes:
        """Fetch the chain."""
        return self._ask("certificate", url, lambda account: self.ca.certificate(account, url))

    def deactivate(self, authorization_url: str) -> None:
        """Give an authorization up."""
        self._ask("deactivate", authorization_url, lambda account: self.ca.deactivate(account, authorization_url))

    def update_contact(self, contact: str) -> None:
        """Tell the address."""
        self._ask("contact", self.account_uri, lambda account: self.ca.update_contact(account, contact))

    def change_key(self, key_pem: bytes) -> None:
        """Give the account this key."""
        self._ask("keyChange", self.ca.url, lambda account: self.ca.change_key(account, key_pem))
        self.thumbprint = account_key(key_pem).thumbprint

    def _ask(self, kind: str, url: str, act: Callable[[str], T]) -> T:
        return self.ca.request(kind, url, lambda: act(self._account()))

    def _account(self) -> str:
        account = self.ca.accounts.get(self.account_uri)
        if account is None or account.thumbprint != self.thumbprint:
            raise _refused(Problem("accountDoesNotExist", "No such account.", 400), "asking the CA")
        if account.deactivated:
            raise _refused(Problem("unauthorized", "The account is deactivated.", 403), "asking the CA")
        if account.terms:
            problem = Problem("userActionRequired", "The terms have changed.", 403, instance=account.terms)
            raise _refused(problem, "placing an order")
        return account.uri

    def _order(self, order: FakeOrder) -> Order:
        return Order(
            url=order.url,
            status=order.status,
            identifiers=order.identifiers,
            authorizations=tuple(each.url for each in order.authorizations),
            finalize=f"{order.url}/finalize",
            certificate=f"{order.url}/certificate" if order.status == "valid" else "",
            expires=order.expires if self.ca.tells_expiry else None,
            error=order.error and _inside(order.error),
            retry_after=self.ca.retry_after if order.status in {"pending", "processing"} else None,
        )


def _inside(problem: Problem) -> Problem:
    """A problem that stands in an order or a challenge has no HTTP status."""
    return Problem(problem.type, problem.detail, 0, problem.subproblems, problem.identifier)
