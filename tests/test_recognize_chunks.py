"""Chunked linear attention by sums of k^T v is recognized; look-alikes are left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recognition import B, D, H, qkv, see, spelling
from torch import Tensor

from tests.proof import capture, eager

FOUND, LEFT = {}, {}
N, C = 3, 4
SHAPES = [(B, N * C, H, D)] * 3


def cut(x: Tensor) -> Tensor:
    return x.reshape(B, N, C, H, D).permute(0, 3, 1, 2, 4)


def joined(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1, 4).reshape(B, N * C, H, D)


@spelling(FOUND, 1)
def fla(q, k, v):
    """fla's naive_chunk_linear_attn."""
    q, k, v = cut(q) * D**-0.5, cut(k), cut(v)
    kv = k.transpose(-1, -2) @ v
    kv = kv.cumsum(2)
    kv = torch.cat([torch.zeros_like(kv[:, :, :1]), kv[:, :, :-1]], dim=2)
    inter = q @ kv
    mask = torch.triu(torch.ones(C, C, dtype=bool), diagonal=1)
    intra = ((q @ k.transpose(-1, -2)).masked_fill_(mask, 0)) @ v
    return joined(inter + intra)


@spelling(FOUND, 1)
def padded_and_cut(q, k, v):
    q, k, v = cut(q), cut(k), cut(v)
    state = torch.einsum("bhncd,bhnce->bhnde", k, v).cumsum(2)
    state = F.pad(state, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    inter = torch.einsum("bhncd,bhnde->bhnce", q, state)
    intra = torch.einsum("bhncd,bhnsd->bhncs", q, k).tril()
    return joined(torch.einsum("bhncs,bhnse->bhnce", intra, v) + inter)


@spelling(FOUND, 1)
def cut_and_padded(q, k, v):
    q, k, v = cut(q), cut(k), cut(v)
    state = F.pad((k.mT @ v).cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    return joined((q @ k.mT * torch.ones(C, C, dtype=q.dtype).tril()) @ v + q @ state)


@spelling(FOUND, 1)
def less_itself(q, k, v):
    q, k, v = cut(q), cut(k), cut(v)
    kv = k.mT @ v
    return joined(q @ (kv.cumsum(2) - kv) + torch.tril(q @ k.mT) @ v)


@pytest.mark.parametrize("name", FOUND)
def test_chunks_are_found_and_equal(name: str) -> None:
    fn, (calls,) = FOUND[name]
    seen = see(fn, *qkv(*SHAPES))
    assert seen.rewritten == [("linear", "causal")] and seen.calls("linear_attention") == calls, seen.sites
    (gm,) = seen.graphs
    (call,) = [n for n in gm.graph.nodes if "linear_attention" in str(n.target)]
    assert call.args[0].meta["example_value"].shape == (B, H, N * C, D)
    assert not seen.calls("cumsum")


def left(fn):
    LEFT[fn.__name__] = fn
    return fn


@left
def sum_with_its_own_chunk(q, k, v):
    q, k, v = cut(q), cut(k), cut(v)
    return joined(q @ (k.mT @ v).cumsum(2) + torch.tril(q @ k.mT) @ v)


@left
def other_values(q, k, v):
    q, k, v = cut(q), cut(k), cut(v)
    kv = k.mT @ v.sin()
    return joined(q @ (kv.cumsum(2) - kv) + torch.tril(q @ k.mT) @ v)


@left
def other_scale(q, k, v):
    q, k, v = cut(q), cut(k), cut(v)
    kv = k.mT @ v
    return joined(q @ (kv.cumsum(2) - kv) + torch.tril(q @ k.mT * 0.5) @ v)


@left
def own_token_left_out(q, k, v):
    q, k, v = cut(q), cut(k), cut(v)
    kv = k.mT @ v
    return joined(q @ (kv.cumsum(2) - kv) + torch.tril(q @ k.mT, -1) @ v)


@left
def difference(q, k, v):
    q, k, v = cut(q), cut(k), cut(v)
    kv = k.mT @ v
    return joined(q @ (kv.cumsum(2) - kv) - torch.tril(q @ k.mT) @ v)


@pytest.mark.parametrize("name", LEFT)
def test_look_alikes_are_not_joined(name: str) -> None:
    seen = see(LEFT[name], *qkv(*SHAPES))
    for gm in seen.graphs:
        for call in (n for n in gm.graph.nodes if "linear_attention" in str(n.target)):
            assert call.args[0].meta["example_value"].shape[2] != N * C


class Wrapped(torch.nn.Module):
    """A function of three projections of the tokens, and a loss."""

    def __init__(self, fn) -> None:
        super().__init__()
        self.fn = fn
        self.project = torch.nn.Linear(H * D, 3 * H * D)

    def forward(self, x):
        q, k, v = self.project(x).view(B, -1, 3, H, D).unbind(2)
        return (self.fn(q, k, v).flatten(2) * x.cos()).sum()


@pytest.mark.parametrize("name", ["fla", "less_itself", "own_token_left_out"])
def test_chunks_on_ranks(name: str) -> None:
    """Ranks whose tokens do not start with a chunk, too."""
    torch.manual_seed(0)
    model = Wrapped((FOUND.get(name) or (LEFT[name],))[0]).double()
    inputs = {"x": torch.randn(B, N * C, H * D, dtype=torch.float64)}
    joint = capture(model, inputs)
    for ranks in (1, 2, 3, 5):
        assert eager(model, inputs).error(*joint.run(ranks, nan_padding=True)) < 1e-9
