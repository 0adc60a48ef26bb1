"""What an ACME error means: one table for every problem type and HTTP status.

Each row says whose side the trouble is on, which reason the user sees, what to do about it, and whether the same step
may be tried again. Sources: RFC 8555 section 6.7, and the error types that RFC 8739 (STAR), RFC 9115 (delegation),
RFC 9773 (ARI), RFC 9799 (onion names), the profiles extension (draft-ietf-acme-profiles) and Boulder (`conflict`) add.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.domain.names import listing
from certbotk8s.domain.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

    from certbotk8s.domain.errors import Problem

_WORDS_LIMIT = 1500
_ANY = -1  # any other status


class Side(StrEnum):
    """Where the trouble lies: it decides who backs off, and whether another issuer may help."""

    CA = "ca"
    NAME = "name"
    ACCOUNT = "account"
    US = "us"


class Place(StrEnum):
    """What was asked when the problem came: some types mean something else there."""

    DIRECTORY = "directory"
    ACCOUNT = "account"  # newAccount without a binding
    BINDING = "binding"  # newAccount with an external account binding
    ENDPOINT = "endpoint"  # newOrder, newNonce: addresses that the directory names
    RESOURCE = "resource"  # an order, authorization, challenge or certificate that the CA has named before
    INSIDE = "inside"  # no answer at all: the problem stood in an order or a challenge, and those are final


class Rule(NamedTuple):
    """A row: `advice` may hold {names}, {instance} and {algorithms}."""

    side: Side
    reason: Reason
    advice: str = ""
    temporary: bool = False


_GONE = Rule(Side.CA, Reason.ORDER_GONE, "The CA does not know it (any more): a new order is needed.")
_MOVED = Rule(Side.CA, Reason.CA_UNAVAILABLE, "If that stays so, check spec.acme.server of the issuer.", temporary=True)
_BUSY = Rule(Side.CA, Reason.RATE_LIMITED, temporary=True)
_DOWN = Rule(Side.CA, Reason.CA_UNAVAILABLE, temporary=True)
_BINDING_ADVICE = (
    "Check externalAccountBinding.keyID and the Secret that its keySecretRef names. Where both are right, the CA has "
    "closed the binding or it is used up: get a new one from the CA."
)
_NEW_BINDING = "get a new key id and HMAC key from the CA for externalAccountBinding."
_OURS = "This is a fault of certbotk8s or of the CA: please report it with the CA's words."
_ACCOUNT_CLOSED = Rule(
    Side.ACCOUNT,
    Reason.ACCOUNT_DEACTIVATED,
    "The account of this key is closed at the CA, or has no right to this. Ask the CA, or give the issuer another "
    "privateKeySecretRef, which makes a new account.",
)

# The key is a problem type, an HTTP status or its class (4 for 4xx); the place is None where it makes no difference.
Kind: TypeAlias = "str | int"
RULES: dict[tuple[Kind, Place | None], Rule] = {
    # --- RFC 8555 section 6.7
    ("accountDoesNotExist", None): Rule(
        Side.ACCOUNT, Reason.ACCOUNT_UNKNOWN, "The CA has lost or removed the issuer's account: it must register again."
    ),
    ("alreadyRevoked", None): Rule(Side.US, Reason.CA_REFUSED, "The certificate is revoked already: nothing to do."),
    ("badCSR", None): Rule(
        Side.NAME,
        Reason.CSR_REFUSED,
        "Check the names, spec.privateKey and spec.commonName of the Certificate, and spec.acme.commonName of the "
        "issuer, against what this CA issues.",
    ),
    ("badNonce", None): _DOWN,
    ("badPublicKey", None): Rule(
        Side.ACCOUNT,
        Reason.ACCOUNT_KEY_UNSUPPORTED,
        "Give the issuer an account key of another kind. The CA accepts: {algorithms}.",
    ),
    ("badRevocationReason", None): Rule(Side.US, Reason.CA_REFUSED, "Choose another revocation reason."),
    ("badSignatureAlgorithm", None): Rule(
        Side.ACCOUNT,
        Reason.ACCOUNT_KEY_UNSUPPORTED,
        "Give the issuer an account key of another kind. The CA accepts: {algorithms}.",
    ),
    ("caa", None): Rule(
        Side.NAME, Reason.CHALLENGE_FAILED, "Let the CAA records of {names} allow this CA, or remove them."
    ),
    ("compound", None): Rule(Side.NAME, Reason.ORDER_INVALID, "Look at each of these: {names}."),
    ("connection", None): Rule(
        Side.NAME,
        Reason.CHALLENGE_FAILED,
        "The CA could not reach {names}: check its DNS records, and that port 80 is open to the CA.",
    ),
    ("dns", None): Rule(
        Side.NAME, Reason.CHALLENGE_FAILED, "Check the DNS records of {names}, also from outside of this network."
    ),
    ("externalAccountRequired", None): Rule(
        Side.ACCOUNT,
        Reason.EAB_REQUIRED,
        "Get a key id and an HMAC key from the CA and name them in spec.acme.externalAccountBinding of the issuer.",
    ),
    ("externalAccountRequired", Place.BINDING): Rule(Side.ACCOUNT, Reason.EAB_REFUSED, _BINDING_ADVICE),
    ("incorrectResponse", None): Rule(
        Side.NAME,
        Reason.CHALLENGE_FAILED,
        "The CA got another answer than ours: check that {names} leads to this cluster, and only there.",
    ),
    ("invalidContact", None): Rule(Side.ACCOUNT, Reason.CA_REFUSED, "Correct spec.acme.email of the issuer."),
    ("malformed", None): Rule(Side.US, Reason.CA_REFUSED, _OURS),
    ("malformed", Place.BINDING): Rule(Side.ACCOUNT, Reason.EAB_REFUSED, _BINDING_ADVICE),
    ("malformed", Place.INSIDE): Rule(Side.NAME, Reason.ORDER_INVALID, "Check how {names} answers the CA."),
    ("orderNotReady", None): Rule(Side.CA, Reason.ORDER_PENDING, "The order is looked at again first.", temporary=True),
    ("rateLimited", None): _BUSY,
    ("rejectedIdentifier", None): Rule(
        Side.NAME, Reason.REJECTED_IDENTIFIER, "This CA does not issue for {names}: remove it, or use another issuer."
    ),
    ("serverInternal", None): _DOWN,
    ("tls", None): Rule(
        Side.NAME, Reason.CHALLENGE_FAILED, "The CA was led to HTTPS and its handshake failed: check TLS of {names}."
    ),
    ("unauthorized", None): Rule(
        Side.ACCOUNT,
        Reason.CA_REFUSED,
        "The issuer's account has no right to this at the CA: have the names validated for it, or its state checked.",
    ),
    ("unauthorized", Place.ACCOUNT): _ACCOUNT_CLOSED,
    ("unauthorized", Place.BINDING): Rule(Side.ACCOUNT, Reason.EAB_REFUSED, _BINDING_ADVICE),
    ("unauthorized", Place.INSIDE): Rule(
        Side.NAME,
        Reason.CHALLENGE_FAILED,
        "The CA did not find our answer: check that {names} leads to this cluster, and only there.",
    ),
    ("unsupportedContact", None): Rule(Side.ACCOUNT, Reason.CA_REFUSED, "Correct spec.acme.email of the issuer."),
    ("unsupportedIdentifier", None): Rule(
        Side.NAME, Reason.REJECTED_IDENTIFIER, "This CA issues for no names of that kind: use another issuer."
    ),
    ("userActionRequired", None): Rule(
        Side.ACCOUNT,
        Reason.TERMS_CHANGED,
        "Somebody has to agree to the CA's terms, or do what it asks for, at {instance}.",
    ),
    # --- RFC 8739 section 6.4 (STAR)
    ("autoRenewalCanceled", None): Rule(Side.US, Reason.CA_REFUSED, _OURS),
    ("autoRenewalCancellationInvalid", None): Rule(Side.US, Reason.CA_REFUSED, _OURS),
    ("autoRenewalExpired", None): Rule(Side.US, Reason.CA_REFUSED, _OURS),
    ("autoRenewalRevocationNotSupported", None): Rule(Side.US, Reason.CA_REFUSED, _OURS),
    # --- RFC 9115 (delegation), RFC 9773 section 7.4 (ARI), RFC 9799 (onion names), profiles, Boulder
    ("unknownDelegation", None): Rule(Side.US, Reason.CA_REFUSED, _OURS),
    ("alreadyReplaced", None): Rule(
        Side.US, Reason.CA_REFUSED, "Another order has replaced that certificate: it must be ordered without saying so."
    ),
    ("onionCAARequired", None): Rule(Side.NAME, Reason.REJECTED_IDENTIFIER, "Use another issuer for onion names."),
    ("invalidProfile", None): Rule(
        Side.ACCOUNT, Reason.UNKNOWN_PROFILE, "Choose a profile that the CA offers; the issuer's status lists them."
    ),
    ("conflict", None): Rule(
        Side.ACCOUNT, Reason.CA_REFUSED, "The CA has another state of it than we thought: look at it there."
    ),
    # --- HTTP statuses, for answers of other types and for answers that are no ACME error
    (0, None): Rule(Side.NAME, Reason.ORDER_INVALID, "Follow the CA's words."),
    (3, None): Rule(
        Side.CA,
        Reason.CA_UNAVAILABLE,
        "Redirects are not followed: if that stays so, name the final URL in spec.acme.server of the issuer.",
        temporary=True,
    ),
    (404, None): _MOVED,
    (404, Place.DIRECTORY): Rule(
        Side.CA, Reason.DIRECTORY_INVALID, "There is no ACME directory: correct spec.acme.server of the issuer."
    ),
    (404, Place.RESOURCE): _GONE,
    (408, None): _DOWN,
    (410, None): _MOVED,
    (410, Place.RESOURCE): _GONE,
    (425, None): _DOWN,
    (429, None): _BUSY,
    (503, None): _BUSY,
    (4, None): Rule(Side.CA, Reason.CA_REFUSED, "Ask the CA, or follow its words."),
    # A 4xx that is no ACME error comes from what stands before the CA (a firewall, a login page): it says nothing
    # about the order, and an order that may be issued already is not given up for it.
    ("", None): Rule(
        Side.CA,
        Reason.CA_UNAVAILABLE,
        "If that stays so, see what stands between this cluster and the CA, and check spec.acme.server of the issuer.",
        temporary=True,
    ),
    (5, None): _DOWN,
    (_ANY, None): _DOWN,
}

# CAs refuse bindings with few types and free words: (type, or "" for any; words in its detail) to what is meant. The
# first row that fits counts; words that no row knows are EABRefused. Seen at: Sectigo and ZeroSSL (awaiting, Key
# Identifier), step-ca (already bound, unknown key), Google (expiring, JWS verification), Pebble (not known, JWS
# verification), Vault and acme2certifier.
BINDING_REFUSALS: tuple[tuple[str, re.Pattern[str], Rule], ...] = tuple(
    (kind, re.compile(words, re.IGNORECASE), Rule(Side.ACCOUNT, reason, advice))
    for kind, words, reason, advice in (
        (
            "malformed",
            "not awaiting external account binding|account (is|was|has been) already bound",
            Reason.EAB_ALREADY_BOUND,
            "The CA has bound this key id, or this account key, before. Restore the Secret with the key of that "
            f"account. Where it is lost: {_NEW_BINDING}",
        ),
        (
            "",
            "already (been )?(used|bound|consumed|redeemed)|(was|is|been) (used|consumed|redeemed)|single[- ]use",
            Reason.EAB_USED,
            "This CA takes a binding once, and an account was registered with it. Restore the Secret with the key of "
            f"that account. Where it is lost: {_NEW_BINDING}",
        ),
        ("", "expir", Reason.EAB_EXPIRED, f"The binding is too old, or no longer known: {_NEW_BINDING}"),
        (
            "",
            "not (supported|enabled|required|allowed|needed)|does not (support|use|require|need)",
            Reason.EAB_NOT_NEEDED,
            "This CA takes no external account binding: remove externalAccountBinding from the issuer.",
        ),
        (
            "",
            "unknown|not (known|recogni[sz]ed|found)|no such|invalid key ?id",
            Reason.EAB_KEY_ID_UNKNOWN,
            f"Correct externalAccountBinding.keyID. If it is right, the CA has closed the binding: {_NEW_BINDING}",
        ),
        (
            "",
            r"verif(y|ication)|signature|\bh?mac\b|cryptographic primitive",
            Reason.EAB_MAC_WRONG,
            "The HMAC key is not that of this key id: copy it again from the CA into the Secret that "
            "externalAccountBinding.keySecretRef names, or correct keyID or keyAlgorithm.",
        ),
    )
)
# What an order is refused with when the trouble is the account: the CA is asked about that before the next order.
_DOUBTS = frozenset({"accountDoesNotExist", "externalAccountRequired", "unauthorized", "userActionRequired"})


def judge(
    problem: Problem, *, retry_after: timedelta | None, doing: str, place: Place = Place.RESOURCE
) -> TemporaryError | PermanentError:
    """The exception to raise for this problem.

    `doing` is what was being done, as a participle with its object: "placing an order for shop.example.test".
    `retry_after` is the answer's Retry-After. A problem with status 0 stood inside an order or a challenge: those are
    final, so that it is permanent for the attempt whatever its type, and `side` still tells who has to back off.
    """
    rule = _rule(problem, place)
    advice = rule.advice.format(
        names=listing(problem.identifiers()) or "the name",
        instance=problem.instance or "the address that it gives",
        algorithms=listing(problem.algorithms) or "not said",
    )
    begun = doing[:1].upper() + doing[1:]
    if rule.temporary and problem.status:
        again = f"The CA asks to wait {_duration(retry_after)}; then it" if retry_after else "It"
        message = _sentences(f"{begun} has to wait.", _said(problem), advice, f"{again} is tried again by itself.")
        return TemporaryError(message, retry_after=retry_after, problem=problem)
    return PermanentError(rule.reason, _sentences(f"{begun} failed.", _said(problem), advice), problem=problem)


def side(problem: Problem) -> Side:
    """Whose side the trouble is on, for the back-off: the CA's, the name's, the account's, or ours."""
    return _rule(problem, Place.RESOURCE).side


