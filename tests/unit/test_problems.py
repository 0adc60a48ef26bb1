"""The table of ACME problems: every type and status has its row, and each speaks."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certbotk8s.domain.errors import PermanentError, Problem, TemporaryError
from certbotk8s.domain.problems import BINDING_REFUSALS, RULES, Place, Side, judge, reason, side
from certbotk8s.domain.reasons import Reason

# RFC 8555 section 6.7, RFC 8739 section 6.4, RFC 9115, RFC 9773, RFC 9799, draft-ietf-acme-profiles, Boulder.
TYPES = [
    "accountDoesNotExist",
    "alreadyRevoked",
    "badCSR",
    "badNonce",
    "badPublicKey",
    "badRevocationReason",
    "badSignatureAlgorithm",
    "caa",
    "compound",
    "connection",
    "dns",
    "externalAccountRequired",
    "incorrectResponse",
    "invalidContact",
    "malformed",
    "orderNotReady",
    "rateLimited",
    "rejectedIdentifier",
    "serverInternal",
    "tls",
    "unauthorized",
    "unsupportedContact",
    "unsupportedIdentifier",
    "userActionRequired",
    "autoRenewalCanceled",
    "autoRenewalCancellationInvalid",
    "autoRenewalExpired",
    "autoRenewalRevocationNotSupported",
    "unknownDelegation",
    "alreadyReplaced",
    "onionCAARequired",
    "invalidProfile",
    "conflict",
]
TEMPORARY = {"badNonce", "orderNotReady", "rateLimited", "serverInternal"}
NAME_SIDE = {"caa", "connection", "dns", "incorrectResponse", "rejectedIdentifier", "tls", "unsupportedIdentifier"}
ACCOUNT_SIDE = {
    "accountDoesNotExist",
    "badPublicKey",
    "badSignatureAlgorithm",
    "externalAccountRequired",
    "invalidProfile",
    "unauthorized",
    "userActionRequired",
}


def judged(problem: Problem, place: Place = Place.RESOURCE, wait: int = 0) -> TemporaryError | PermanentError:
    return judge(problem, retry_after=timedelta(seconds=wait) if wait else None, doing="doing a thing", place=place)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_has_a_row_of_its_own(kind: str) -> None:
    """Every type of the RFCs is judged by its own row, not by the status that came with it.

    Mutation: remove any row.
    """
    assert (kind, None) in RULES
    error = judged(Problem(kind, "words of the CA", status=418))
    assert isinstance(error, TemporaryError) == (kind in TEMPORARY)
    assert "words of the CA" in str(error)
    assert str(error).startswith("Doing a thing ")


def test_no_row_is_for_an_unknown_type() -> None:
    """The table names no type that no RFC has.

    Mutation: misspell a type in the table.
    """
    named = {kind for kind, _ in RULES if isinstance(kind, str) and kind}
    assert named == set(TYPES)


@pytest.mark.parametrize("kind", TYPES)
def test_whose_side_the_trouble_is_on(kind: str) -> None:
    """What validation found is the name's, accounts and keys are the account's; no account's trouble is the CA's.

    Mutation: swap the sides of two rows.
    """
    found = side(Problem(kind, status=400))
    assert (found is Side.NAME) == (kind in NAME_SIDE | {"badCSR", "compound", "onionCAARequired"})
    assert (found is Side.CA) == (kind in TEMPORARY)
    if kind in ACCOUNT_SIDE:
        assert found is Side.ACCOUNT


@pytest.mark.parametrize("kind", [*TYPES, "somethingNew", ""])
@pytest.mark.parametrize("place", list(Place))
def test_what_stood_inside_an_order_or_challenge_is_final(kind: str, place: Place) -> None:
    """A problem without an HTTP status is never temporary: the order or challenge that it stood in is over.

    Mutation: return the TemporaryError of the row.
    """
    assert isinstance(judged(Problem(kind, "x"), place), PermanentError)


@pytest.mark.parametrize(
    ("status", "kind", "place", "expected"),
    [
        (404, "malformed", Place.RESOURCE, Reason.ORDER_GONE),
        (404, "", Place.RESOURCE, Reason.ORDER_GONE),
        (404, "about:blank", Place.RESOURCE, Reason.ORDER_GONE),
        (410, "malformed", Place.RESOURCE, Reason.ORDER_GONE),
        (410, "", Place.RESOURCE, Reason.ORDER_GONE),
        (404, "accountDoesNotExist", Place.RESOURCE, Reason.ACCOUNT_UNKNOWN),
        (404, "", Place.DIRECTORY, Reason.DIRECTORY_INVALID),
        (404, "", Place.ENDPOINT, None),
        (404, "malformed", Place.ENDPOINT, None),
        (400, "about:blank", Place.RESOURCE, Reason.CA_REFUSED),
        (403, "somethingNew", Place.RESOURCE, Reason.CA_REFUSED),
        (403, "", Place.RESOURCE, None),
        (302, "", Place.DIRECTORY, None),
        (408, "", Place.RESOURCE, None),
        (425, "", Place.RESOURCE, None),
        (500, "somethingNew", Place.RESOURCE, None),
        (502, "", Place.RESOURCE, None),
        (599, "", Place.RESOURCE, None),
        (101, "", Place.RESOURCE, None),
        (999, "", Place.RESOURCE, None),
        (429, "unauthorized", Place.RESOURCE, None),
        (503, "malformed", Place.RESOURCE, None),
        (403, "unauthorized", Place.ACCOUNT, Reason.ACCOUNT_DEACTIVATED),
        (403, "unauthorized", Place.BINDING, Reason.EAB_REFUSED),
        (403, "externalAccountRequired", Place.BINDING, Reason.EAB_REFUSED),
        (400, "malformed", Place.BINDING, Reason.EAB_REFUSED),
        (403, "unauthorized", Place.RESOURCE, Reason.CA_REFUSED),
        (403, "userActionRequired", Place.ACCOUNT, Reason.TERMS_CHANGED),
    ],
)
def test_status_and_place(status: int, kind: str, place: Place, expected: Reason | None) -> None:
    """Where no type decides, the status does, and the place of the request; None stands for "temporary".

    Mutation: remove the row of any status, or ignore the place.
    """
    error = judged(Problem(kind, "words", status=status), place)
    assert (error.reason if isinstance(error, PermanentError) else None) is expected


@pytest.mark.parametrize(
    "problem", [Problem("rateLimited", status=403), Problem("", status=429), Problem("", status=503)]
)
def test_a_limit_is_told_apart_from_an_outage(problem: Problem) -> None:
    """A rate limit is temporary, carries the CA's Retry-After, and its reason is RateLimited; an outage's is not.

    Mutation: drop retry_after, or give 503 the row of 5xx.
    """
    error = judged(problem, wait=900)
    assert isinstance(error, TemporaryError)
    assert error.retry_after == timedelta(minutes=15)
    assert error.problem is problem
    assert "15 min" in str(error)
    assert reason(problem) is Reason.RATE_LIMITED
    assert reason(Problem("", status=502)) is Reason.CA_UNAVAILABLE


def test_unauthorized_in_a_challenge_blames_the_name() -> None:
    """`unauthorized` of a challenge is the name's trouble, of an answer the account's.

    Mutation: remove the row for problems inside challenges.
    """
    error = judged(Problem("unauthorized", "got 404"))
    assert isinstance(error, PermanentError)
    assert error.reason is Reason.CHALLENGE_FAILED
    assert side(Problem("unauthorized")) is Side.NAME
    assert side(Problem("unauthorized", status=403)) is Side.ACCOUNT


def test_a_compound_problem_is_judged_by_its_parts() -> None:
    """An order refused for several names has the reason of the first part that the table knows, and names them all.

    Mutation: leave the subproblems out of the search.
    """
    parts = tuple(Problem("rejectedIdentifier", "no", identifier=name) for name in ("a.test", "b.test"))
    error = judged(Problem("compound", "two problems", status=403, subproblems=parts))
    assert isinstance(error, PermanentError)
    assert error.reason is Reason.REJECTED_IDENTIFIER
    assert "a.test and b.test" in str(error)


def test_the_words_of_the_ca_are_no_template() -> None:
    """Braces in the CA's words, names and addresses are shown as they are.

    Mutation: format the whole sentence.
    """
    problem = Problem("userActionRequired", "{0} {names.__class__}", status=403, instance="https://ca.test/{x}")
    assert "{0} {names.__class__}" in str(judged(problem))
    assert "https://ca.test/{x}" in str(judged(problem))


@given(
    st.builds(
        Problem,
        type=st.one_of(st.sampled_from(TYPES), st.text()),
        detail=st.text(),
        status=st.integers(0, 1000),
        identifier=st.text(),
        algorithms=st.lists(st.text()).map(tuple),
    ),
    st.sampled_from(Place),
)
def test_every_problem_ends_in_a_sentence(problem: Problem, place: Place) -> None:
    """Whatever the CA sends, one of the two errors comes out, with a bounded sentence that says what was being done.

    Mutation: remove the last row of the table, or the cut of long words.
    """
    error = judged(problem, place)
    assert str(error).startswith("Doing a thing ")
    assert str(error).endswith(".")
    assert len(str(judged(Problem("caa", "x" * 100_000, status=403)))) < 2500


# What CAs answer to a binding, as users have reported it; type, detail, what is meant.
REFUSED_BINDINGS = [
    # Sectigo, ZeroSSL
    (
        "malformed",
        "[External Account Binding] The account is not awaiting external account binding",
        Reason.EAB_ALREADY_BOUND,
    ),
    ("malformed", "[External Account Binding] The Key Identifier was not recognized", Reason.EAB_KEY_ID_UNKNOWN),
    # step-ca
    (
        "unauthorized",
        "the external account binding key with id 'k' was already bound to account 'a' on 2026-01-02T03:04:05Z",
        Reason.EAB_USED,
    ),
    ("unauthorized", "the field 'kid' references an unknown key", Reason.EAB_KEY_ID_UNKNOWN),
    # Google
    (
        "unauthorized",
        "Unknown external account binding (EAB) key. This may be due to the EAB key expiring which occurs 7 days after "
        "creation.",
        Reason.EAB_EXPIRED,
    ),
    ("unauthorized", "External Account Binding JWS verification failed", Reason.EAB_MAC_WRONG),
    # Pebble
    (
        "unauthorized",
        "the field 'kid' references a key that is not known to the ACME server",
        Reason.EAB_KEY_ID_UNKNOWN,
    ),
    (
        "unauthorized",
        "external account binding JWS verification error: go-jose/go-jose: error in cryptographic primitive",
        Reason.EAB_MAC_WRONG,
    ),
    # others
    ("malformed", "external account binding is not supported", Reason.EAB_NOT_NEEDED),
    ("unauthorized", "EAB credentials have expired", Reason.EAB_EXPIRED),
    ("unauthorized", "This EAB has already been used", Reason.EAB_USED),
    ("malformed", "MAC validation failed", Reason.EAB_MAC_WRONG),
    ("externalAccountRequired", "The request must include a value for the field", Reason.EAB_REFUSED),
    ("unauthorized", "access_denied_invalid_key", Reason.EAB_REFUSED),
]


@pytest.mark.parametrize(("kind", "detail", "expected"), REFUSED_BINDINGS)
def test_what_is_wrong_with_a_binding_is_told_apart(kind: str, detail: str, expected: Reason) -> None:
    """The words that CAs are known for have a reason each; others end as EABRefused; all keep the CA's words.

    Mutation: remove any row of BINDING_REFUSALS, or search in another order.
    """
    error = judged(Problem(kind, detail, status=403), Place.BINDING)
    assert isinstance(error, PermanentError)
    assert error.reason is expected
    assert detail in str(error).replace('"', "") or detail.rstrip(".") in str(error)
    elsewhere = judged(Problem(kind, detail, status=403), Place.ENDPOINT)
    assert isinstance(elsewhere, PermanentError)
    assert elsewhere.reason in {Reason.CA_REFUSED, Reason.EAB_REQUIRED}


def test_every_row_on_bindings_is_seen() -> None:
    """Each row of the table is what some CA's words end at, with an advice of its own.

    Mutation: add a row that an earlier one covers.
    """
    met = {expected for _, _, expected in REFUSED_BINDINGS}
    assert {rule.reason for _, _, rule in BINDING_REFUSALS} == met - {Reason.EAB_REFUSED}
    assert len({rule.advice for _, _, rule in BINDING_REFUSALS}) == len(BINDING_REFUSALS)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_ca_refuses_no_binding(status: int) -> None:
    """Whatever the words, an overloaded CA is asked again.

    Mutation: look for words whatever the status.
    """
    assert isinstance(judged(Problem("serverInternal", "key not found", status=status), Place.BINDING), TemporaryError)
