"""Nothing is issued twice: stories of `tests.model.machine`."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from certbotk8s.domain.issuance import Outcome, State, advance
from certbotk8s.reconcile import certificate
from tests.model.machine import ACTS, Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

# One example is some 20 acts of the world or of a leader, and then rest.
STEPS = 20
TOLD = settings(
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
        return advance(state, outcome)

    monkeypatch.setattr(certificate, "advance", counting)
    yield counts
    for what, times in sorted(counts.items()):
        print(f"{times:8} {what}")


@pytest.mark.timeout(1200)
def test_nothing_is_issued_twice(reached: Counter[str]) -> None:
    """Whatever befalls up to two leaders at any point, and all comes to rest: 2,000 stories, the same in each run.

    Mutation: after a restart read a stored Finalizing as if nothing had been ordered yet.
    """
    run_state_machine_as_test(Machine, settings=settings(TOLD, max_examples=2000, derandomize=True))
    assert set(ACTS) - reached.keys() == set()


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_nothing_is_issued_twice_in_20_000_stories(reached: Counter[str], request: pytest.FixtureRequest) -> None:
    """More of them, by a fixed seed; `--hypothesis-seed=N` tells others. The moves that they made are printed.

    What fails is told by its journal: `phases` is without the shrinking, which takes longer than to read it.

    Mutation: delete a discarded next key in whatever version it is.
    """
    chosen = request.config.getoption("--hypothesis-seed") is not None
    told = settings(TOLD, max_examples=20_000, derandomize=not chosen, phases=[Phase.generate])
    run_state_machine_as_test(Machine, settings=told)
    assert set(ACTS) - reached.keys() == set()
