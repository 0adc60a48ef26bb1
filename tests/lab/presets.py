"""How CAs that bind accounts behave where Pebble does not: each a table of rules for the ACME proxy before a Pebble.

Sources of what each CA does: RIT-ITS/CertifiCat, esnet/acme-proxy and simple-acme #703 (CERTInext), esnet/acme-proxy
#22, acme2certifier #122, Traefik #10787 and cert-manager #2882 (Sectigo), cert-manager #5867 (ZeroSSL), ansible
community.crypto #923 (HARICA). Times are those of the real CAs, in seconds, and are multiplied by `scale`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from certbotk8s.ca.authority import Authority
from certbotk8s.clock import SystemClock
from certbotk8s.domain.acme import Identifier
from certbotk8s.ports import Server
from tests.lab.acme import PROFILES, AcmeServer
from tests.lab.acme_proxy import AcmeProxy, acme_proxy, document, held, kind_of, problem, to
from tests.lab.lab import Lab, start_pebble
from tests.lab.proxy import Answer, Fault, answered, changed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.lab.proxy import Request

# What each key id of the lab was made for at CERTInext, where one binding is for one product.
SINGLE_NAME, SEVERAL_NAMES = "kid-1", "kid-2"
# Names below it are of an institution that Sectigo knows, and that is not ours.
OTHER_INSTITUTION = "elsewhere.test"

_LOOKS, _PAUSE = 200, 0.05


class Rule(NamedTuple):
    """Requests, what happens to them, and to how many."""

    fits: Callable[[Request], bool]
    fault: Fault | Callable[[Request], Fault]
    times: float = float("inf")


# --- reading what the client signed -----------------------------------------------------------------------------------


def protected(request: Request) -> dict[str, Any]:
    """The protected header of a request's JWS (RFC 8555 section 6.2)."""
    return _part(msgspec.json.decode(request.body), "protected")


def payload(request: Request) -> dict[str, Any]:
    """What a request's JWS carries; {} for POST-as-GET."""
    return _part(msgspec.json.decode(request.body), "payload")


def csr(request: Request) -> x509.CertificateSigningRequest:
    """The request for a certificate in a finalize."""
    return x509.load_der_x509_csr(_base64url(payload(request)["csr"]))


def names(request: Request) -> list[str]:
    """The names that a newOrder asks for."""
    return [each["value"] for each in payload(request)["identifiers"]]


def _part(jws: Mapping[str, str], name: str) -> dict[str, Any]:
    content = _base64url(jws[name])
    found: dict[str, Any] = msgspec.json.decode(content) if content else {}
    return found


def _base64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


# --- what several of them do ------------------------------------------------------------------------------------------


