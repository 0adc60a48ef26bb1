"""ACME resources from hostile JSON: nothing raises, everything is cut to size."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certbotk8s.ca.resources import (
    parse_authorization,
    parse_directory,
    parse_error,
    parse_json,
    parse_order,
    parse_problem,
)
from certbotk8s.domain.acme import Identifier
from certbotk8s.domain.errors import Problem

NAMES = [
    "type", "url", "status", "token", "error", "identifier", "identifiers", "value", "authorizations", "challenges",
    "finalize", "certificate", "expires", "wildcard", "detail", "subproblems", "instance", "algorithms", "meta",
    "profiles", "newNonce", "newOrder", "newAccount", "externalAccountRequired",
]  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner)
)
objects = st.dictionaries(st.sampled_from(NAMES), anything)


@given(objects)
def test_any_object_is_read(raw: dict[str, Any]) -> None:
    """An object with members of any type, or none, is read as an order, an authorization, a problem and a directory.

    Mutation: read any member without looking at its type.
    """
    order = parse_order(raw, "u", None)
    authorization = parse_authorization(raw, "u", None)
    directory = parse_directory(raw)
    problem = parse_problem(raw)
    assert isinstance(order.status, str)
    assert all(isinstance(url, str) for url in order.authorizations)
    assert all(isinstance(challenge.token, str) for challenge in authorization.challenges)
    assert isinstance(directory.external_account_required, bool)
    assert problem
    assert problem.status == 0
    assert problem.words().isprintable()


@given(st.binary() | anything.map(lambda value: json.dumps(value).encode()), st.text(), st.integers(300, 999))
def test_any_body_is_an_error(body: bytes, content_type: str, status: int) -> None:
    """Whatever an error's body is, a problem with its status comes out.

    Mutation: take the JSON value for an object.
    """
    assert parse_error(body, content_type, status).status == status


@pytest.mark.parametrize("body", [b"[" * 500_000, b'{"a":' * 200_000, b"1" * 10_000, b'"\\ud800"', b"\xff\xfe", b""])
def test_hostile_json_is_none(body: bytes) -> None:
    """Nesting, numbers and characters that break parsers end as "no object".

    Mutation: let RecursionError pass.
    """
    assert not isinstance(parse_json(body), dict)


def test_a_lawful_order() -> None:
    """Every member of an order arrives, names in lower case, its time in UTC.

    Mutation: drop any member.
    """
    order = parse_order(
        {
            "status": "ready",
            "expires": "2026-11-20T10:00:00.123456789+01:00",
            "identifiers": [{"type": "dns", "value": "Shop.Example.Test"}, {"type": "ip", "value": "192.0.2.1"}],
            "authorizations": ["https://ca.test/authz/1"],
            "finalize": "https://ca.test/finalize/1",
            "certificate": "https://ca.test/cert/1",
            "error": {"type": "urn:ietf:params:acme:error:caa", "detail": "no", "status": 403},
        },
        "https://ca.test/order/1",
        None,
    )
    assert order.status == "ready"
    assert order.expires
    assert order.expires.replace(microsecond=0) == datetime(2026, 11, 20, 9, 0, tzinfo=UTC)
    assert order.identifiers == (Identifier("dns", "shop.example.test"), Identifier("ip", "192.0.2.1"))
    assert order.authorizations == ("https://ca.test/authz/1",)
    assert (order.finalize, order.certificate) == ("https://ca.test/finalize/1", "https://ca.test/cert/1")
    assert order.error == Problem("caa", "no")


@pytest.mark.parametrize("expires", ["", None, 7, "soon", "2026-13-01T00:00:00Z", "0001-01-01T00:00:00+23:59", []])
def test_what_is_no_time(expires: Any) -> None:
    """An `expires` that is no time of RFC 3339, or none that can be told in UTC, is none.

    Mutation: let ValidationError or OverflowError pass.
    """
    assert parse_order({"expires": expires}, "u", None).expires is None


def test_what_real_cas_leave_out_or_add() -> None:
    """Null members, an unknown status, an unknown identifier type and a challenge without token are kept as they are.

    Mutation: leave out challenges without a token.
    """
    authorization = parse_authorization(
        {
            "status": "valid",
            "expires": "",
            "identifier": {"type": "permanent-identifier", "value": "X"},
            "wildcard": None,
            "challenges": [{"type": "sectigo-email-01", "url": "https://ca.test/c", "status": "valid"}, None],
        },
        "https://ca.test/authz/1",
        None,
    )
    assert authorization.status == "valid"
    assert authorization.expires is None
    assert authorization.identifier == Identifier("permanent-identifier", "X")
    assert not authorization.wildcard
    assert [(one.type, one.token) for one in authorization.challenges] == [("sectigo-email-01", ""), ("", "")]
    nothing = parse_order({"status": "on hold", "identifiers": None, "authorizations": None, "error": None}, "u", None)
    assert (nothing.status, nothing.identifiers, nothing.error) == ("on hold", (), None)


def test_a_wildcard_is_told_by_its_flag() -> None:
    """The identifier of a wildcard authorization is the name below it, also where a CA leaves the asterisk there.

    Mutation: take the identifier as it is.
    """
    for raw in (
        {"identifier": {"type": "dns", "value": "*.a.test"}},
        {"identifier": {"type": "dns", "value": "a.test"}, "wildcard": True},
    ):
        found = parse_authorization(raw, "u", None)
        assert (found.identifier.value, found.wildcard) == ("a.test", True)


@pytest.mark.parametrize(
    "token", ["", "a/b", "../x", "a b", "a" * 129, "tök", "a\n", "$(id)", None, 7, ["a"], "a=", "a.b", "{x}"]
)
def test_a_token_outside_its_alphabet_is_none(token: Any) -> None:
    """A token ends in URLs, Ingress paths and DNS records: only base64url of 1 to 128 characters is one.

    Mutation: check the first character alone, or match instead of fullmatch.
    """
    raw = {"challenges": [{"type": "http-01", "token": token}, {"type": "http-01", "token": "a_-Z9" * 25}]}
    assert [one.token for one in parse_authorization(raw, "u", None).challenges] == ["", "a_-Z9" * 25]


def test_lists_and_words_are_cut() -> None:
    """No list or text of a CA is kept beyond its limit, and none keeps control or direction characters.

    Mutation: drop any limit, or the filter.
    """
    order = parse_order({"identifiers": [{}] * 5000, "authorizations": ["https://ca.test/a"] * 5000}, "u", None)
    assert (len(order.identifiers), len(order.authorizations)) == (1000, 1000)
    assert len(parse_authorization({"challenges": [{}] * 5000}, "u", None).challenges) == 100
    problem = parse_problem(
        {"type": "t" * 500, "detail": "\x1b[31mA\u202eB\n" + "x" * 5000, "subproblems": [{"detail": "y"}] * 500}
    )
    assert problem
    assert len(problem.type) == 100
    assert len(problem.subproblems) == 100
    assert len(problem.detail) <= 1000
    assert problem.detail.startswith("[31mA B xx")
    assert (
        parse_order({"finalize": "https://ca.test/" + "a" * 5000, "certificate": "https://x/\n"}, "u", None).finalize
        == ""
    )
    profiles = {str(n): "x" * 5000 for n in range(500)}
    found = parse_directory({"meta": {"profiles": profiles}}).profiles
    assert len(found) == 100
    assert all(len(text) == 1000 for text in found.values())


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (
            b'{"type":"urn:ietf:params:acme:error:unauthorized","detail":"no","instance":"https://ca.test/i"}',
            "application/problem+json",
            Problem("unauthorized", "no", 403, instance="https://ca.test/i"),
        ),
        (b'{"type":"urn:acme:error:caa"}', "", Problem("caa", "", 403)),
        (b'{"detail":"no type"}', "application/json", Problem("about:blank", "no type", 403)),
        (b'{"type":null,"detail":7,"subproblems":{},"identifier":3}', "", Problem("about:blank", "", 403)),
        (b'"Only words."', "application/json", Problem("about:blank", "Only words.", 403)),
        (b'"{\\"type\\":\\"urn:ietf:params:acme:error:dns\\"}"', "", Problem("dns", "", 403)),
        (
            b"<html><title>Blocked: secret</title>",
            "text/html",
            Problem("", "an HTML page instead of an ACME error", 403),
        ),
        (b"secret words", "text/plain", Problem("", "something else instead of an ACME error", 403)),
        (b"null", "application/json", Problem("", "something else instead of an ACME error", 403)),
        (b"[1]", "application/json", Problem("", "something else instead of an ACME error", 403)),
        (b"", "", Problem("", "", 403)),
    ],
)
def test_error_bodies(body: bytes, content_type: str, expected: Problem) -> None:
    """ACME errors are read in every form that CAs send; of anything else no word is repeated.

    Mutation: quote the text of a page, or refuse errors that are JSON strings.
    """
    assert parse_error(body, content_type, 403) == expected


def test_subproblems_name_their_identifiers() -> None:
    """The names that subproblems blame arrive, those nested deeper are left out.

    Mutation: drop the identifier of subproblems, or read them at any depth.
    """
    nested = {"detail": "x", "identifier": {"type": "dns", "value": "A.test"}, "subproblems": [{"detail": "deep"}]}
    problem = parse_problem({"type": "urn:ietf:params:acme:error:compound", "subproblems": [nested, 7, None]})
    assert problem
    assert problem.identifiers() == ("a.test",)
    assert problem.subproblems == (Problem("about:blank", "x", identifier="a.test"),)
