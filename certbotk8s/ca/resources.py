"""ACME resources from the JSON that a CA sent: hostile input, read leniently.

Written by hand and not by `acme.messages`, whose parsers refuse what real CAs send: null members, unknown statuses and
identifier types, challenges without a token. Here whatever is missing or of another type becomes an empty value, every
string and list is cut to size, and nothing raises.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
from josepy.b64 import b64decode

from certbotk8s.ca.transport import URL_LIMIT
from certbotk8s.domain.acme import Account, Authorization, Challenge, Directory, Identifier, Order
from certbotk8s.domain.errors import Problem

if TYPE_CHECKING:
    from datetime import timedelta

_ITEMS = 1000
_SUBPROBLEMS = 100
_CHALLENGES = 100
_PROFILES = 100
_WORD = 100
_TEXT = 1000
_TYPES = re.compile(r"^urn:(?:ietf:params:)?acme:error:")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")


def parse_json(body: bytes) -> Any:
    """Any JSON value, or None for what is none."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return None


def parse_directory(raw: dict[str, Any]) -> Directory:
    """RFC 8555 section 7.1.1."""
    meta = _mapping(raw.get("meta"))
    profiles = list(_mapping(meta.get("profiles")).items())[:_PROFILES]
    return Directory(
        new_nonce=_url(raw.get("newNonce")),
        new_account=_url(raw.get("newAccount")),
        new_order=_url(raw.get("newOrder")),
        revoke_cert=_url(raw.get("revokeCert")),
        key_change=_url(raw.get("keyChange")),
        renewal_info=_url(raw.get("renewalInfo")),
        terms_of_service=_url(meta.get("termsOfService")),
        external_account_required=meta.get("externalAccountRequired") is True,
        profiles={_text(name, _WORD): _text(description, _TEXT) for name, description in profiles},
    )


def parse_account(raw: dict[str, Any], uri: str) -> Account:
    """RFC 8555 section 7.1.2. A CA that hides contacts sends none, or an empty list: both are unknown here."""
    contacts = [text for one in _list(raw.get("contact"), _ITEMS) if (text := _text(one, _TEXT)).startswith("mailto:")]
    protected = _mapping(raw.get("externalAccountBinding")).get("protected")
    return Account(
        uri=uri,
        contact=contacts[0].removeprefix("mailto:") if contacts else None,
        key_id=_text(_mapping(parse_json(_base64url(protected))).get("kid"), _TEXT),
    )


def parse_order(raw: dict[str, Any], url: str, retry_after: timedelta | None) -> Order:
    """RFC 8555 section 7.1.3."""
    return Order(
        url=url,
        status=_text(raw.get("status"), _WORD),
        identifiers=tuple(_identifier(one) for one in _list(raw.get("identifiers"), _ITEMS)),
        authorizations=tuple(filter(None, (_url(one) for one in _list(raw.get("authorizations"), _ITEMS)))),
        finalize=_url(raw.get("finalize")),
        certificate=_url(raw.get("certificate")),
        expires=_time(raw.get("expires")),
        error=parse_problem(raw.get("error")),
        retry_after=retry_after,
    )


def parse_authorization(raw: dict[str, Any], url: str, retry_after: timedelta | None) -> Authorization:
    """RFC 8555 section 7.1.4. Where a CA leaves the `*.` in the identifier, it is taken for the wildcard flag."""
    kind, value = _identifier(raw.get("identifier"))
    return Authorization(
        url=url,
        status=_text(raw.get("status"), _WORD),
        identifier=Identifier(kind, value.removeprefix("*.")),
        wildcard=raw.get("wildcard") is True or value.startswith("*."),
        challenges=tuple(_challenge(_mapping(one)) for one in _list(raw.get("challenges"), _CHALLENGES)),
        expires=_time(raw.get("expires")),
        retry_after=retry_after,
    )


def parse_problem(raw: Any, status: int = 0) -> Problem | None:
    """RFC 7807, and RFC 8555 section 6.7.1; None for what is no JSON object. A document without a type: about:blank."""
    if not isinstance(raw, dict):
        return None
    named = (_mapping(one) for one in _list(raw.get("subproblems"), _SUBPROBLEMS))
    subproblems = (parse_problem({**one, "subproblems": None}) for one in named if one)
    return Problem(
        type=_text(_TYPES.sub("", _text(raw.get("type"), _TEXT)), _WORD) or "about:blank",
        detail=_text(raw.get("detail"), _TEXT),
        status=status,
        subproblems=tuple(filter(None, subproblems)),
        identifier=_identifier(raw.get("identifier")).value,
        instance=_url(raw.get("instance")),
        algorithms=tuple(filter(None, (_text(one, _WORD) for one in _list(raw.get("algorithms"), _WORD)))),
    )


def parse_error(body: bytes, content_type: str, status: int) -> Problem:
    """The problem of an answer with an error status, whatever its body is.

    Some CAs send the document, or only its words, as a JSON string. Of a body that is no JSON nothing is repeated: it
    is not the CA that speaks there, and the URL may have led to somebody else's server.
    """
    raw = parse_json(body)
    if isinstance(raw, str):
        raw = parse_json(raw.encode(errors="replace")) if raw.lstrip().startswith("{") else {"detail": raw}
    problem = parse_problem(raw, status)
    if problem:
        return problem
    page = "an HTML page" if "html" in content_type.lower() or body.lstrip()[:1] == b"<" else "something else"
    return Problem(type="", detail=f"{page} instead of an ACME error" if body else "", status=status)


def _challenge(raw: dict[str, Any]) -> Challenge:
    token = raw.get("token")
    return Challenge(
        type=_text(raw.get("type"), _WORD),
        url=_url(raw.get("url")),
        status=_text(raw.get("status"), _WORD),
        token=token if isinstance(token, str) and _TOKEN.fullmatch(token) else "",
        error=parse_problem(raw.get("error")),
    )


def _identifier(raw: Any) -> Identifier:
    pair = _mapping(raw)
    kind, value = _text(pair.get("type"), _WORD), _text(pair.get("value"), _TEXT)
    return Identifier(kind, value.lower() if kind == "dns" else value)


def _base64url(value: Any) -> bytes:
    """What base64url text stands for; empty for anything else."""
    try:
        return b64decode(value) if isinstance(value, str) else b""
    except ValueError:
        return b""


def _text(value: Any, limit: int) -> str:
    """A string without control and format characters: it ends in conditions, logs and terminals."""
    if not isinstance(value, str):
        return ""
    return "".join(c if c.isprintable() else " " for c in value[:limit]).strip()


def _url(value: Any) -> str:
    return (
        value if isinstance(value, str) and len(value) <= URL_LIMIT and value.isascii() and value.isprintable() else ""
    )


def _list(value: Any, limit: int) -> list[Any]:
    return value[:limit] if isinstance(value, list) else []


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _time(value: Any) -> datetime | None:
    """RFC 3339; None for what is none."""
    try:
        time = msgspec.convert(value, datetime)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (msgspec.ValidationError, OverflowError):
        return None
