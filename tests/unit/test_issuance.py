"""The table of an issuance's states: what may follow what."""

from __future__ import annotations

from itertools import product

import pytest

from certbotk8s.domain.issuance import MOVES, ORDER_OUTCOMES, IllegalMove, Outcome, State, advance, order_outcome

WITH_ORDER = [State.ORDERED, State.PRESENTED, State.SUBMITTED, State.AUTHORIZED, State.FINALIZING]
STATUSES = ["pending", "ready", "processing", "valid", "invalid"]  # RFC 8555 section 7.1.6
# A new order is placed out of Requested alone, and a new key stored, for one, out of none.
STARTS = {State.NONE, State.REQUESTED}

LISTED = [(state, outcome) for state, moves in MOVES.items() for outcome in moves]
UNLISTED = sorted(set(product(State, Outcome)) - set(LISTED))


def reachable(start: State, *, without: frozenset[Outcome] = frozenset()) -> set[State]:
    """The states that some way from `start` leads to, itself among them."""
    found, edge = {start}, [start]
    while edge:
        new = {to for outcome, to in MOVES[edge.pop()].items() if outcome not in without} - found
        found |= new
        edge += new
    return found


@pytest.mark.parametrize("status", [*STATUSES, "revoked", "", "Valid"])
@pytest.mark.parametrize("state", [State.REQUESTED, *WITH_ORDER])
def test_every_state_with_an_order_takes_every_status(state: State, status: str) -> None:
    """Whatever the CA says of an order, its state goes on: an unknown status is waited out.

    Mutation: remove any order outcome from any of these states.
    """
    assert advance(state, order_outcome(status)) in State


@pytest.mark.parametrize("state", [State.REQUESTED, *WITH_ORDER])
def test_the_order_tells_how_far_it_is(state: State) -> None:
    """One status leads to one stage, whatever was believed before: the CA's order is the truth.

    Mutation: let Submitted stay where it is when the order is ready.
    """
    after = {status: advance(state, order_outcome(status)) for status in STATUSES}
    assert after["ready"] is State.AUTHORIZED
    assert after["processing"] is after["valid"] is State.FINALIZING
    assert after["invalid"] is State.FAILED
    assert after["pending"] in {State.ORDERED, State.PRESENTED, State.SUBMITTED}


def test_statuses_are_those_of_the_rfc() -> None:
    """Every status of RFC 8555 has an outcome of its own; any other counts as processing.

    Mutation: remove a row, or give two rows one outcome.
    """
    assert sorted(ORDER_OUTCOMES) == sorted(STATUSES)
    assert len(set(ORDER_OUTCOMES.values())) == len(STATUSES)
    assert order_outcome("new in 2030") is Outcome.ORDER_PROCESSING


@pytest.mark.parametrize(("state", "outcome"), UNLISTED)
def test_what_is_not_listed_raises(state: State, outcome: Outcome) -> None:
    """An outcome that a state does not list is a defect that says itself, not a silent move.

    Mutation: return the same state for an unknown outcome.
    """
    with pytest.raises(IllegalMove, match=str(outcome)) as caught:
        advance(state, outcome)
    assert str(state or "none") in str(caught.value)


@pytest.mark.parametrize(("state", "outcome"), LISTED)
def test_what_is_listed_moves(state: State, outcome: Outcome) -> None:
    """Every row leads to a state of the table.

    Mutation: misspell a state.
    """
    assert advance(state, outcome) is MOVES[state][outcome]
    assert advance(state, outcome) in MOVES


def test_every_state_and_outcome_is_in_the_table() -> None:
    """No state is forgotten, and no outcome is declared that nothing takes.

    Mutation: add an outcome that no state lists.
    """
    assert set(MOVES) == set(State)
    assert {outcome for _, outcome in LISTED} == set(Outcome)


@pytest.mark.parametrize("state", list(State))
def test_every_state_is_on_a_way_from_rest_to_rest(state: State) -> None:
    """Each state is reached from none, and none from each: nothing is out of use, nothing gets stuck.

    Mutation: remove the row that leads to a state, or the one that leads out of it.
    """
    assert state in reachable(State.NONE)
    assert State.NONE in reachable(state)


@pytest.mark.parametrize("state", WITH_ORDER)
def test_no_order_is_placed_beside_another(state: State) -> None:
    """Once there is an order, a new one is placed only when that one is over, lost, or for something else by now.

    Mutation: lead a failed step, or Finalizing with an order that is ready, back to Requested.
    """
    over = frozenset({Outcome.ORDER_GONE, Outcome.ORDER_TAKEN, Outcome.REQUEST_CHANGED, Outcome.CLEANED_UP})
    assert not reachable(state, without=over) & STARTS


def test_finalizing_never_starts_again_by_itself() -> None:
    """From Finalizing no single outcome leads to where an order is placed but a changed spec, or another's certificate.

    Mutation: lead REFUSED from Finalizing to none.
    """
    back = {outcome for outcome, to in MOVES[State.FINALIZING].items() if to in STARTS}
    assert back == {Outcome.REQUEST_CHANGED, Outcome.ORDER_TAKEN}


def test_only_a_stored_certificate_is_a_success() -> None:
    """Issued is reached by a certificate that was stored out of Finalizing, and by nothing else.

    Mutation: lead a valid order to Issued.
    """
    ways = [(state, outcome) for state, outcome in LISTED if MOVES[state][outcome] is State.ISSUED]
    assert ways == [(State.FINALIZING, Outcome.STORED)]


@pytest.mark.parametrize("state", [State.NONE, State.REQUESTED, *WITH_ORDER])
def test_a_refusal_fails_the_attempt(state: State) -> None:
    """A permanent error ends the attempt in every state, so that it is recorded and cleaned up.

    Mutation: lead a refusal to none.
    """
    assert advance(state, Outcome.REFUSED) is State.FAILED


@pytest.mark.parametrize("state", [State.REQUESTED, *WITH_ORDER])
def test_a_changed_request_is_no_failure(state: State) -> None:
    """A spec that asks for something else gives the order up without counting a failure.

    Mutation: lead it to Failed.
    """
    assert advance(state, Outcome.REQUEST_CHANGED) is State.NONE


def test_values_are_what_status_holds() -> None:
    """A state is found again from what status holds, none from its absence.

    Mutation: rename the value of a state, which an upgrade would not find again.
    """
    assert [State(word) for word in ("", "Requested", "Ordered", "Presented", "Submitted")] == list(State)[:5]
    assert [State(word) for word in ("Authorized", "Finalizing", "Issued", "Failed")] == list(State)[5:]
