"""Graphs put together at random are right on any ranks; each that was not is a test of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests import random_graphs
from tests.proof import capture, eager
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


FOUND = {
    "linear attention of fewer queries than keys": Case(
        (
            Step("attention", 2, 3, 8, 2, 5),
            Step("unsqueeze", 0, 9, 11, 1, 8),
            Step("transpose", 0, 1, 3, 8, 5),
            Step("repeat", 0, 0, 7, 3, 1),
            Step("attention", 1, 2, 8, 3, 0),
        ),
        batch=1,
        length=13,
        ranks=3,
    ),
    "an empty slice of the sequence": Case(
        (
            Step("written", 0, 1, 6, 2, 4),
            Step("along", 2, 3, 2, 6, 10),
            Step("attention", 2, 2, 10, 11, 6),
            Step("shift", 2, 3, 7, 3, 2),
        ),
        batch=2,
        length=8,
        ranks=4,
    ),
}
"""What has been wrong, shrunk."""


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_found_at_random(case: Case) -> None:
    assert error_of(case) <= random_graphs.EXACT


class Latents(nn.Module):
    """Linear attention from learned latents to the tokens, and back (Perceiver)."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        self.embedding, self.back = nn.Embedding(VOCAB, 6, dtype=torch.float64), back
        self.latents = nn.Parameter(torch.randn(1, 4, 6, dtype=torch.float64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss."""
        x = self.embedding(ids)
        latents = self.latents.expand(len(ids), -1, -1)
        q, k = (x, latents) if self.back else (latents, x)
        q, k, v = (x.unsqueeze(1) for x in (q.softmax(-1), k.exp(), k * k.cos()))
        out, state = torch.ops.spcompile.linear_attention(q, k, v, None, None, None, False, 1.0)
        return out.sin().square().mean() + state.cos().square().mean()


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_linear_attention_to_other_tokens_gathers_none(back: bool, ranks: int) -> None:
    """Only terms of what has the latents' size cross the ranks."""
    torch.manual_seed(0)
    model, inputs = Latents(back), {"ids": torch.randint(VOCAB, (2, 13))}
    joint = capture(model, inputs)
    assert eager(model, inputs).error(*joint.run(ranks, nan_padding=True)) <= random_graphs.EXACT
    assert not joint.shard(ranks)[1].gathers


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
