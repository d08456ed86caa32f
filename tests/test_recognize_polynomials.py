"""Polynomials of the scores are recognized as linear attention on longer features; look-alikes are left."""

from __future__ import annotations

import math

import pytest
import torch
from recognition import B, D, H, T, future, qkv, see, spelling

from tests.proof import capture, eager

FOUND, LEFT = {}, {}
# What is written in place stays in the graph, dead, until autograd drops it.
IN_PLACE = {"based", "rebased"}


@spelling(FOUND, "causal")
def based(q, k, v):
    """fla's naive_parallel_based."""
    q = q * D**-0.5
    attn = q @ k.transpose(-2, -1)
    attn = 1 + attn + 1 / 2 * (attn**2)
    attn.masked_fill_(~torch.tril(torch.ones(T, T, dtype=torch.bool)), 0)
    return (attn @ v) / (attn.sum(-1)[..., None] + 1e-6)


@spelling(FOUND, "causal")
def based_scaled_scores(q, k, v):
    s = q @ k.mT / math.sqrt(D)
    w = (1 + s + s**2 / 2) * torch.ones(T, T, dtype=q.dtype).tril()
    return w @ v


@spelling(FOUND, "causal")
def based_einsum(q, k, v):
    s = torch.einsum("bhnd,bhmd->bhnm", q, k) * 0.3
    w = torch.where(future(), 0.0, s.square().mul(0.5).add(s).add(1))
    z = 1 / (w.sum(dim=-1) + 1e-3)
    return torch.einsum("bhnm,bhme,bhn->bhne", w, v, z)


@spelling(FOUND, "causal")
def rebased(q, k, v):
    gamma, beta = v[0, 0, 0], v[0, 0, 1]
    q, k = gamma * q + beta, k * gamma - beta
    attn = (q @ k.transpose(-2, -1)) ** 2
    attn.masked_fill_(~torch.tril(torch.ones(T, T, dtype=torch.bool)), 0)
    return (attn @ v) / (attn.sum(-1, keepdim=True) + 1e-6)


@spelling(FOUND, "causal")
def rebased_masked_inside(q, k, v):
    s = torch.tril(q @ k.mT)
    return (s * s) @ v


@spelling(FOUND, "causal")
def one_plus(q, k, v):
    return (1 + q @ k.mT).tril() @ v


@spelling(FOUND, "all")
def everyone(q, k, v):
    s = q @ k.mT / 4
    w = 1 + s + 0.5 * s * s
    return (w @ v) / w.sum(-1, keepdim=True)


@spelling(FOUND, "causal")
def completed_square(q, k, v):
    return ((2 - q @ k.mT) ** 2 - 1).tril() @ v


@spelling(FOUND, "causal with decay")
def with_decay(q, k, v):
    n = torch.arange(T, dtype=q.dtype)
    return ((q @ k.mT) ** 2 * torch.exp(-0.3 * (n[:, None] - n)).tril()) @ v


@pytest.mark.parametrize("name", FOUND)
def test_polynomials_are_found_and_equal(name: str) -> None:
    fn, (mask,) = FOUND[name]
    seen = see(fn, *qkv())
    assert seen.rewritten == [("linear", mask)], seen.sites
    assert seen.calls("linear_attention") == 1
    if name not in IN_PLACE:
        assert not any(seen.calls(op) for op in ("matmul", "einsum")), seen.graphs[0].code


class Wrapped(torch.nn.Module):
    """A function of three projections of the tokens, and a loss."""

    def __init__(self, fn) -> None:
        super().__init__()
        self.fn = fn
        self.project = torch.nn.Linear(H * D, 3 * H * D)

    def forward(self, x):
        q, k, v = self.project(x).view(B, -1, 3, H, D).permute(2, 0, 3, 1, 4)
        return (self.fn(q, k, v).transpose(1, 2).flatten(2) * x.cos()).sum()


@pytest.mark.parametrize("name", ["based", "rebased", "everyone", "with_decay"])
def test_polynomials_on_ranks(name: str) -> None:
    torch.manual_seed(0)
    model = Wrapped(FOUND[name][0]).double()
    inputs = {"x": torch.randn(B, T, H * D, dtype=torch.float64)}
    joint = capture(model, inputs)
    names = [str(n.target) for n in joint.module.graph.nodes]
    assert sum("linear_attention" in n for n in names) == 2 and not any("bmm" in n for n in names)
    for ranks in (1, 2, 3):
        assert eager(model, inputs).error(*joint.run(ranks, nan_padding=True)) < 1e-9


def left(fn):
    LEFT[fn.__name__] = fn
    return fn


@left
def cubes(q, k, v):
    return ((q @ k.mT) ** 3).tril() @ v


@left
def roots(q, k, v):
    return ((q @ k.mT).abs() ** 0.5).tril() @ v


@left
def two_scores(q, k, v):
    return ((q @ k.mT) * (k @ q.mT)).tril() @ v


@left
def masked_before_a_constant(q, k, v):
    s = (q @ k.mT).tril()
    return (1 + s + s**2 / 2) @ v


@left
def powers_of_weights(q, k, v):
    return ((q @ k.mT).softmax(-1) ** 2).tril() @ v


@left
def exponential(q, k, v):
    w = (q @ k.mT).exp().tril()
    return (w @ v) / w.sum(-1, keepdim=True)


@left
def squared_bias(q, k, v):
    return ((q @ k.mT + v[..., :1]) ** 2).tril() @ v


@pytest.mark.parametrize("name", LEFT)
def test_look_alikes_are_left(name: str) -> None:
    seen = see(LEFT[name], *qkv())
    assert not seen.calls("linear_attention"), seen.sites


def test_many_features_stay_scores() -> None:
    seen = see(rebased_masked_inside, *qkv(*[(B, H, T, 40)] * 3))
    assert not seen.calls("linear_attention")
    assert seen.reasons == ["the features of its polynomial are more than its tokens"]
