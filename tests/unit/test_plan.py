"""What a Certificate needs, whether it may have it now, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from certbotk8s.domain import api
from certbotk8s.domain.plan import (
    DUE,
    HOLDS,
    ISSUER_LOOK,
    UNFIT,
    Finding,
    Observed,
    Ownership,
    adoption_asked,
    blocked,
    conditions,
    hold,
    issuer_name,
    issuer_ready,
    issuer_version,
    key_size,
    misfit,
    need,
    order_set,
    ownership,
    profile,
    request_hash,
    set_condition,
    unfit,
    when,
)
from certbotk8s.domain.reasons import Reason
from tests.builders import (
    DAY,
    HOUR,
    MINUTE,
    NAME,
    NOW,
    certificate,
    changed,
    condition,
    facts,
    issuer,
    metadata,
    observed,
    recent_order,
    tls_secret,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WEB = certificate()
RENEW = {api.ANNOTATION_RENEW_NOW: "again"}
# What is not named in these is as it should be.
LACKS: dict[Reason, Callable[[], dict[str, Any]]] = {
    Reason.SECRET_MISSING: lambda: {"secret": None},
    Reason.SECRET_INVALID: lambda: {"secret": tls_secret(problem="tls.key: no PEM private key that can be read")},
    Reason.NAMES_CHANGED: lambda: {"secret": tls_secret(holds=facts(["other.example.test"]))},
    Reason.KEY_CHANGED: lambda: {"secret": tls_secret(holds=facts(key_algorithm="RSA", key_size=2048))},
    Reason.EXPIRED: lambda: {"secret": tls_secret(age=90 * DAY)},
    Reason.RENEW_NOW: lambda: {"certificate": certificate(annotations=RENEW)},
    Reason.RENEWING: lambda: {"secret": tls_secret(age=60 * DAY)},
}


def found(finding: Finding | None) -> Reason | None:
    return finding.reason if finding else None


# --- what is needed ---------------------------------------------------------------------------------------------------


def test_a_certificate_that_fits_needs_nothing() -> None:
    """Out of a Secret that fits, far from its renewal, no order comes, and nothing holds one up.

    Mutation: make any check always speak.
    """
    assert need(observed()) is None
    assert unfit(observed()) is None
    assert hold(observed()) is None


@pytest.mark.parametrize("reason", LACKS)
def test_each_lack_alone_is_found(reason: Reason) -> None:
    """Each thing that can be wrong is found when all else is right, and said in a sentence without a full stop.

    Mutation: remove the check from its list.
    """
    seen = observed(**LACKS[reason]())
    finding = need(seen)
    assert found(finding) is reason
    assert finding
    assert finding.message
    assert not finding.message.endswith(".")
    assert (unfit(seen) is not None) == (reason not in {Reason.RENEW_NOW, Reason.RENEWING})


def test_every_check_is_tested() -> None:
    """The table of this test has a case for each check of both lists.

    Mutation: add a check without a case.
    """
    assert len(UNFIT) + len(DUE) == len(LACKS)


ALL_WRONG: dict[Reason, dict[str, Any]] = {
    Reason.SECRET_INVALID: {"problem": "tls.key: unreadable"},
    Reason.NAMES_CHANGED: {"names_hash": "of others"},
    Reason.KEY_CHANGED: {"key_size": 384},
    Reason.EXPIRED: {"not_after": NOW},
    Reason.RENEWING: {"not_after": NOW + DAY},
}


@pytest.mark.parametrize(("first", "second"), list(combinations(ALL_WRONG, 2)))
def test_the_first_of_two_lacks_is_said(first: Reason, second: Reason) -> None:
    """Where two things are wrong the one nearer to the root is said: unreadable, names, key, expired, due.

    Mutation: swap two checks of the list.
    """
    wrong = {**ALL_WRONG[second], **ALL_WRONG[first]}
    problem = wrong.pop("problem", "")
    held = facts(**wrong)
    assert found(need(observed(secret=tls_secret(holds=held, problem=problem)))) is first


def test_a_wish_to_renew_is_said_before_the_time_of_renewal() -> None:
    """renew-now comes before a renewal that is due: it may jump the shortest interval.

    Mutation: swap the two.
    """
    seen = observed(certificate(annotations=RENEW), secret=tls_secret(age=60 * DAY))
    assert found(need(seen)) is Reason.RENEW_NOW


@pytest.mark.parametrize(
    ("asked", "done", "expected"),
    [
        ("1", "", Reason.RENEW_NOW),
        ("2", "1", Reason.RENEW_NOW),
        ("1", "1", None),
        ("", "1", None),
        ("x" * 300, "", Reason.RENEW_NOW),
        ("x" * 300, "x" * 256, None),
    ],
)
def test_each_new_value_of_renew_now_orders_once(asked: str, done: str, expected: Reason | None) -> None:
    """A value that was ordered for, or none, orders nothing; one too long for status orders once all the same.

    Mutation: compare with the empty value only, or with the whole of a long one.
    """
    marks = {api.ANNOTATION_RENEW_NOW: asked} if asked else {}
    assert found(need(observed(certificate(annotations=marks, status={"renew_now": done})))) is expected


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        (60 * DAY - timedelta(seconds=1), None),
        (60 * DAY, Reason.RENEWING),
        (90 * DAY - timedelta(seconds=1), Reason.RENEWING),
        (90 * DAY, Reason.EXPIRED),
        (400 * DAY, Reason.EXPIRED),
    ],
)
def test_needs_come_with_time(age: timedelta, expected: Reason | None) -> None:
    """Renewal is due at its second, expiry at its second.

    Mutation: compare with < where <= stands.
    """
    assert found(need(observed(secret=tls_secret(age=age)))) is expected


@pytest.mark.parametrize(
    ("secret", "words"),
    [
        (tls_secret(problem="tls.crt: unreadable"), "tls.crt: unreadable"),
        (tls_secret(certificate=None), "cannot be used"),
        (tls_secret(public_key_hash="of another"), "tls.key is not the key of tls.crt"),
        (tls_secret(public_key_hash=""), "tls.key is not the key of tls.crt"),
    ],
)
def test_a_secret_without_a_pair_is_invalid(secret: api.SecretFacts, words: str) -> None:
    """A Secret whose certificate or key is missing, unreadable or does not belong to the other is of no use.

    Mutation: leave out the comparison of the two hashes.
    """
    finding = need(observed(secret=secret))
    assert found(finding) is Reason.SECRET_INVALID
    assert finding
    assert words in finding.message
    assert "shop/web-tls" in finding.message


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (api.PrivateKeySpec("ECDSA"), True),
        (api.PrivateKeySpec("ECDSA", 256), True),
        (api.PrivateKeySpec("ECDSA", 384), False),
        (api.PrivateKeySpec("RSA", 256), False),
        (api.PrivateKeySpec("ECDSA", encoding="PKCS8"), False),
        (api.PrivateKeySpec("ECDSA", rotation_policy="Never"), True),
    ],
)
def test_the_kind_of_key_is_part_of_the_spec(wanted: api.PrivateKeySpec, *, fits: bool) -> None:
    """Algorithm, size and encoding are compared with what stands in the Secret; a size of 0 is the default's.

    Mutation: leave one of the three out, or compare a size of 0.
    """
    assert (need(observed(certificate(key=wanted))) is None) == fits


def test_default_sizes_of_keys() -> None:
    """Without a size RSA has 2048 bits and ECDSA 256.

    Mutation: swap the two.
    """
    assert key_size(api.PrivateKeySpec()) == 2048
    assert key_size(api.PrivateKeySpec("ECDSA")) == 256
    assert key_size(api.PrivateKeySpec("RSA", 4096)) == 4096


@pytest.mark.parametrize(
    "names",
    [("www.example.test",), (NAME, "www.example.test"), ("*.example.test",)],
)
def test_exactly_the_wanted_names(names: tuple[str, ...]) -> None:
    """One name more, fewer or other than wanted asks for a new certificate.

    Mutation: be content with a superset.
    """
    assert found(need(observed(certificate(names=names), secret=tls_secret()))) is Reason.NAMES_CHANGED


# --- who owns a Secret ------------------------------------------------------------------------------------------------

OTHER = certificate("other-tls", secret_name="web-tls")
NAMELESS = metadata("web-tls", annotations={api.ANNOTATION_CERTIFICATE: ""}, labels={api.LABEL_ROLE: api.ROLE_TLS})


@pytest.mark.parametrize(
    ("secret", "expected"),
    [
        (tls_secret(), Ownership.OURS),
        (tls_secret(owner_uid="of one deleted"), Ownership.LEFT),
        (tls_secret(role=""), Ownership.LEFT),
        (tls_secret(role=api.ROLE_NEXT_KEY), Ownership.LEFT),
        (tls_secret(owner="gone-tls"), Ownership.LEFT),
        (tls_secret(owner="other-tls"), Ownership.RIVAL),
        (tls_secret(owner="other-tls", owner_uid=WEB.metadata.uid), Ownership.RIVAL),
        (tls_secret(owner=""), Ownership.FOREIGN),
        (structs.replace(tls_secret(), metadata=NAMELESS), Ownership.FOREIGN),
    ],
)
def test_a_secret_belongs_to_the_name_in_it(secret: api.SecretFacts, expected: Ownership) -> None:
    """The name in the annotation decides; UID and label only tell whether the Secret is to be marked anew.

    Mutation: decide by UID, or take a Secret without the annotation.
    """
    assert ownership(secret, WEB, [OTHER]) is expected


def test_without_its_owner_a_secret_is_left_behind() -> None:
    """What belongs to a rival is free as soon as that rival is gone.

    Mutation: answer RIVAL for any other name.
    """
    assert ownership(tls_secret(owner="other-tls"), WEB, []) is Ownership.LEFT


@pytest.mark.parametrize(
    "secret", [tls_secret(owner="other-tls"), tls_secret(owner_uid="of one deleted"), tls_secret(owner="")]
)
def test_a_secret_of_somebody_else_does_not_serve(secret: api.SecretFacts) -> None:
    """A Secret that is not ours counts as missing, however well it fits; apart from that it fits.

    Mutation: look for any Secret of that name.
    """
    seen = observed(secret=secret, rivals=(OTHER,))
    assert found(unfit(seen)) is Reason.SECRET_MISSING
    assert misfit(seen) is None


@pytest.mark.parametrize("reason", [Reason.SECRET_INVALID, Reason.NAMES_CHANGED, Reason.KEY_CHANGED, Reason.EXPIRED])
def test_what_does_not_fit_is_not_adopted(reason: Reason) -> None:
    """Adoption asks everything but whose the Secret is.

    Mutation: ask the names only.
    """
    assert found(misfit(observed(**LACKS[reason]()))) is reason


@pytest.mark.parametrize(("value", "asked"), [("true", True), ("True", False), ("yes", False), ("", False)])
def test_adoption_is_asked_for_by_one_word(value: str, *, asked: bool) -> None:
    """Only `true` hands over a Secret of somebody else.

    Mutation: take any value.
    """
    assert adoption_asked(certificate(annotations={api.ANNOTATION_ADOPT: value})) == asked
    assert not adoption_asked(WEB)


# --- whether it may be ordered now ------------------------------------------------------------------------------------

INVALID = Finding(Reason.INVALID_SPEC, "a_b is no DNS name. Nothing is ordered until that is mended")
OLDER = certificate("old-tls", secret_name="web-tls", age=9 * DAY)
FAILED = recent_order(Reason.CHALLENGE_FAILED)


def failed(*, wait: timedelta = HOUR, order: api.RecentOrder | None = FAILED, **meta: Any) -> api.Certificate:
    """A Certificate whose last attempt failed, with the next in an hour."""
    said = condition("Issuing", "False", Reason.CHALLENGE_FAILED, "CA got 404. Next attempt 2026-11-20 10:00 UTC.")
    return certificate(
        status={
            "conditions": (said,),
            "next_attempt_time": NOW + wait,
            "failed_attempts": 1,
            "recent_orders": (order,) if order else (),
        },
        **meta,
    )


def limited(*, generation: int = 1, wait: timedelta = HOUR, why: Reason = Reason.RATE_LIMITED) -> api.Certificate:
    """A Certificate for which the CA asked to wait an hour."""
    said = condition("Issuing", "True", why, "too many new orders", observed_generation=generation)
    return certificate(status={"conditions": (said,), "next_attempt_time": NOW + wait})


def issued(*, ago: timedelta = MINUTE, life: timedelta = 90 * DAY, generation: int = 1, **meta: Any) -> api.Certificate:
    """A Certificate that was issued a minute ago."""
    return certificate(
        status={
            "not_before": NOW - HOUR,
            "not_after": NOW - HOUR + life,
            "recent_orders": (recent_order(age=ago, generation=generation), recent_order("Failed", age=HOUR)),
        },
        **meta,
    )


BOUND = api.ExternalAccountBinding("kid-1", api.SecretKeyRef("eab"))
# Of another namespace, and the first.
HOLDER = certificate("theirs", namespace="pay", age=9 * DAY, generation=2)
HELD: dict[Reason, dict[str, Any]] = {
    Reason.INVALID_SPEC: {"invalid": INVALID},
    Reason.SECRET_CONFLICT: {"rivals": (OLDER,), "secret": None},
    Reason.SECRET_IMMUTABLE: {"secret": tls_secret(immutable=True)},
    Reason.ISSUER_NOT_FOUND: {"issuer": None},
    Reason.ISSUER_NOT_READY: {"issuer": issuer(ready="False", message="The CA is away.")},
    Reason.NOT_ALLOWED: {"issuer": issuer(policy=api.Policy(()))},
    Reason.NAME_CLAIMED: {"contenders": (HOLDER,)},
    Reason.NO_BINDING_FITS: {"issuer": issuer(bindings=(api.BindingSpec("rsa", BOUND, ("RSA",)),))},
    Reason.RATE_LIMITED: {"of": limited()},
    Reason.CHALLENGE_FAILED: {"of": failed()},
    Reason.BACKING_OFF: {"of": issued()},
}


@pytest.mark.parametrize("reason", HELD)
def test_each_hold_alone_is_found(reason: Reason) -> None:
    """Each thing that forbids an order does so alone.

    Mutation: remove the check from the list.
    """
    assert found(hold(observed(**HELD[reason]))) is reason


def test_every_hold_is_tested() -> None:
    """The table of this test has a case for each check; the issuer's has two.

    Mutation: add a check without a case.
    """
    assert len(HOLDS) + 1 == len(HELD)


@pytest.mark.parametrize("reason", HELD)
def test_what_blocks_even_taking_a_secret_over(reason: Reason) -> None:
    """A Secret that was left behind is taken over without issuer and during a back-off, but not from a rival.

    Mutation: ask every hold.
    """
    blocking = {Reason.INVALID_SPEC, Reason.SECRET_CONFLICT}
    assert found(blocked(observed(**HELD[reason]))) is (reason if reason in blocking else None)


@pytest.mark.parametrize(
    ("first", "second"),
    [pair for pair in combinations(HELD, 2) if not set(HELD[pair[0]]) & set(HELD[pair[1]])],
)
def test_the_first_of_two_holds_is_said(first: Reason, second: Reason) -> None:
    """Where two things forbid an order the one that the user must mend first is said.

    Mutation: swap two checks of the list.
    """
    assert found(hold(observed(**HELD[second], **HELD[first]))) is first


@pytest.mark.parametrize(
    ("of", "held"),
    [
        (limited(), True),
        (limited(wait=-MINUTE), False),
        (limited(generation=0), False),
        (limited(why=Reason.ORDER_PENDING), False),
        (limited(wait=30 * DAY), False),
    ],
)
def test_what_the_ca_asked_for_holds_for_that_request(of: api.Certificate, *, held: bool) -> None:
    """Retry-After holds until its time, for the spec that was refused; a time that no CA can have named does not.

    Mutation: leave the generation out of account, or the bound.
    """
    finding = hold(observed(of))
    assert bool(finding) == held
    assert finding is None or finding.until == NOW + HOUR


def test_a_changed_issuer_is_asked_at_once() -> None:
    """A failure says nothing of an issuer that was changed or made again since; of the same one it does.

    Mutation: leave the issuer out of account.
    """
    same = issuer()
    of = failed(order=recent_order(Reason.CHALLENGE_FAILED, issuer=issuer_version(same)))
    assert found(hold(observed(of, issuer=same))) is Reason.CHALLENGE_FAILED
    assert hold(observed(of, issuer=issuer(generation=2))) is None
    assert hold(observed(of, issuer=issuer(uid="of the next"))) is None


def test_a_back_off_told_by_a_wrong_clock_does_not_hold() -> None:
    """A next attempt further ahead than anything is put off was reckoned by a clock that was wrong.

    Mutation: hold until then.
    """
    assert hold(observed(failed(wait=2 * DAY))) is None


def test_a_failure_is_said_before_the_shortest_interval() -> None:
    """Where the last attempt failed soon after a success, its words stand: they say what to mend.

    Mutation: ask for the interval first.
    """
    of, before = failed(), issued().status
    orders = (recent_order(age=2 * MINUTE), FAILED)
    status = structs.replace(of.status, recent_orders=orders, not_before=before.not_before, not_after=before.not_after)
    both = structs.replace(of, status=status)
    assert found(hold(observed(both))) is Reason.CHALLENGE_FAILED
    assert found(hold(observed(both, now=NOW + 50 * MINUTE))) is Reason.CHALLENGE_FAILED


@pytest.mark.parametrize(
    ("seen", "reason", "words", "until"),
    [
        (observed(issuer=None), Reason.ISSUER_NOT_FOUND, "Issuer shop/letsencrypt does not exist", None),
        (
            observed(certificate(issuer_kind="ClusterIssuer"), issuer=None),
            Reason.ISSUER_NOT_FOUND,
            "ClusterIssuer letsencrypt does not exist",
            None,
        ),
        (observed(issuer=issuer(ready="")), Reason.ISSUER_NOT_READY, "to become ready", NOW + ISSUER_LOOK),
        (
            observed(issuer=issuer(generation=2, seen_generation=1)),
            Reason.ISSUER_NOT_READY,
            "to become ready",
            NOW + ISSUER_LOOK,
        ),
        (
            observed(issuer=issuer(ready="False", message="Key id kid-1 is unknown.")),
            Reason.ISSUER_NOT_READY,
            "not ready: Key id kid-1 is unknown.",
            None,
        ),
        (
            observed(issuer=issuer(ready="Unknown", message="Asking.")),
            Reason.ISSUER_NOT_READY,
            "not ready: Asking.",
            None,
        ),
    ],
)
def test_without_a_ready_issuer_nothing_is_ordered(seen: Observed, reason: Reason, words: str, until: Any) -> None:
    """An issuer that is missing, unready or was changed since it was looked at is named, with its own words.

    Mutation: take Ready of an older generation, or of any status.
    """
    finding = hold(seen)
    assert found(finding) is reason
    assert finding
    assert words in finding.message
    assert finding.until == until


def test_an_issuer_is_ready_for_its_present_spec_only() -> None:
    """The Ready condition counts when it speaks of the present generation.

    Mutation: leave the generation out.
    """
    assert issuer_ready(issuer()) == issuer().status.conditions[0]
    assert issuer_ready(issuer(generation=3, seen_generation=2)) is None
    assert issuer_ready(issuer(ready="")) is None
    assert issuer_name(WEB) == "Issuer shop/letsencrypt"


# --- one Secret, several Certificates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "goes_on"),
    [
        ("web-tls", "web-tls"),
        ("old-tls", "old-tls"),
        ("other-tls", "other-tls"),
        ("gone-tls", "old-tls"),
        ("", "old-tls"),
        (None, "old-tls"),
    ],
)
def test_the_owner_of_a_shared_secret_goes_on(owner: str | None, goes_on: str) -> None:
    """Of several Certificates that name one Secret the one in its annotation goes on, without one the oldest.

    Mutation: let the oldest win over the owner, or the youngest over the oldest.
    """
    rivals = [WEB, OLDER, OTHER]
    secret = tls_secret(owner=owner) if owner is not None else None
    held = {
        each.metadata.name: hold(
            observed(each, secret=secret, rivals=tuple(other for other in rivals if other is not each))
        )
        for each in rivals
    }
    assert [name for name, finding in held.items() if finding is None] == [goes_on]
    for finding in filter(None, held.values()):
        assert finding.reason is Reason.SECRET_CONFLICT
        assert f"Secret shop/web-tls belongs to Certificate shop/{goes_on}" in finding.message


RIVALS = st.lists(
    st.builds(
        lambda name, age: certificate(name, secret_name="web-tls", age=age * HOUR, names=(f"{name}.test",)),
        st.sampled_from([*"abcdefgh", "web-tls"]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda each: each.metadata.name,
)


@given(RIVALS, st.none() | st.sampled_from(["", "a", "b", "web-tls", "gone"]))
def test_exactly_one_of_any_rivals_goes_on(rivals: Sequence[api.Certificate], owner: str | None) -> None:
    """However many Certificates name one Secret, and whosever it is, exactly one of them orders.

    Mutation: break a tie of age by nothing, or by what each sees for itself.
    """
    secret = tls_secret(owner=owner) if owner is not None else None
    going = [
        each
        for each in rivals
        if hold(observed(each, secret=secret, rivals=tuple(other for other in rivals if other is not each))) is None
    ]
    assert len(going) == 1
    if owner in {each.metadata.name for each in rivals}:
        assert going[0].metadata.name == owner


def test_a_rival_without_a_time_of_creation_is_no_error() -> None:
    """An object that does not say when it was made counts as the oldest.

    Mutation: compare None with a time.
    """
    assert found(hold(observed(secret=None, rivals=(changed(OTHER, creation_timestamp=None),)))) is (
        Reason.SECRET_CONFLICT
    )


# --- back-off and the shortest interval -------------------------------------------------------------------------------


def test_a_back_off_keeps_the_sentence_of_the_failure() -> None:
    """While backing off, what is said and until when are those of the failure.

    Mutation: say BackingOff in other words, or leave out the time.
    """
    finding = hold(observed(failed()))
    assert finding == Finding(Reason.CHALLENGE_FAILED, "CA got 404. Next attempt 2026-11-20 10:00 UTC.", NOW + HOUR)


FUTURE: Any = "FromTheFuture"


@pytest.mark.parametrize(
    ("outcome", "said_now"),
    [
        (Reason.CHALLENGE_FAILED, ()),
        (Reason.CHALLENGE_FAILED, (condition("Issuing", "False", Reason.ISSUER_NOT_READY, "Waiting for the issuer."),)),
        (FUTURE, (condition("Issuing", "False", FUTURE, "Said by another version."),)),
    ],
    ids=["nothing", "something else", "by another version"],
)
def test_a_back_off_speaks_for_itself(outcome: str, said_now: tuple[api.Condition, ...]) -> None:
    """Where the condition does not speak of the failure, the back-off says what failed and when it goes on.

    Mutation: repeat whatever the condition says.
    """
    of = failed(order=recent_order(outcome))
    finding = hold(observed(structs.replace(of, status=structs.replace(of.status, conditions=said_now))))
    words = f"The last attempt failed ({outcome}). Next attempt 2026-11-20 10:00 UTC"
    assert finding == Finding(Reason.BACKING_OFF, words, NOW + HOUR)


@pytest.mark.parametrize(
    "of",
    [
        failed(wait=timedelta()),
        failed(wait=-MINUTE),
        failed(generation=2),
        failed(annotations=RENEW),
        failed(order=structs.replace(FAILED, renew_now="earlier"), annotations=RENEW),
        failed(order=None),
    ],
    ids=["over", "long over", "new spec", "renew-now", "renew-now again", "no attempt known"],
)
def test_a_new_request_ends_a_back_off(of: api.Certificate) -> None:
    """A changed spec, a new wish to renew or the time that came make the next attempt.

    Mutation: leave out generation or renew-now, or compare with <.
    """
    assert hold(observed(of, secret=None)) is None


def test_a_back_off_outlasts_the_wish_that_failed() -> None:
    """A failed attempt for a wish to renew backs off like any other.

    Mutation: end every back-off while the annotation stands.
    """
    of = failed(order=structs.replace(FAILED, renew_now="again"), annotations=RENEW)
    assert found(hold(observed(of))) is Reason.CHALLENGE_FAILED


@pytest.mark.parametrize(
    ("of", "held"),
    [
        (issued(), True),
        (issued(ago=HOUR - timedelta(seconds=1)), True),
        (issued(ago=HOUR), False),
        (issued(ago=timedelta(seconds=-5)), True),
        (issued(ago=-DAY), False),
        (issued(ago=NOW - datetime.max.replace(tzinfo=UTC)), False),
        (issued(life=2 * HOUR, ago=29 * MINUTE), True),
        (issued(life=2 * HOUR, ago=30 * MINUTE), False),
        (issued(generation=1, annotations=RENEW), False),
        (changed(issued(), generation=2), False),
        (WEB, False),
        (certificate(status={"recent_orders": (recent_order(age=MINUTE),)}), False),
        (certificate(status={**structs.asdict(issued().status), "recent_orders": (FAILED,)}), False),
    ],
    ids=[
        "a minute ago",
        "nearly an hour ago",
        "an hour ago",
        "by a clock a little ahead",
        "by a clock that was wrong",
        "at the end of time",
        "in a quarter of its life",
        "after a quarter of its life",
        "renew-now",
        "new spec",
        "never",
        "life unknown",
        "only a failure",
    ],
)
def test_two_issuances_are_apart(of: api.Certificate, *, held: bool) -> None:
    """Whatever makes a fresh certificate unwanted again costs one order per interval; a new request does not wait.

    Mutation: forget the quarter of a short life, hold a new spec up too, or wait for whatever time is written.
    """
    finding = hold(observed(of, secret=None))
    assert (finding is not None) == held
    if finding:
        assert finding.reason is Reason.BACKING_OFF
        assert "certctl renew -n shop web-tls" in finding.message
        assert finding.until
        assert NOW < finding.until <= NOW + HOUR + MINUTE


def test_the_interval_counts_from_the_last_issuance() -> None:
    """Of several issuances the last one counts.

    Mutation: take the first.
    """
    of = issued()
    both = (recent_order(age=DAY), *of.status.recent_orders)
    finding = hold(observed(structs.replace(of, status=structs.replace(of.status, recent_orders=both))))
    assert finding
    assert finding.until == NOW - MINUTE + HOUR


# --- what is said -----------------------------------------------------------------------------------------------------


def said(conditions_: tuple[api.Condition, ...], kind: str) -> tuple[str, str, str]:
    held = api.find_condition(conditions_, kind)
    assert held
    return held.status, held.reason, held.message


def test_ready_says_until_when_and_for_what() -> None:
    """Ready of a certificate that fits gives names, expiry and renewal; nothing is said of an issuance that is not.

    Mutation: leave one of them out, or write Issuing without a finding.
    """
    after = conditions(observed(), issuing=False, finding=None)
    assert said(after, "Ready") == (
        "True",
        Reason.READY,
        "Valid until 2027-02-17 09:00 UTC for shop.example.test; renews 2027-01-18 09:00 UTC",
    )
    assert [each.type for each in after] == ["Ready"]


@pytest.mark.parametrize(
    ("secret", "words"),
    [
        (
            tls_secret(life=160 * HOUR, age=80 * HOUR),
            "Valid until 2026-11-23 17:00 UTC for shop.example.test; renews 2026-11-20 09:00 UTC",
        ),
        (
            tls_secret(age=90 * DAY - MINUTE),
            "Valid until 2026-11-20 09:01 UTC for shop.example.test; renews 2026-10-21 09:01 UTC",
        ),
    ],
)
@pytest.mark.parametrize("reason", [Reason.CHALLENGE_FAILED, Reason.CA_UNAVAILABLE, Reason.RATE_LIMITED])
def test_a_failing_renewal_leaves_ready_alone(secret: api.SecretFacts, words: str, reason: Reason) -> None:
    """A certificate that is valid stays Ready=True to its last minute, whatever becomes of its renewal.

    Mutation: compute Ready from what is issued, or from need instead of unfit.
    """
    after = conditions(observed(secret=secret), issuing=False, finding=Finding(reason, "The CA is away."))
    assert said(after, "Ready") == ("True", Reason.READY, words)
    assert said(after, "Issuing") == ("False", reason, "The CA is away.")


@pytest.mark.parametrize("issuing", [True, False])
def test_what_is_not_ready_says_why_in_both(*, issuing: bool) -> None:
    """Without a usable certificate both conditions carry what holds it up, without any such the lack itself.

    Mutation: give Ready the lack where something else is waited for.
    """
    waiting = Finding(Reason.ORDER_PENDING, "Waiting for the CA")
    after = conditions(observed(secret=None), issuing=issuing, finding=waiting)
    assert said(after, "Ready") == ("False", Reason.ORDER_PENDING, "Waiting for the CA")
    assert said(after, "Issuing") == ("True" if issuing else "False", Reason.ORDER_PENDING, "Waiting for the CA")
    after = conditions(observed(secret=None), issuing=issuing, finding=None)
    assert said(after, "Ready") == ("False", Reason.SECRET_MISSING, "There is no Secret shop/web-tls yet")


@pytest.mark.parametrize("reason", [Reason.CHALLENGE_FAILED, Reason.SAME_NAMES, Reason.ISSUED])
def test_what_is_over_is_not_said_for_ever(reason: Reason) -> None:
    """Once nothing is wanted any more, Issuing no longer speaks of what went wrong, only of what was issued.

    Mutation: leave Issuing as it was.
    """
    of = certificate(status={"conditions": (condition("Issuing", "True", reason, "Said then."),)})
    after = said(conditions(observed(of), issuing=False, finding=None), "Issuing")
    if reason is Reason.ISSUED:
        assert after == ("True", Reason.ISSUED, "Said then.")
    else:
        assert after[:2] == ("False", Reason.READY)
    lasting = conditions(observed(of, secret=None), issuing=False, finding=None)
    assert said(lasting, "Issuing") == ("True", reason, "Said then.")


def test_a_transition_is_a_change_of_status() -> None:
    """The transition time stays while the status does, whatever the words, and moves to the second when it changes.

    Mutation: always write now, or never.
    """
    before = (condition("Ready", "True", Reason.READY), condition("Issuing", "False", Reason.ISSUED))
    of = certificate(generation=4, status={"conditions": before})
    now = NOW + timedelta(microseconds=5)
    same = conditions(observed(of, now=now), issuing=False, finding=Finding(Reason.RENEWING, "Due"))
    assert [each.last_transition_time for each in same] == [NOW - HOUR, NOW - HOUR]
    assert [each.observed_generation for each in same] == [4, 4]
    moved = conditions(observed(of, secret=None, now=now), issuing=True, finding=Finding(Reason.RENEWING, "Due"))
    assert [each.last_transition_time for each in moved] == [NOW, NOW]


def test_conditions_of_others_stay_in_their_place() -> None:
    """Writing one condition leaves the order and all others as they are.

    Mutation: append what was there.
    """
    before = (condition("Ready", "True", Reason.READY), condition("Audited", "True", Reason.READY))
    after = set_condition(before, "Ready", status=False, finding=Finding(Reason.EXPIRED, "x"), generation=2, now=NOW)
    assert [each.type for each in after] == ["Ready", "Audited"]
    assert after[1] is before[1]
    more = set_condition(after, "Issuing", status=True, finding=Finding(Reason.EXPIRED, "x"), generation=2, now=NOW)
    assert [each.type for each in more] == ["Ready", "Audited", "Issuing"]


def test_messages_are_cut_to_size() -> None:
    """The words of a CA never make a status too large.

    Mutation: write the message as it is.
    """
    finding = Finding(Reason.CA_REFUSED, "x" * 100_000)
    for held in conditions(observed(secret=None), issuing=False, finding=finding):
        assert len(held.message) == 1024


def test_times_in_messages_are_absolute() -> None:
    """A time is given to the minute, with its zone.

    Mutation: leave UTC out.
    """
    assert when(NOW) == "2026-11-20 09:00 UTC"


# --- what an order was placed for -------------------------------------------------------------------------------------

PAIR = certificate(names=("a.test", "b.test"))


def asked(seen: Observed, *, issuer_uid: str = "uid", account_uri: str = "https://ca.test/acct/1") -> str:
    return request_hash(seen, issuer_uid=issuer_uid, account_uri=account_uri)


def spec(**fields: Any) -> Observed:
    return observed(changed(PAIR, spec=fields))


ANOTHER_REQUEST = {
    "as it is": asked(observed(PAIR)),
    "a name more": asked(spec(dns_names=("a.test", "b.test", "c.test"))),
    "a name fewer": asked(spec(dns_names=("a.test",))),
    "common name": asked(spec(common_name="b.test")),
    "common name by the issuer": asked(observed(PAIR, issuer=issuer(common_name="First"))),
    "algorithm": asked(spec(private_key=api.PrivateKeySpec("RSA"))),
    "size": asked(spec(private_key=api.PrivateKeySpec("ECDSA", 384))),
    "encoding": asked(spec(private_key=api.PrivateKeySpec("ECDSA", encoding="PKCS8"))),
    "rotation": asked(spec(private_key=api.PrivateKeySpec("ECDSA", rotation_policy="Never"))),
    "profile": asked(spec(profile="shortlived")),
    "profile of the issuer": asked(observed(PAIR, issuer=issuer(profile="tlsserver"))),
    "issuer": asked(observed(PAIR), issuer_uid="of another"),
    "account": asked(observed(PAIR), account_uri="https://ca.test/acct/2"),
    "names that are none": asked(observed(PAIR, invalid=INVALID)),
}


@pytest.mark.parametrize(("one", "other"), list(combinations(ANOTHER_REQUEST, 2)))
def test_another_request_has_another_hash(one: str, other: str) -> None:
    """Whatever changes what the CA would be asked for changes the hash, each in its own way.

    Mutation: leave an input out.
    """
    assert ANOTHER_REQUEST[one] != ANOTHER_REQUEST[other]


@pytest.mark.parametrize(
    "seen",
    [
        spec(dns_names=("B.test", "a.test", "a.test.")),
        observed(PAIR, issuer=issuer(common_name="Never")),
        spec(secret_name="another"),
        spec(renew_before="1h"),
        spec(renew_before_percentage=10),
        spec(issuer_ref=api.IssuerRef("another")),
        observed(changed(PAIR, generation=9, uid="another", annotations=RENEW, name="another")),
        observed(PAIR, now=NOW + DAY, secret=None, rivals=(OTHER,)),
        observed(PAIR, issuer=issuer(ready="False", generation=5, email="a@example.test")),
        observed(PAIR, issuer=None),
    ],
)
def test_the_same_request_has_the_same_hash(seen: Observed) -> None:
    """What the CA is not asked about never ends an order under way: the rest of spec, metadata, status and issuer.

    Mutation: hash the whole spec, or the names in their order.
    """
    assert asked(seen) == ANOTHER_REQUEST["as it is"]


def test_the_profile_of_the_certificate_comes_first() -> None:
    """A Certificate's profile overrides its issuer's; without both the CA chooses.

    Mutation: swap the two.
    """
    assert profile(observed(certificate(profile="a"), issuer=issuer(profile="b"))) == "a"
    assert profile(observed(issuer=issuer(profile="b"))) == "b"
    assert profile(observed()) == ""
    assert profile(observed(issuer=None)) == ""


ACCOUNT = "https://ca.test/acct/1"


def test_order_sets_tell_orders_apart_as_cas_do() -> None:
    """Server, account, profile and names make an order the same at the CA, whoever asks for it and with what key.

    Mutation: leave one of the four out, or put the key in.
    """
    one = order_set(observed(PAIR), ACCOUNT)
    other = certificate("other", namespace="blog", names=("b.test", "A.test"), key=api.PrivateKeySpec("RSA"))
    assert order_set(observed(other), ACCOUNT) == one
    assert order_set(replace(observed(PAIR), now=NOW + DAY, secret=None), ACCOUNT) == one
    different = [
        order_set(observed(PAIR), "https://ca.test/acct/2"),
        order_set(spec(profile="shortlived"), ACCOUNT),
        order_set(spec(dns_names=("a.test",)), ACCOUNT),
        order_set(observed(PAIR, issuer=issuer(server="https://another.test/dir")), ACCOUNT),
    ]
    assert len({one, *different}) == 5
    by_issuer = order_set(observed(PAIR, issuer=issuer(profile="shortlived")), ACCOUNT)
    assert by_issuer == different[1]
