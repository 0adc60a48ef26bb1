"""When a certificate is renewed, and when a failed attempt is made again."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certbotk8s.domain.renewal import (
    CA_LADDER,
    LOOKS,
    NAME_LADDER,
    SELF_CHECK_LIMIT,
    SELF_CHECKS,
    STEP_LADDER,
    parse_duration,
    pause_after_failure,
    renewal_time,
    rung,
    shortest_interval,
)
from tests.builders import DAY, HOUR, MINUTE, NOW, certificate, facts

if TYPE_CHECKING:
    from certbotk8s.domain.api import CertificateFacts

SECOND = timedelta(seconds=1)
LIVES = st.integers(60, 400 * 86400).map(lambda seconds: seconds * SECOND)


# --- the time of renewal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("life", "left"),
    [
        (60 * SECOND, 30 * SECOND),
        (160 * HOUR, 80 * HOUR),
        (10 * DAY - SECOND, 5 * DAY),
        (10 * DAY, 80 * HOUR),
        (45 * DAY, 15 * DAY),
        (64 * DAY, 21 * DAY + 8 * HOUR),
        (90 * DAY, 30 * DAY),
        (199 * DAY, 66 * DAY + 8 * HOUR),
    ],
)
def test_default_follows_the_life(life: timedelta, left: timedelta) -> None:
    """Without a setting a third of the life is left at renewal, half of a life under ten days, whatever life it is.

    Mutation: take the third of a fixed 90 days, or half at ten days too.
    """
    held = facts(life=life)
    assert abs(renewal_time(certificate().spec, held) - (held.not_after - left)) < SECOND


@pytest.mark.parametrize(
    ("text", "life", "left"),
    [
        ("360h", 90 * DAY, 15 * DAY),
        ("1h30m", 90 * DAY, 90 * MINUTE),
        ("2159h59m59s", 90 * DAY, 90 * DAY - SECOND),
        ("30s", 60 * SECOND, 30 * SECOND),
        ("2160h", 90 * DAY, 30 * DAY),
        ("720h", 160 * HOUR, 80 * HOUR),
        ("360h", 60 * SECOND, 30 * SECOND),
        ("1e3h", 90 * DAY, 30 * DAY),
        ("soon", 90 * DAY, 30 * DAY),
    ],
)
def test_renew_before(text: str, life: timedelta, left: timedelta) -> None:
    """renewBefore holds while it is shorter than the real life; else, or unreadable, the default does.

    Mutation: compare with <=, so that a certificate is due the moment it arrives.
    """
    held = facts(life=life)
    assert renewal_time(certificate(renew_before=text).spec, held) == held.not_after - left


@pytest.mark.parametrize(
    ("percentage", "life", "left"),
    [(50, 90 * DAY, 45 * DAY), (1, 100 * DAY, DAY), (99, 100 * DAY, 99 * DAY), (25, 60 * SECOND, 15 * SECOND)],
)
def test_renew_before_percentage(percentage: int, life: timedelta, left: timedelta) -> None:
    """The percentage is of the real life, and means what is left.

    Mutation: reckon it from the beginning of the life.
    """
    held = facts(life=life)
    assert renewal_time(certificate(renew_before_percentage=percentage).spec, held) == held.not_after - left


@given(LIVES, st.sampled_from(["", "1h", "360h", "9999h", "junk"]), st.integers(0, 99))
def test_renewal_lies_within_the_life(life: timedelta, before: str, percentage: int) -> None:
    """Whatever is set, renewal is due after the certificate came and not after it ends, on a whole second.

    Mutation: let a renewBefore of the whole life through, or keep microseconds.
    """
    held = facts(life=life)
    due = renewal_time(certificate(renew_before=before, renew_before_percentage=percentage).spec, held)
    assert held.not_before <= due <= held.not_after
    assert percentage == 99 or held.not_before < due
    assert due.microsecond == 0


@given(LIVES)
def test_a_fresh_certificate_is_not_due_within_the_shortest_interval(life: timedelta) -> None:
    """By default a new certificate is not due before the next order may be placed: no renewal runs into that limit.

    Mutation: make the shortest interval half the life.
    """
    held = facts(life=life, age=timedelta())
    assert renewal_time(certificate().spec, held) + SECOND > NOW + shortest_interval(life)


@pytest.mark.parametrize(
    ("life", "interval"),
    [(60 * SECOND, 15 * SECOND), (2 * HOUR, 30 * MINUTE), (4 * HOUR, HOUR), (160 * HOUR, HOUR), (90 * DAY, HOUR)],
)
def test_shortest_interval(life: timedelta, interval: timedelta) -> None:
    """Between two issuances lies an hour, a quarter of the life where that is shorter.

    Mutation: max for min.
    """
    assert shortest_interval(life) == interval


# --- durations --------------------------------------------------------------------------------------------------------


def go_duration(whole: timedelta) -> str:
    """As Go writes it: `1h30m0s`."""
    minutes, seconds = divmod(int(whole.total_seconds()), 60)
    return f"{minutes // 60}h{minutes % 60}m{seconds}s"


@given(st.integers(0, 9 * 10**8).map(lambda seconds: seconds * SECOND))
def test_durations_of_go_are_read(whole: timedelta) -> None:
    """What Go writes for a duration is read as that duration.

    Mutation: mistake m for ms, or sum up one unit only.
    """
    assert parse_duration(go_duration(whole)) == whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("360h", 360 * HOUR),
        ("1.5h", 90 * MINUTE),
        ("90m", 90 * MINUTE),
        ("1h30m", 90 * MINUTE),
        ("500ms", 0.5 * SECOND),
        ("1m1ms", 60.001 * SECOND),
        ("0s", timedelta()),
        ("999999h59m59s", 999999 * HOUR + 59 * MINUTE + 59 * SECOND),
    ],
)
def test_duration_as_people_write_it(text: str, expected: timedelta) -> None:
    """Hours, minutes, seconds and milliseconds, whole or not, in one number or several.

    Mutation: refuse fractions.
    """
    assert parse_duration(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h",
        "360",
        "360 h",
        " 1h",
        "1h\n",
        "1d",
        "-1h",
        "+1h",
        "1e3h",
        "1h-30m",
        "1..5h",
        "1,5h",
        "1H",
        "\N{ARABIC-INDIC DIGIT THREE}h",
        "9999999999h",
        "9" * 400 + "h",
        "999999999h" * 40,
    ],
)
def test_what_is_no_duration_is_a_value_error(text: str) -> None:
    """Anything else is refused with a short sentence, numbers beyond any life too.

    Mutation: look for a duration somewhere in the text, use \\d, or leave the number of digits open.
    """
    with pytest.raises(ValueError, match="is no duration such as 360h or 1h30m") as caught:
        parse_duration(text)
    assert len(str(caught.value)) < 120


@given(st.text(alphabet="0123456789.hms -+e", max_size=40))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    """No text does anything else, and what is read is a number with a unit, and so on.

    Mutation: remove the bounds, so that a sum overflows.
    """
    try:
        found = parse_duration(text)
    except ValueError:
        return
    assert re.fullmatch(r"([0-9]+(\.[0-9]+)?(h|m|s|ms))+", text)
    assert found >= timedelta()


# --- pauses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ladder", [NAME_LADDER, CA_LADDER, STEP_LADDER, LOOKS, SELF_CHECKS])
def test_ladders_rise(ladder: tuple[timedelta, ...]) -> None:
    """Pauses never shrink from one failure, or look, to the next.

    Mutation: swap two rungs.
    """
    assert list(ladder) == sorted(ladder)
    assert ladder[0] > timedelta()


def test_ladders_keep_to_the_ration() -> None:
    """Three failed validations at most in an hour after the first, of the five that a CA allows; a CA that is away is
    asked every ten minutes at most, a challenge looked at often enough that the wait for it has several looks.

    Mutation: start NAME_LADDER with seconds, end CA_LADDER with a minute, or wait a minute for a challenge.
    """
    within_an_hour, passed = 1, timedelta()
    for failures in range(1, 20):
        passed += rung(NAME_LADDER, failures)
        within_an_hour += passed <= HOUR
    assert within_an_hour == 3
    assert rung(NAME_LADDER, 50) == DAY
    assert rung(CA_LADDER, 50) == 10 * MINUTE
    assert sum(SELF_CHECKS, timedelta()) + MINUTE < SELF_CHECK_LIMIT


@pytest.mark.parametrize(
    ("failures", "by_name", "by_ca"),
    [
        (0, MINUTE, MINUTE),
        (1, MINUTE, MINUTE),
        (2, 10 * MINUTE, 2 * MINUTE),
        (3, 100 * MINUTE, 5 * MINUTE),
        (4, DAY, 10 * MINUTE),
        (1000, DAY, 10 * MINUTE),
    ],
)
@pytest.mark.parametrize("held", [None, facts(life=DAY, age=DAY), facts(life=DAY, age=90 * DAY)])
def test_nothing_to_save_climbs_the_ladder(
    failures: int, by_name: timedelta, by_ca: timedelta, held: CertificateFacts | None
) -> None:
    """Without a valid certificate the ladder alone decides: of the name's for what the name did, else of the CA's.

    Mutation: begin with the second rung, swap the ladders, or reckon with an expired certificate.
    """
    assert pause_after_failure(failures, ca_side=False, certificate=held, now=NOW) == by_name
    assert pause_after_failure(failures, ca_side=True, certificate=held, now=NOW) == by_ca


@pytest.mark.parametrize(
    ("life", "left", "pause"),
    [
        (90 * DAY, 30 * DAY, DAY),
        (90 * DAY, 5 * DAY, 12 * HOUR),
        (90 * DAY, HOUR, 6 * MINUTE),
        (90 * DAY, MINUTE, MINUTE),
        (160 * HOUR, 80 * HOUR, 8 * HOUR),
        (DAY, 12 * HOUR, 72 * MINUTE),
        (HOUR, 30 * MINUTE, 3 * MINUTE),
        (HOUR, MINUTE, MINUTE),
        (60 * SECOND, 30 * SECOND, 3 * SECOND),
        (60 * SECOND, 2 * SECOND, SECOND),
    ],
)
def test_a_pause_leaves_room_for_ten_attempts(life: timedelta, left: timedelta, pause: timedelta) -> None:
    """The longest pause is a tenth of what is left; not under a minute, nor under a sixtieth of a life under an hour.

    Mutation: drop the cap, or either floor.
    """
    held = facts(life=life, age=life - left)
    assert pause_after_failure(9, ca_side=False, certificate=held, now=NOW) == pause


@given(LIVES, st.booleans(), st.floats(1, 2))
def test_ten_attempts_before_expiry(life: timedelta, ca_side: bool, late: float) -> None:
    """With a third of the life left, as by default, or half of that, ten attempts fit before the certificate ends.

    Mutation: cap by half of what is left, or raise the floor to a tenth of the life.
    """
    left = life / 6 * late
    held = facts(life=life, age=life - left)
    now, attempts = NOW, 0
    while now < held.not_after and attempts < 10:
        attempts += 1
        now += pause_after_failure(attempts, ca_side=ca_side, certificate=held, now=now)
    assert attempts == 10


@given(LIVES, st.integers(0, 1000), st.integers(1, 12), st.booleans())
def test_pauses_are_bounded(life: timedelta, permille: int, failures: int, ca_side: bool) -> None:
    """A pause is positive, never over its rung, not shorter after more failures, and not longer with less time left.

    Mutation: let the floor exceed the first rung, or reckon with what has passed instead of what is left.
    """

    def pause(failures: int, left: timedelta) -> timedelta:
        held = facts(life=life, age=life - left)
        return pause_after_failure(failures, ca_side=ca_side, certificate=held, now=NOW)

    left = life * permille / 1000 + SECOND
    found = pause(failures, left)
    assert timedelta() < found <= rung(CA_LADDER if ca_side else NAME_LADDER, failures)
    assert found <= pause(failures + 1, left)
    assert pause(failures, left / 2 + SECOND / 2) <= found
