"""Nothing is issued twice: 2,000 stories of `tests.model.machine`, the same in each run."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from certbotk8s.domain.issuance import Outcome, State, advance
from certbotk8s.reconcile import certificate
from tests.model.machine import ACTS, Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

# One example is some 20 acts of the world or of a leader, and then rest.
STEPS = 20
TOLD = settings(
    deadline=None,
    database=None,
    print_blob=True,
    report_multiple_bugs=False,
    stateful_step_count=STEPS,
    # A busy machine is no reason to fail.
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Counter[str]]:
    """How often each act befell a controller, and each move was made; printed in the end."""
    caplog.set_level(logging.CRITICAL, "certbotk8s")
    counts = Machine.reached
    counts.clear()

    def counting(state: State, outcome: Outcome) -> State:
        counts[f"{state or 'none'}: {outcome}"] += 1
        counts[f"state {state or 'none'}"] += 1
        return advance(state, outcome)

    monkeypatch.setattr(certificate, "advance", counting)
    yield counts
    for what, times in sorted(counts.items()):
        print(f"{times:8} {what}")


@pytest.mark.timeout(2400)
def test_nothing_is_issued_twice(reached: Counter[str]) -> None:
    """Whatever befalls up to two leaders at any point, and all comes to rest; the stories reach every act and state.

    Mutation: after a restart read a stored Finalizing as if nothing had been ordered yet.
    """
    run_state_machine_as_test(Machine, settings=settings(TOLD, max_examples=2000, derandomize=True))
    assert set(ACTS) - reached.keys() == set()
    assert {f"state {state or 'none'}" for state in State} - reached.keys() == set()
