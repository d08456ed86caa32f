"""Linear attention that is not causal, as libraries write it: normalised, or by a softmax over tokens."""

from __future__ import annotations

import pytest
import torch
from recognition import B, D, H, T, qkv, see, spelling
from torch import nn

from tests.proof import capture, eager

FOUND = {}


@spelling(FOUND, 1)
def softmax_over_the_tokens(q, k, v):
    """linear_attention_transformer's linear_attn."""
    q, k = q.softmax(dim=-1), k.softmax(dim=-2)
    q = q * D**-0.5
    context = torch.einsum("bhnd,bhne->bhde", k, v)
    return torch.einsum("bhnd,bhde->bhne", q, context).reshape(*q.shape)


@spelling(FOUND, 1)
def performer(q, k, v):
    """performer_pytorch's linear_attention."""
    q, k = q.exp(), k.exp()
    z = 1.0 / torch.einsum("...nd,...d->...n", q, k.sum(dim=-2).type_as(q))
    context = torch.einsum("...nd,...ne->...de", k, v)
    return torch.einsum("...de,...nd,...n->...ne", context, q, z)


@spelling(FOUND, 1)
def efficient_attention(q, k, v):
    """Shen et al.: channels before tokens."""
    q, k, v = (x.mT for x in (q, k, v))
    context = k.softmax(dim=3) @ v.transpose(2, 3)
    return (context.transpose(2, 3) @ q.softmax(dim=2)).mT


@spelling(FOUND, 1)
def transnormer(q, k, v):
    """elu + 1, and the sum of keys kept as a dim of one."""
    q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
    kv = torch.matmul(k.transpose(-2, -1), v)
    z = torch.matmul(q, k.sum(dim=-2, keepdim=True).transpose(-2, -1)) + 1e-6
    return torch.matmul(q, kv) / z


@pytest.mark.parametrize("name", FOUND)
def test_found_and_equal(name: str) -> None:
    fn, (calls,) = FOUND[name]
    seen = see(fn, *qkv())
    assert seen.rewritten == [("linear", "all")] and seen.calls("linear_attention") == calls, seen.sites
    assert not any(seen.calls(op) for op in ("matmul", "einsum")), seen.graphs[0].code


class Wrapped(nn.Module):
    def __init__(self, fn) -> None:
        super().__init__()
        self.fn, self.project = fn, nn.Linear(H * D, 3 * H * D)

    def forward(self, x):
        q, k, v = (y.view(B, -1, H, D).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        return (self.fn(q, k, v).transpose(1, 2).flatten(2) * x.cos()).sum()


@pytest.mark.parametrize("name", FOUND)
def test_on_ranks(name: str) -> None:
    torch.manual_seed(0)
    model = Wrapped(FOUND[name][0]).double()
    inputs = {"x": torch.randn(B, T, H * D, dtype=torch.float64)}
    joint = capture(model, inputs)
    assert [s.rewritten for s in joint.sites] == [True]
    for ranks in (1, 2, 3):
        assert eager(model, inputs).error(*joint.run(ranks, nan_padding=True)) < 1e-9
