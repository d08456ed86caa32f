"""Which forward a backward of attention belongs to: what that one gathered is never gathered again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcompile.collectives import Group, Sequence
from spcompile.costs import parsed
from spcompile.errors import SpcompileError
from spcompile.reports.traffic import transfers
from spcompile.rules.base import Context
from spcompile.strategies import LINEAR, SOFTMAX
from tests.proof import capture, eager

B, T, H, D = 2, 13, 2, 4
linear = torch.ops.spcompile.linear_attention


def backward_of(q: Tensor, k: Tensor, v: Tensor, final: Tensor) -> Tensor:
    """dq of linear attention with v as the gradient of its output."""
    backward = torch.ops.spcompile.linear_attention_backward
    q, k, v = q.detach(), k.detach(), v.detach()
    return backward(v, None, q, k, v, None, None, None, final, True, 0.3)[0]


class Heads(nn.Module):
    """q, k and v of tokens [B, T, H * D]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D, dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind()


class SharedKeys(Heads):
    """Two attentions, softmax and linear each, with the same keys and values, as YOCO has them."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = super().forward(x)
        outs = [F.scaled_dot_product_attention(y, k, v, is_causal=True) for y in (q, q * 2)]
        outs += [linear(y, k, v, None, None, None, True, 0.3)[0] for y in (q, q * 2)]
        return torch.stack(outs).pow(2).mean()


class OnlyTheBackward(Heads):
    """A gradient as an input of a layer: its forward is in another graph."""

    def forward(self, x: Tensor, final: Tensor) -> Tensor:
        q, k, v = super().forward(x)
        return (q * backward_of(q, k, v, final)).mean()


class NotOfAForward(Heads):
    def forward(self, x: Tensor, final: Tensor) -> Tensor:
        q, k, v = super().forward(x)
        return (q * backward_of(q, k, v, final * 2)).mean()


def tokens() -> Tensor:
    return torch.randn(B, T, H * D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_two_attentions_with_the_same_keys(ranks: int) -> None:
    torch.manual_seed(0)
    model, inputs = SharedKeys(), {"x": tokens()}
    joint, want = capture(model, inputs), eager(model, inputs)
    assert want.error(*joint.run(ranks)) < 1e-9
    found = transfers(joint.shard(ranks)[0].graph, ranks)
    gathers = [(t.purpose.op, t.phase) for t in found if t.op == "all_gather" and t.purpose is not None]
    if ranks == 1:
        assert not gathers
        return
    assert gathers.count(("spcompile.softmax_attention.default", "forward")) <= 2
    assert not [op for op, phase in gathers if phase == "backward" and op.startswith("spcompile.softmax")]
    assert len([op for op, phase in gathers if op.startswith("spcompile.linear_attention")]) == 4


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_backward_without_its_forward(ranks: int) -> None:
    torch.manual_seed(0)
    model, inputs = OnlyTheBackward(), {"x": tokens(), "final": torch.zeros(B, H, D, D, dtype=torch.float64)}
    assert eager(model, inputs).error(*capture(model, inputs).run(ranks)) < 1e-9


def test_a_backward_of_no_forward_is_said() -> None:
    model, inputs = NotOfAForward(), {"x": tokens(), "final": torch.zeros(B, H, D, D, dtype=torch.float64)}
    with pytest.raises(SpcompileError, match=r"backward of an attention.*given mul.*none returned"):
        capture(model, inputs).shard(2)


def test_a_second_collective_is_an_error() -> None:
    """The forward ran on other tokens than the backward: what it gathered does not fit."""
    context, state = Context(Group(2, "simulated")), torch.zeros(1)
    ours, other = (Sequence(context.group, block, 2 * block) for block in (4, 5))
    context.leave("site", ours, state)
    assert context.left("site", ours, lambda: None) is state
    with pytest.raises(SpcompileError, match="the backward of site runs on"):
        context.left("site", other, lambda: state)
    assert context.left("site", None, lambda: None) is None  # whole operands: nothing is gathered


def test_each_row_of_a_strategy_is_all_there() -> None:
    """Its implementation loads, and all that it sends has a formula in the width of a number; options and
    reports read the rows, and costs what crosses in each direction."""
    for row in (*LINEAR.values(), *SOFTMAX.values()):
        assert row.load() and row.title
        crossing = (*row.forward, *row.backward)
        assert row.forward and row.backward and all(formulas for _, *formulas in row.sends.values())
        of_a_send = [formula for _, *formulas in row.sends.values() for formula in formulas]
        for formula in (*of_a_send, *(size for _, size in crossing)):
            assert "w" in {str(s) for s in parsed(formula).free_symbols}, formula
