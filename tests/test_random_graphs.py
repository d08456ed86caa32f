"""Graphs put together at random are right on any ranks; each that was not is a test of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import random_graphs
from tests.random_graphs import Case, Program, drawn, error_of, shrunk
from tests.random_operations import OPERATIONS, VOCAB, Given, Operation, Step

CHOICE = st.integers(0, 11)
STEPS = st.builds(Step, st.sampled_from(list(OPERATIONS)), st.integers(0, 3), *[CHOICE] * 4)
CASES = st.builds(
    Case,
    st.lists(STEPS, min_size=4, max_size=12).map(tuple),
    st.integers(1, 3),
    st.sampled_from((5, 8, 12, 13, 16)),
    st.integers(2, 4),
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(CASES)
def test_put_together_at_random(case: Case) -> None:
    assert error_of(case) <= random_graphs.EXACT


def test_every_operation_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first hundred of cases, and often enough."""
    done = dict.fromkeys(OPERATIONS, 0)

    def counted(name: str, function: Operation) -> Operation:
        def count(*given: Given | torch.Tensor | Step) -> torch.Tensor | None:
            out = function(*given)
            done[name] += out is not None
            return out

        return count

    monkeypatch.setattr(random_graphs, "OPERATIONS", {n: counted(n, f) for n, f in OPERATIONS.items()})
    for seed in range(100):
        case = drawn(seed)
        loss = Program(case.steps)(torch.arange(case.batch * case.length).view(case.batch, -1) % VOCAB)
        assert loss.dim() == 0 and loss.requires_grad
    assert min(done.values()) >= 5, done


def test_what_is_wrong_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the steps without which it would be right."""
    wrong = {"flip", "shift"}

    def verdict(case: Case) -> str:
        return "wrong by 1" if wrong <= {s.name for s in case.steps} else ""

    case = next(c for c in map(drawn, range(1000)) if verdict(c))
    assert {s.name for s in shrunk(case, verdict).steps} == wrong
    assert len(shrunk(case, verdict).steps) == 2
