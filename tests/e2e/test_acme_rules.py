"""What clients of RFC 8555 get wrong, rule by rule: each has a case here, names the tests that hold it, or is out of
scope with the reason.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from cryptography import x509

from tests.e2e.faults import FaultyCA, faulty_ca
from tests.lab.acme_proxy import document, problem, to
from tests.lab.proxy import Answer, Fault, answered, changed
from tests.site import Site, assert_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.controller import Controller
    from tests.lab.lab import Lab

TESTS = Path(__file__).parents[1]

# Rule: the tests that hold it, as file::function.
HELD: dict[str, tuple[str, ...]] = {
    "badNonce is answered with the nonce that came with it": (
        "e2e/test_issuance.py::test_five_percent_of_nonces_rejected",
        "unit/test_ca_authority.py::test_a_refused_nonce_is_sent_again_with_the_one_that_came",
    ),
    "nonces of errors are kept": ("unit/test_ca_authority.py::test_each_answers_nonce_serves_the_next_request",),
    "an order may be born ready": ("e2e/test_incommon.py::test_four_requests_for_a_name_that_is_validated",),
    "an order may be processing for hours": ("e2e/test_slow_ca.py::test_an_order_that_is_never_finished",),
    "a finalize without an answer may have succeeded": ("e2e/test_slow_ca.py::test_finalize_is_not_answered",),
    "the same pending order may come twice": (
        "unit/test_reconcile_certificate.py::test_an_order_that_another_has_finalized_is_no_failure",
    ),
    "a valid authorization is not answered": ("e2e/test_incommon.py::test_a_valid_authorization_is_enough",),
    "authorizations have statuses that no RFC knows": (
        "e2e/test_incommon.py::test_an_authorization_of_an_unknown_shape",
    ),
    "challenges may have any type, and no token": ("e2e/test_incommon.py::test_a_pending_challenge_of_the_cas_own",),
    "a challenge is answered by {}, and once": (
        "unit/test_ca_authority.py::test_what_the_other_requests_send",
        "e2e/test_ca_trouble.py::test_every_answer_is_lost_once",
    ),
    "Retry-After has two forms, and any status": (
        "e2e/test_slow_ca.py::test_the_cas_pace_in_every_form",
        "unit/test_ca_transport.py::test_retry_after_in_both_forms",
    ),
    "POST-as-GET carries an empty text; the account is not read": (
        "unit/test_ca_authority.py::test_what_the_other_requests_send",
        "e2e/test_incommon.py::test_an_account_is_bound_once",
    ),
    "newAccount is signed by jwk, all else by kid": ("contract/test_ca_pebble.py::test_one_name_takes_seven_requests",),
    "the url header is the URL that was given": (
        "unit/test_ca_transport.py::test_only_plain_https_urls_are_addresses",
    ),
    "redirects are not followed": ("unit/test_ca_transport.py::test_redirects_are_not_followed",),
    "a request says what it is from, and its type": ("unit/test_ca_transport.py::test_what_a_request_carries",),
    "accountDoesNotExist registers again": (
        "unit/test_reconcile_issuer.py::test_an_account_that_the_ca_does_not_know_is_registered_again_with_its_binding",
    ),
    "newAccount for a known key is answered with 200": (
        "contract/test_ca_pebble.py::test_an_account_is_found_again_by_its_key",
    ),
    "userActionRequired tells where": ("unit/test_ca_authority.py::test_new_terms_are_told_with_their_address",),
    "externalAccountRequired is told before the first order": (
        "e2e/test_issuers.py::test_a_ca_that_demands_a_binding",
    ),
    "badPublicKey and badSignatureAlgorithm: another kind of account key": (
        "unit/test_reconcile_accounts.py::test_an_rsa_key_is_made_where_the_ca_wants_one",
    ),
    "a common name goes where the CA wants one": ("e2e/test_incommon.py::test_the_common_name_where_it_is_wanted",),
    "rateLimited holds until Retry-After, 503 too": ("e2e/test_ca_trouble.py::test_a_limit_on_new_orders",),
    "subproblems name identifiers": (
        "unit/test_problems.py::test_a_compound_problem_is_judged_by_its_parts",
        "e2e/test_refusals.py::test_one_bad_name_among_good_ones_is_named",
    ),
    "caa, dns, connection, incorrectResponse end an authorization": (
        "e2e/test_refusals.py::test_a_name_whose_dns_is_broken",
    ),
    "rejectedIdentifier stays until the spec changes": ("e2e/test_refusals.py::test_a_name_that_the_ca_rejects",),
    "badCSR stays until the spec changes": ("e2e/test_incommon.py::test_a_key_of_the_wrong_kind",),
    "names are A-labels, each once": (
        "e2e/test_refusals.py::test_names_are_normalised",
        "unit/test_names.py::test_each_name_is_ordered_once",
    ),
    "how many names an order may have is the CA's to say": (
        "e2e/test_incommon.py::test_several_names_on_a_binding_for_one",
    ),
    "a common name has at most 64 bytes, and is a name of the order": (
        "unit/test_names.py::test_common_name_is_one_of_the_names_ordered",
    ),
    "notBefore and notAfter are not sent": ("unit/test_ca_authority.py::test_a_new_order_says_what_is_wanted",),
    "a change of key is signed by both keys": ("unit/test_ca_authority.py::test_a_change_of_key_is_signed_by_both",),
    "clocks differ": ("unit/test_reconcile_certificate.py::test_a_clock_ahead_of_the_ca_makes_no_storm_of_orders",),
    "the CA follows redirects of HTTP-01": (
        "adapters/test_http01_traefik.py::test_an_application_that_redirects_to_its_apex",
    ),
}

OUT_OF_SCOPE = {
    "alreadyRevoked is a success": "nothing is revoked yet",
    "who may revoke": "nothing is revoked yet",
    "alternate chains are fetched for preferredChain only": "an Issuer has no preferredChain yet; see the case on Link",
    "an IP identifier has no CN, wildcard or DNS-01": "a Certificate has no ipAddresses yet",
    "lists of orders and newAuthz may be missing": "neither is ever asked for",
}


class Case(NamedTuple):
    """What the CA does to which requests (and to how many), and how the Certificate ends."""

    faults: tuple[tuple[Callable[[Any], bool], Fault, float], ...]
    reason: str = ""
    """Of the failure; "" where it becomes Ready without one."""
    words: str = ""
    """In the sentence of the failure."""
    asked: dict[str, int] = {}
    """What has reached the CA."""
    issuer: str = ""
    """Why the issuer is not Ready any more; "" where it is."""


ALWAYS = float("inf")


def chain(change: Callable[[bytes], bytes], **headers: str) -> Fault:
    """The certificate in another form."""
    more = tuple((name, value) for name, value in headers.items())
    return changed(lambda answer: Answer(answer.status, (*answer.headers, *more), change(answer.body)))


def over(status: str) -> Case:
    """An authorization that ended so."""
    fault = document(lambda seen: seen | {"status": status, "challenges": []})
    return Case(((to("authorization"), fault, ALWAYS),), "ChallengeFailed", f"is {status}", {"newOrder": 1})


ONCE = {"newOrder": 1, "finalize": 1, "certificate": 1}
PAGE = b"<html><body>Access denied</body></html>"
BLOCKED = answered(403, PAGE, Content_Type="text/html")

CASES: dict[str, Case] = {
    "orderNotReady after a finalize that was heard: the order is looked at": Case(
        ((to("finalize"), problem(403, "orderNotReady", "not ready", passed_on=True), 1),), asked=ONCE
    ),
    "orderNotReady although it is: finalize is sent again": Case(
        ((to("finalize"), problem(403, "orderNotReady", "not ready"), 1),), asked=ONCE
    ),
    "a newOrder that ends in serverInternal is tried again": Case(
        ((to("newOrder"), problem(500, "serverInternal", "an error has occurred"), 1),), asked=ONCE
    ),
    "an order may be lost before finalize": Case(
        ((to("order"), problem(404, "malformed", "no such order"), 1),), asked={"newOrder": 2, "finalize": 1}
    ),
    "the page of a firewall says nothing about an order": Case(
        ((to("newOrder"), BLOCKED, 1), (to("finalize"), BLOCKED, 1)), asked=ONCE
    ),
    "an error may be a JSON string": Case(
        ((to("order"), answered(503, b'"Service Unavailable"', Content_Type="application/json"), 1),), asked=ONCE
    ),
    "an expired authorization is over": over("expired"),
    "a deactivated authorization is over": over("deactivated"),
    "a revoked authorization is over": over("revoked"),
    "an invalid authorization without a reason is over": over("invalid"),
    "an order may be invalid without a reason": Case(
        ((to("order", "finalize"), document(lambda order: order | {"status": "invalid"}), ALWAYS),),
        "OrderInvalid",
        "does not say why",
        {"newOrder": 1},
    ),
    "a deactivated account is no reason to go on asking": Case(
        (
            (to("newOrder"), problem(403, "unauthorized", "Account is not valid, has status deactivated"), ALWAYS),
            (to("newAccount"), problem(403, "unauthorized", "Account is not valid, has status deactivated"), ALWAYS),
        ),
        "CARefused",
        "Account is not valid",
        {"newOrder": 0},
        issuer="AccountDeactivated",
    ),
    "a chain may have CRLF, blank lines and no end of line": Case(
        ((to("certificate"), chain(lambda body: body.replace(b"\n", b"\r\n").rstrip() + b"\r\n\r\n"), 1),), asked=ONCE
    ),
    "a chain may end without a line end": Case(
        ((to("certificate"), chain(lambda body: b"\n" + body.rstrip()), 1),), asked=ONCE
    ),
    "alternate chains may be offered in any form": Case(
        ((to("certificate"), chain(lambda body: body, Link='</alt/1>;rel="alternate", <x>;rel=alternate'), 1),),
        asked=ONCE,
    ),
}


@pytest.fixture
def ca(lab: Lab, site: Site, controller: Controller) -> Iterator[FaultyCA]:
    """An issuer whose CA is behind a proxy; whatever a case provokes is told in plain words."""
    with faulty_ca(lab) as faulty:
        yield faulty
        assert_plain(site.said())


@pytest.mark.parametrize("rule", CASES)
def test_rule(site: Site, ca: FaultyCA, suffix: str, rule: str) -> None:
    """Each case ends as the rule demands, with no request more than that.

    Mutation: take orderNotReady, or a page with status 403, for the end of the attempt.
    """
    case = CASES[rule]
    for fits, fault, times in case.faults:
        ca.proxy.inject(fits, fault, times=times)
    host = f"web.{suffix}"
    site.certificate("web", [host], ca.issuer)
    if case.reason:
        # The Event: by now the condition may say what the next attempt waits for.
        message = site.event("web", case.reason)
        print(f"\n{message}")
        assert case.words in message
        assert site.status("web")["failedAttempts"] == 1
    else:
        assert site.ready("web").get("failedAttempts", 0) == 0
        chain = x509.load_pem_x509_certificates(site.secret_value("web", "tls.crt"))
        assert chain[0].issuer == chain[1].subject
        assert ca.issued() == 1
    if case.issuer:
        site.issuer_condition("ClusterIssuer", ca.issuer, "False", case.issuer)
    site.nothing_left()
    counts = ca.counts()
    assert {kind: counts[kind] for kind in case.asked} == case.asked


@functools.cache
def functions_of(path: str) -> set[str]:
    """The names of the functions of a file of tests."""
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}


@pytest.mark.parametrize(("rule", "test"), [(rule, test) for rule, named in HELD.items() for test in named])
def test_the_test_that_holds_a_rule_exists(rule: str, test: str) -> None:
    """A rule that another test holds names one that is there.

    Mutation: misspell the name of a test in the table.
    """
    path, _, name = test.partition("::")
    assert name in functions_of(path), rule


def test_each_rule_stands_once() -> None:
    """No rule is held in two ways, and what is out of scope says why.

    Mutation: give a rule of the first table to the second as well.
    """
    assert not (HELD.keys() & CASES.keys() | HELD.keys() & OUT_OF_SCOPE.keys() | CASES.keys() & OUT_OF_SCOPE.keys())
    assert all(OUT_OF_SCOPE.values())
