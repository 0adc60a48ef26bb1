"""An ACME client (RFC 8555) of single requests: each call asks once, and whoever called decides when to come back.

The client of the `acme` library polls and sleeps, and knows neither `Retry-After` on errors nor more than one rejected
nonce; its JWS and its External Account Binding are used (ca.jws).
"""

from __future__ import annotations

import re
from collections import deque
from functools import lru_cache, partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import msgspec
from josepy.b64 import b64encode
from msgspec.structs import replace

from certbotk8s.ca.jws import AccountKey, account_key, is_nonce
from certbotk8s.ca.resources import (
    parse_account,
    parse_authorization,
    parse_directory,
    parse_error,
    parse_json,
    parse_order,
)
from certbotk8s.ca.transport import READ_SECONDS, Address, Answer, Transport, address
from certbotk8s.domain.addresses import Egress
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.domain.names import listing
from certbotk8s.domain.problems import Place, judge
from certbotk8s.domain.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from certbotk8s.domain.acme import Account, Authorization, Directory, Identifier, Order
    from certbotk8s.domain.errors import Problem
    from certbotk8s.ports import Binding, Clock, Server

# CAs that check with others take over 45 s for these two; a request given up may have been a certificate issued.
SLOW_SECONDS = 180.0
# A CA behind a load balancer may refuse half of all nonces; with ten more tries one request in 2,000 fails.
NONCE_TRIES = 10
_NONCES = 64
_PEM = "application/pem-certificate-chain"
_BEGIN = b"-----BEGIN CERTIFICATE-----"
_TERMS = re.compile(r'<(https://[!-;=?-~]{1,2048})>\s*;[^,<]*rel="?terms-of-service\b')


class Authority:
    """`ports.Authority`. Each server's connections, nonces and last directory are kept and shared by its sessions."""

    def __init__(self, clock: Clock, egress: Egress | None = None) -> None:
        """`clock` is for Retry-After dates and for answers that never end; `egress` says which addresses are asked."""
        self._server = lru_cache(maxsize=256)(partial(_AcmeServer, clock, egress or Egress()))

    def directory(self, server: Server) -> Directory:
        """Read the directory now (section 7.1.1).

        PermanentError: DIRECTORY_INVALID when it is none or names a URL that is not https; CA_BUNDLE_INVALID.
        """
        return self._server(server).read_directory()

    def find_account(self, server: Server, key_pem: bytes) -> Account | None:
        """The account of this key, or None where the CA has none (section 7.3.1).

        PermanentError: ACCOUNT_DEACTIVATED, ACCOUNT_KEY_INVALID, ACCOUNT_KEY_UNSUPPORTED.
        """
        try:
            answer = self._new_account(server, key_pem, {"onlyReturnExisting": True}, "looking up the account")
        except PermanentError as error:
            if error.problem and _may_be_missing(error.problem):
                return None
            raise
        return _account(answer)

    def register(self, server: Server, key_pem: bytes, contact: str, binding: Binding | None) -> Account:
        """Create the account, agreeing to the terms (section 7.3), or find it.

        `contact` is an e-mail address or "". PermanentError: EAB_REQUIRED, EAB_KEY_INVALID, those of a refused binding,
        and others of the tables in domain.problems.
        """
        payload: dict[str, Any] = {"termsOfServiceAgreed": True}
        if contact:
            payload["contact"] = _contacts(contact)
        if binding is None:
            return _account(self._new_account(server, key_pem, payload, "registering an account"))
        new_account = self._server(server).directory().new_account
        payload["externalAccountBinding"] = account_key(key_pem).bind(binding, new_account)
        doing = f"registering an account with external account binding {binding.key_id}"
        return _account(self._new_account(server, key_pem, payload, doing, place=Place.BINDING))

    def session(self, server: Server, key_pem: bytes, account_uri: str) -> Session:
        """A session for a known account; asks the CA nothing. PermanentError: ACCOUNT_KEY_INVALID."""
        return Session(self._server(server), account_key(key_pem), account_uri)

    def thumbprint(self, key_pem: bytes) -> str:
        """RFC 7638 thumbprint of the account key, base64url. PermanentError: ACCOUNT_KEY_INVALID."""
        return account_key(key_pem).thumbprint

    def _new_account(
        self, server: Server, key_pem: bytes, payload: dict[str, Any], doing: str, place: Place = Place.ACCOUNT
    ) -> Answer:
        acme = self._server(server)
        return acme.post(account_key(key_pem), acme.directory().new_account, payload, doing=doing, place=place)


