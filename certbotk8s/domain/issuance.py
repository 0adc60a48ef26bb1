"""The states of an issuance, and every move between them.

Rule 1: what may follow what stands in `MOVES` and nowhere else. An outcome that the table does not list for a state is
a programming error and raises; nothing is changed then. The state diagram in docs/ is drawn from this table.

Rule 2: the CA's order is the truth about how far an issuance is, so that every state in which there is an order accepts
every order status. That is why a restart needs no memory: the first step with an order URL is to fetch the order.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """How far an issuance is. The value is what stands in `status.issuance.state`."""

    NONE = ""  # nothing under way
    REQUESTED = "Requested"  # the next key pair is stored; that Secret is the record
    ORDERED = "Ordered"  # the order's URL is in status
    PRESENTED = "Presented"  # every challenge is presented
    SUBMITTED = "Submitted"  # the CA was told to validate
    AUTHORIZED = "Authorized"  # the order is ready to be finalized
    FINALIZING = "Finalizing"  # finalize was, or may have been, sent
    ISSUED = "Issued"  # the tls Secret is written
    FAILED = "Failed"  # the attempt is over


class Outcome(StrEnum):
    """What a step found or did."""

    KEY_STORED = "key stored"
    ORDER_PENDING = "order pending"
    ORDER_READY = "order ready"
    ORDER_PROCESSING = "order processing"
    ORDER_VALID = "order valid"
    ORDER_INVALID = "order invalid"
    ORDER_GONE = "order gone"
    ORDER_TAKEN = "order finalized by another"
    PRESENTED = "challenges presented"
    SUBMITTED = "challenges submitted"
    FINALIZED = "finalize sent"
    STORED = "certificate stored"
    REFUSED = "refused"
    REQUEST_CHANGED = "request changed"
    CLEANED_UP = "cleaned up"


_OVER = {Outcome.ORDER_INVALID: State.FAILED, Outcome.REFUSED: State.FAILED}
# Before finalize a lost order, or one that is no longer wanted, costs nothing; after it, its loss is a failure
# (REFUSED).
_BEFORE_FINALIZE = {**_OVER, Outcome.ORDER_GONE: State.NONE, Outcome.REQUEST_CHANGED: State.NONE}
_FORWARD = {
    Outcome.ORDER_READY: State.AUTHORIZED,
    Outcome.ORDER_PROCESSING: State.FINALIZING,
    Outcome.ORDER_VALID: State.FINALIZING,
}

MOVES: dict[State, dict[Outcome, State]] = {
    State.NONE: {Outcome.KEY_STORED: State.REQUESTED, Outcome.REFUSED: State.FAILED},
    State.REQUESTED: {**_BEFORE_FINALIZE, **_FORWARD, Outcome.ORDER_PENDING: State.ORDERED},
    State.ORDERED: {
        **_BEFORE_FINALIZE,
        **_FORWARD,
        Outcome.ORDER_PENDING: State.ORDERED,
        Outcome.PRESENTED: State.PRESENTED,
    },
    State.PRESENTED: {
        **_BEFORE_FINALIZE,
        **_FORWARD,
        Outcome.ORDER_PENDING: State.PRESENTED,
        Outcome.SUBMITTED: State.SUBMITTED,
    },
    # Pending: the CA has not heard an answer, or has lost it.
    State.SUBMITTED: {**_BEFORE_FINALIZE, **_FORWARD, Outcome.ORDER_PENDING: State.PRESENTED},
    State.AUTHORIZED: {
        **_BEFORE_FINALIZE,
        **_FORWARD,
        Outcome.ORDER_PENDING: State.ORDERED,
        Outcome.FINALIZED: State.FINALIZING,
    },
    State.FINALIZING: {
        **_OVER,
        # A finalize that never arrived, or was refused as too early, leaves the order ready: it is sent again.
        Outcome.ORDER_READY: State.AUTHORIZED,
        Outcome.ORDER_PENDING: State.ORDERED,
        Outcome.ORDER_PROCESSING: State.FINALIZING,
        Outcome.ORDER_VALID: State.FINALIZING,
        Outcome.STORED: State.ISSUED,
        # The certificate that came is not what the spec asks for by now, or for a key that is not ours (two
        # Certificates had one order): discarded, no failure.
        Outcome.REQUEST_CHANGED: State.NONE,
        Outcome.ORDER_TAKEN: State.NONE,
    },
    State.ISSUED: {Outcome.CLEANED_UP: State.NONE},
    State.FAILED: {Outcome.CLEANED_UP: State.NONE},
}

# RFC 8555 section 7.1.6. A status that no RFC knows is waited out like `processing`; the order's `expires` bounds it.
ORDER_OUTCOMES = {
    "pending": Outcome.ORDER_PENDING,
    "ready": Outcome.ORDER_READY,
    "processing": Outcome.ORDER_PROCESSING,
    "valid": Outcome.ORDER_VALID,
    "invalid": Outcome.ORDER_INVALID,
}


class IllegalMove(Exception):
    """An outcome that cannot happen in that state: a defect of this program."""


def advance(state: State, outcome: Outcome) -> State:
    """The state after `outcome` in `state`; raises IllegalMove when the table has none."""
    try:
        return MOVES[state][outcome]
    except KeyError:
        raise IllegalMove(f"{outcome} in state {state or 'none'}") from None


def order_outcome(status: str) -> Outcome:
    """The outcome that an order's status stands for."""
    return ORDER_OUTCOMES.get(status, Outcome.ORDER_PROCESSING)