def without(*members: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A directory without these resources, and without profiles."""

    def change(directory: dict[str, Any]) -> dict[str, Any]:
        directory.get("meta", {}).pop("profiles", None)
        return {name: value for name, value in directory.items() if name not in members}

    return change


def processing(seconds: float, *, retry_after: str = "") -> Rule:
    """Every order is `processing` until that long after its first finalize."""
    return _after_finalize(seconds, held(retry_after))


def _after_finalize(seconds: float, shown: Fault) -> Rule:
    """What is shown of each order until that long after its first finalize."""
    begun: dict[str, float] = {}

    def fault(request: Request) -> Fault:
        order, now = request.path.rpartition("/")[2], time.monotonic()
        if kind_of(request) == "finalize":
            begun.setdefault(order, now)
        return shown if now < begun.get(order, now) + seconds else Fault()

    return Rule(to("finalize", "order"), fault)


def _preauthorized(challenges: list[dict[str, Any]]) -> Fault:
    """An authorization that is valid shows these challenges; a pending one what Pebble offers."""

    def change(authorization: dict[str, Any]) -> dict[str, Any]:
        return authorization | ({"challenges": challenges} if authorization["status"] == "valid" else {})

    return document(change)


# --- the presets ------------------------------------------------------------------------------------------------------


def certinext(scale: float) -> tuple[Rule, ...]:
    """InCommon on CERTInext (eMudhra)."""
    bindings: dict[str, str] = {}  # key id by account

    def register(request: Request) -> Fault:
        binding = payload(request).get("externalAccountBinding")

        def respond(answer: Answer) -> Answer:
            if answer.status >= 400:
                return answer
            if binding:
                bindings[answer.header("Location")] = _part(binding, "protected")["kid"]
            account = msgspec.json.decode(answer.body) | {"contact": []}
            return answer._replace(body=msgspec.json.encode(account))

        return changed(respond)

    def is_of_another_product(request: Request) -> bool:
        several = kind_of(request) == "newOrder" and len(names(request)) > 1
        return several and bindings.get(protected(request)["kid"]) == SINGLE_NAME

    def has_no_subject(request: Request) -> bool:
        return kind_of(request) == "finalize" and not list(csr(request).subject)

    return (
        Rule(to("directory"), document(without("renewalInfo"))),
        Rule(to("newAccount"), register),
        Rule(
            is_of_another_product,
            problem(403, "unauthorized", "EMS-1162: the product code of this binding is for a single domain name"),
        ),
        Rule(has_no_subject, problem(400, "badCSR", "EMS-1056: Domain Name present in CSR does not match")),
        Rule(to("authorization"), _preauthorized([])),
        processing(40 * scale),
    )


def sectigo(scale: float) -> tuple[Rule, ...]:
    """InCommon on Sectigo: the endpoint for RSA keys. Names below OTHER_INSTITUTION belong to somebody else."""
    known: set[str] = set()

    def is_bound_already(request: Request) -> bool:
        """An account key that was bound before, and is sent with a binding once more."""
        if kind_of(request) != "newAccount" or "externalAccountBinding" not in payload(request):
            return False
        key = str(protected(request)["jwk"])
        known_before = key in known
        known.add(key)
        return known_before

    def is_of_somebody_else(request: Request) -> bool:
        return kind_of(request) == "newOrder" and any(name.endswith(f".{OTHER_INSTITUTION}") for name in names(request))

    def has_another_key(request: Request) -> bool:
        return kind_of(request) == "finalize" and not isinstance(csr(request).public_key(), rsa.RSAPublicKey)

    def always_valid(order: dict[str, Any]) -> dict[str, Any]:
        if order["status"] == "pending":
            return order
        return order | {"authorizations": [f"{url}/0/always-valid" for url in order["authorizations"]]}

    def certificate_later(order: dict[str, Any]) -> dict[str, Any]:
        return order | {"status": "valid", "certificate": None} if order["status"] != "ready" else order

    def finalized(request: Request) -> Fault:
        shown = lagging.fault(request) if callable(lagging.fault) else lagging.fault
        return replace(shown, answer_delay=45 * scale if kind_of(request) == "finalize" else 0)

    lagging = _after_finalize(50 * scale, document(certificate_later))
    email = {"type": "sectigo-email-01", "status": "valid", "url": "https://ca.invalid/email"}
    valid = {"status": "valid", "identifier": None, "challenges": [email], "expires": None}
    return (
        Rule(to("directory"), document(without("renewalInfo"))),
        Rule(
            is_bound_already,
            problem(
                400,
                "malformed",
                "[External Account Binding] The account is not awaiting external account binding",
            ),
        ),
        Rule(is_of_somebody_else, problem(403, "unauthorized", "The client lacks sufficient authorization")),
        Rule(to("newOrder"), replace(document(always_valid), delay=15 * scale)),
        Rule(
            has_another_key,
            problem(400, "badCSR", "The public key algorithm of the CSR is not allowed for this certificate type: RSA"),
        ),
        Rule(
            lambda request: request.path.endswith("/always-valid"),
            answered(200, msgspec.json.encode(valid), Content_Type="application/json"),
        ),
        Rule(to("authorization"), _preauthorized([email])),
        Rule(lagging.fits, finalized),
    )


def zerossl(scale: float) -> tuple[Rule, ...]:
    """ZeroSSL: long `processing`, and a limit that the first order with several names meets."""
    wait = str(max(1, round(15 * scale)))

    def has_several_names(request: Request) -> bool:
        return kind_of(request) == "newOrder" and len(names(request)) >= 3

    return (
        Rule(to("directory"), document(without("renewalInfo"))),
        Rule(has_several_names, problem(429, "rateLimited", "Too many requests", Retry_After=wait), times=1),
        processing(60 * scale, retry_after=wait),
    )


def harica(scale: float) -> tuple[Rule, ...]:
    """HARICA: what goes wrong is told by a JSON string, and accounts cannot be read."""

    def reads_account(request: Request) -> bool:
        return kind_of(request) == "account" and not payload(request)

    def only_words(answer: Answer) -> Answer:
        if answer.status < 400:
            return answer
        return answer._replace(body=msgspec.json.encode(msgspec.json.decode(answer.body)["detail"]))

    return (
        Rule(reads_account, answered(400, b'"Bad Request"', Content_Type="application/json")),
        Rule(to("directory"), document(without("renewalInfo"))),
        Rule(to("newAccount", "newOrder", "authorization", "challenge", "certificate"), changed(only_words)),
        processing(10 * scale),
    )


PRESETS: dict[str, Callable[[float], tuple[Rule, ...]]] = {
    "incommon-certinext": certinext,
    "incommon-sectigo": sectigo,
    "zerossl": zerossl,
    "harica": harica,
}


# --- a CA that behaves so ---------------------------------------------------------------------------------------------


class BoundCA(NamedTuple):
    """A CA that demands a binding, as it is seen through its proxy, and what only its own people see."""

    seen: AcmeServer
    proxy: AcmeProxy
    behind: AcmeServer
    lab: Lab

    def validate(self, account_key: bytes, *names: str) -> None:
        """The CA's people validate names for the account of that key, wildcard names too: by DNS, once for all orders.

        Nothing of that is seen by the account's issuer. AssertionError when the CA does not find the records.
        """
        authority = Authority(SystemClock())
        server = Server(self.behind.directory, Path(self.behind.ca_bundle).read_bytes())
        account = authority.find_account(server, account_key)
        assert account, "validate names after the account is registered"
        session = authority.session(server, account_key, account.uri)
        order = session.new_order([Identifier("dns", name) for name in names])
        for url in order.authorizations:
            authorization = session.authorization(url)
            if authorization.status == "valid":
                continue
            challenge = next(each for each in authorization.challenges if each.type == "dns-01")
            digest = _sha256(session.key_authorization(challenge.token))
            self.lab.set_dns(f"_acme-challenge.{authorization.identifier.value}.", txt=digest)
            session.answer(challenge.url)
        for _ in range(_LOOKS):
            if session.order(order.url).status == "ready":
                return
            time.sleep(_PAUSE)
        raise AssertionError(f"The CA has not validated {names}")


@contextlib.contextmanager
def preset_ca(lab: Lab, name: str, *, scale: float = 1.0) -> Iterator[BoundCA]:
    """A new CA that behaves like the one of that preset, `scale` times as slowly."""
    profiles = {"default": PROFILES["default"]}  # the only one: it is told of none
    with (
        start_pebble(lab, authorization_reuse=100, profiles=profiles) as behind,
        acme_proxy(lab, behind) as (seen, proxy),
    ):
        for rule in PRESETS[name](scale):
            proxy.inject(rule.fits, rule.fault, times=rule.times)
        yield BoundCA(seen, proxy, behind, lab)


def _sha256(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