def reason(problem: Problem) -> Reason:
    """The reason to show while a problem is waited out: RateLimited, CAUnavailable or the table's own."""
    return _rule(problem, Place.RESOURCE).reason


def doubts_account(problem: Problem) -> bool:
    """Whether the answer to an order puts the account itself in doubt."""
    return bool(problem.status) and problem.type in _DOUBTS


def _rule(problem: Problem, place: Place) -> Rule:
    if place is Place.BINDING and 400 <= problem.status < 500 and problem.status != 429:
        said = problem.words()
        for kind, words, rule in BINDING_REFUSALS:
            if kind in {"", problem.type} and words.search(said):
                return rule
    return next(RULES[key] for key in _keys(problem, place if problem.status else Place.INSIDE) if key in RULES)


def _keys(problem: Problem, place: Place) -> Iterator[tuple[Kind, Place | None]]:
    """The keys of the table for a problem, the most telling first."""
    if problem.type == "compound":
        # RFC 8555 section 6.7.1: its subproblems speak of single identifiers.
        for sub in problem.subproblems:
            yield from ((sub.type, Place.INSIDE), (sub.type, None))
    for kind in _kinds(problem):
        yield from ((kind, place), (kind, None))


def _kinds(problem: Problem) -> Iterator[Kind]:
    status = problem.status
    if status in (429, 503):
        yield status
    # CAs say "malformed" of everything they do not find.
    if problem.type and not (problem.type == "malformed" and status in (404, 410)):
        yield problem.type
    yield status
    if not problem.type and 400 <= status < 500:
        yield ""
    yield status // 100
    yield _ANY


def _sentences(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _said(problem: Problem) -> str:
    words = problem.words().rstrip(".")
    words = words if len(words) <= _WORDS_LIMIT else words[:_WORDS_LIMIT] + "..."
    if problem.status and not problem.type:
        return f"The CA's server answered HTTP {problem.status}{f' with {words}' if words else ''}."
    return f'The CA says: "{words}".' if words else ""


def _duration(length: timedelta) -> str:
    seconds = round(length.total_seconds())
    if seconds < 120:
        return f"{seconds} s"
    minutes = -(-seconds // 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