class Session:
    """`ports.Session`: one account at one CA. All errors are those of the table in domain.problems."""

    def __init__(self, server: _AcmeServer, key: AccountKey, account_uri: str) -> None:
        """Made by `Authority.session`."""
        self._server = server
        self._key = key
        # Held while the key is being changed: nothing is signed with a key that may be the wrong one.
        self._changing = Lock()
        self._unconfirmed = False
        self.account_uri = account_uri

    def key_authorization(self, token: str) -> str:
        """RFC 8555 section 8.1: `token.thumbprint`."""
        return f"{token}.{self._key.thumbprint}"

    def new_order(self, identifiers: Sequence[Identifier], profile: str = "") -> Order:
        """POST newOrder (section 7.4); `profile` "" asks for none."""
        payload: dict[str, Any] = {"identifiers": [identifier._asdict() for identifier in identifiers]}
        if profile:
            payload["profile"] = profile
        doing = f"placing an order for {listing(identifier.value for identifier in identifiers)}"
        url = self._server.directory().new_order
        answer = self._post(url, payload, doing, place=Place.ENDPOINT, seconds=SLOW_SECONDS)
        location = _location(answer)
        if not location:
            raise PermanentError(Reason.CA_REFUSED, f"After {doing} the CA named no https URL for the order.")
        return parse_order(_document(answer), location, answer.retry_after)

    def order(self, url: str) -> Order:
        """POST-as-GET of an order (section 7.1.3). PermanentError(ORDER_GONE) when the CA knows it no more."""
        answer = self._post(url, None, f"reading order {url}")
        return parse_order(_document(answer), url, answer.retry_after)

    def authorization(self, url: str) -> Authorization:
        """POST-as-GET of an authorization (section 7.5)."""
        answer = self._post(url, None, f"reading authorization {url}")
        return parse_authorization(_document(answer), url, answer.retry_after)

    def answer(self, url: str) -> None:
        """Tell the CA that a challenge may be validated (section 7.5.1)."""
        self._post(url, {}, f"answering challenge {url}")

    def finalize(self, url: str, csr_der: bytes) -> Order:
        """POST the CSR (section 7.4). The order's `url` is "" where the answer has no Location.

        A TemporaryError whose `problem.type` is orderNotReady, or that comes for want of an answer, may mean that the
        CA has the CSR already: the order is to be read before this is called again.
        """
        payload = {"csr": b64encode(csr_der).decode()}
        answer = self._post(url, payload, f"finalizing the order at {url}", seconds=SLOW_SECONDS)
        return parse_order(_document(answer), _location(answer), answer.retry_after)

    def certificate(self, url: str) -> bytes:
        """The PEM chain as served (section 7.4.2), at most 1 MiB, not looked into.

        TemporaryError when it is none: a page of what stands before the CA must not cost the certificate behind it.
        """
        body = self._post(url, None, f"fetching the certificate from {url}", accept=_PEM).body
        if _BEGIN not in body:
            raise TemporaryError(f"What the CA sent from {url} is no PEM certificate. It is asked for again.")
        return body

    def deactivate(self, authorization_url: str) -> None:
        """Give up a pending authorization (section 7.5.2)."""
        self._post(authorization_url, {"status": "deactivated"}, f"giving up authorization {authorization_url}")

    def update_contact(self, contact: str) -> None:
        """Tell the CA the account's e-mail address, "" for none (section 7.3.2)."""
        payload = {"contact": _contacts(contact)}
        self._post(self.account_uri, payload, f"updating the contact address of {self.account_uri}")

    def change_key(self, key_pem: bytes) -> None:
        """Give the account this key (section 7.3.5); the session goes on with it.

        PermanentError: the CA has not done so. After a TemporaryError without an answer it may have: from then on every
        call of this session raises TemporaryError, until a new session knows the right key.
        """
        new, url = account_key(key_pem), self._server.directory().key_change
        doing = f"changing the key of account {self.account_uri}"
        if not url:
            raise PermanentError(Reason.CA_REFUSED, "This CA changes no account keys: its directory has no keyChange.")
        with self._changing:
            payload = self._key.hand_over(new, url=url, account_uri=self.account_uri)
            try:
                self._server.post(
                    self._key, url, payload, account_uri=self.account_uri, doing=doing, place=Place.ENDPOINT
                )
            except TemporaryError as error:
                self._unconfirmed = error.problem is None or error.problem.status >= 500
                raise
            except PermanentError:
                self._unconfirmed = False
                raise
            self._key, self._unconfirmed = new, False

    def _post(
        self,
        url: str,
        payload: dict[str, Any] | None,
        doing: str,
        *,
        place: Place = Place.RESOURCE,
        seconds: float = READ_SECONDS,
        accept: str = "application/json",
    ) -> Answer:
        key = self._present_key()
        send = partial(
            self._server.post,
            url=url,
            payload=payload,
            account_uri=self.account_uri,
            doing=doing,
            place=place,
            seconds=seconds,
            accept=accept,
        )
        try:
            return send(key)
        except PermanentError:
            # It may have come to the CA just after the key was changed.
            present = self._present_key()
            if present is key:
                raise
            return send(present)

    def _present_key(self) -> AccountKey:
        with self._changing:
            if self._unconfirmed:
                raise TemporaryError(
                    f"The key of account {self.account_uri} is being changed, which the CA has not confirmed yet."
                )
            return self._key


class _AcmeServer:
    """One ACME server: its connections, its last directory, its nonces. Shared by threads."""

    def __init__(self, clock: Clock, egress: Egress, server: Server) -> None:
        self._url = server.url
        self._transport = Transport(server.ca_bundle, clock, egress)
        self._nonces: deque[str] = deque(
            maxlen=_NONCES
        )  # the newest last, and used first: they are the likeliest to hold
        self._known: tuple[Directory, frozenset[str]] | None = None

    def directory(self) -> Directory:
        """The last directory; read now if there is none."""
        return self._directory()[0]

    def read_directory(self) -> Directory:
        """Read the directory, and keep it. PermanentError(DIRECTORY_INVALID) when it cannot be used."""
        target = address(self._url)
        if target is None:
            raise _no_directory(self._url, "its address is not a plain https URL")
        doing = f"reading the ACME directory {self._url}"
        answer = self._judged(self._transport.request("GET", target), doing, Place.DIRECTORY)
        raw = parse_json(answer.body)
        if not isinstance(raw, dict):
            raise _no_directory(self._url, "what it sends is no JSON object")
        directory = parse_directory(raw)
        named = {
            "newNonce": directory.new_nonce,
            "newAccount": directory.new_account,
            "newOrder": directory.new_order,
            "revokeCert": directory.revoke_cert,
            "keyChange": directory.key_change,
            "renewalInfo": directory.renewal_info,
        }
        missing = [name for name in ("newNonce", "newAccount", "newOrder") if not named[name]]
        if missing:
            raise _no_directory(self._url, f"it does not name {listing(missing)}")
        targets = {name: address(url) for name, url in named.items() if url}
        unusable = [name for name, found in targets.items() if found is None]
        if unusable:
            raise _no_directory(self._url, f"its {listing(unusable)} is not a plain https URL: {named[unusable[0]]}")
        self._known = directory, frozenset(found.origin for found in (target, *targets.values()) if found)
        return directory

    def post(
        self,
        key: AccountKey,
        url: str,
        payload: dict[str, Any] | None,
        *,
        doing: str,
        place: Place,
        account_uri: str = "",
        seconds: float = READ_SECONDS,
        accept: str = "application/json",
    ) -> Answer:
        """One signed request, answered with a 2xx status; sent again only while the CA refuses its nonce.

        `payload` None is a POST-as-GET (RFC 8555 section 6.3). Raises what `judge` makes of an error.
        """
        target = self._target(url, doing)
        content = b"" if payload is None else msgspec.json.encode(payload)
        nonce = self._nonce()
        for attempt in range(NONCE_TRIES + 1):
            body = key.sign(content, url=target.url, nonce=nonce, account_uri=account_uri)
            answer = self._transport.request("POST", target, body=body, seconds=seconds, accept=accept)
            fresh = _fresh(answer)
            problem = _problem(answer)
            if problem is None or problem.type != "badNonce" or attempt == NONCE_TRIES:
                break
            nonce = fresh or self._nonce()
        if fresh:
            self._nonces.append(fresh)
        if problem:
            raise judge(problem, retry_after=answer.retry_after, doing=doing, place=place)
        return answer

    def _directory(self) -> tuple[Directory, frozenset[str]]:
        if self._known is None:
            try:
                self.read_directory()
            except PermanentError as error:
                # Sessions are for accounts, so the directory was good once: no order is given up for what it is now.
                raise TemporaryError(str(error), problem=error.problem) from error
        assert self._known
        return self._known

    def _target(self, url: str, doing: str) -> Address:
        """The address of a URL that the CA has named; only hosts of its directory are asked."""
        origins = self._directory()[1]
        target = address(url)
        if target is None or target.origin not in origins:
            where = f"on no host of its directory {self._url}" if target else "not a plain https URL"
            raise PermanentError(
                Reason.CA_REFUSED,
                f"{doing[:1].upper()}{doing[1:]} was not tried: the CA named {url!r}, which is {where}.",
            )
        return target

    def _nonce(self) -> str:
        """A nonce nobody has used (RFC 8555 section 7.2); asks for one only when none is left."""
        try:
            return self._nonces.pop()
        except IndexError:
            pass
        doing = "getting a nonce"
        target = self._target(self.directory().new_nonce, doing)
        answer = self._judged(self._transport.request("HEAD", target), doing, Place.ENDPOINT)
        fresh = _fresh(answer)
        if not fresh:
            raise TemporaryError(f"The CA's server {target.origin} gave no nonce when asked for one.")
        return fresh

    def _judged(self, answer: Answer, doing: str, place: Place) -> Answer:
        problem = _problem(answer)
        if problem:
            raise judge(problem, retry_after=answer.retry_after, doing=doing, place=place)
        return answer


def _may_be_missing(problem: Problem) -> bool:
    """Some CAs (HARICA) tell no type, others miss the binding; an account that is there is found by registering."""
    untold = problem.type == "about:blank" and problem.status in (400, 404)
    return untold or problem.type in {"accountDoesNotExist", "externalAccountRequired"}


def _fresh(answer: Answer) -> str:
    nonce = answer.headers.get("Replay-Nonce", "")
    return nonce if is_nonce(nonce) else ""


def _problem(answer: Answer) -> Problem | None:
    if 200 <= answer.status < 300:
        return None
    problem = parse_error(answer.body, answer.headers.get("Content-Type", ""), answer.status)
    if problem.type == "userActionRequired" and not problem.instance:
        terms = _TERMS.search(answer.headers.get("Link", ""))  # RFC 8555 section 7.3.3
        problem = replace(problem, instance=terms[1] if terms else "")
    return problem


def _document(answer: Answer) -> dict[str, Any]:
    raw = parse_json(answer.body)
    if not isinstance(raw, dict):
        raise TemporaryError(f"What the CA sent from {answer.url} is no JSON object. It is asked for again.")
    return raw


def _contacts(contact: str) -> list[str]:
    return [f"mailto:{contact}"] if contact else []


def _account(answer: Answer) -> Account:
    raw = parse_json(answer.body)
    raw = raw if isinstance(raw, dict) else {}
    status = raw.get("status")
    if status in ("deactivated", "revoked"):
        raise PermanentError(
            Reason.ACCOUNT_DEACTIVATED,
            f"The account of this key is {status} at the CA. Give the issuer another privateKeySecretRef, which makes "
            "a new account.",
        )
    location = _location(answer)
    if not location:
        raise PermanentError(Reason.CA_REFUSED, "The CA named no https URL for the account.")
    return parse_account(raw, location)


def _location(answer: Answer) -> str:
    location = answer.headers.get("Location", "")
    return location if address(location) else ""


def _no_directory(url: str, what: str) -> PermanentError:
    return PermanentError(
        Reason.DIRECTORY_INVALID, f"{url} is no ACME directory: {what}. Correct spec.acme.server of the issuer."
    )
