"""What can be computed on each rank's tokens is not gathered: one small model for each kind of operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spcompile
from spcompile import collectives
from spcompile.placement import Shard
from spcompile.reports.traffic import transfers
from spcompile.rules import Call, Context, rule_for
from tests.proof import capture, eager

B, T, D = 2, 13, 8


def glu(x, n):
    return F.glu(torch.cat([x, 2 * x], -1), -1)


def std_over_tokens(x, n):
    return x / (1 + x.std(1, keepdim=True))


def variance_of_batch_and_tokens(x, n):
    var, mean = torch.var_mean(x, (0, 1), correction=0)
    return (x - mean) * torch.rsqrt(var + 1e-5)


def split_tokens(x, n):
    return torch.stack([part.sin().sum() for part in x.split(5, 1)])


def unequal_parts(x, n):
    a, b = x.split([4, T - 4], 1)
    return torch.cat([b.cos(), a], 1)


def cumsum_of_batch_and_tokens(x, n):
    return x.flatten(0, 1).cumsum(0).view_as(x) * 0.1


def last_token_by_index(x, n):
    return x[torch.arange(B), n - 1]


def last_token_from_the_end(x, n):
    return x[torch.arange(B), n - 1 - T]


def last_token_by_gather(x, n):
    return x.gather(1, (n - 1).view(B, 1, 1).expand(B, 1, D))


def convolution_in_steps(x, n):
    weight = torch.arange(3.0 * D * D, dtype=x.dtype).sin().view(D, D, 3)
    return F.conv1d(x.transpose(1, 2), weight, stride=2, padding=1)


def two_convolutions_behind_a_pad(x, n):
    """The first one's output begins before the first token, with its bias."""
    weight = torch.arange(3.0 * D * D, dtype=x.dtype).sin().view(D, D, 3)
    y = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, :1, :2], weight[0, :, 0], groups=D)
    return F.conv1d(y, weight)


def means_in_steps(x, n):
    x = x.transpose(1, 2)
    return torch.cat([F.avg_pool1d(x, 2), F.avg_pool1d(x, 4, 2, 1).sin()], 1)


def windows(x, n):
    return F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).sin().mean(-1)


def windows_in_steps(x, n):
    return x.unfold(1, 4, 2).cos().mean(-1)


def shifted_round(x, n):
    return torch.roll(x, 1, 1) - torch.roll(x, -2, 1)


def from_the_end(x, n):
    return x + x.flip(1).cos() + x[:, 2:].sin().flip(1).sum(1, keepdim=True)


def masked_scatter(x, n):
    """Images in a text: what a vision tower returns stands where their tokens are."""
    mask = (torch.arange(T) % 3 == 0) | (n[:, None] < T)
    source = torch.outer(torch.arange(40.0, dtype=x.dtype).sin(), x.sum((0, 1)))
    return x.masked_scatter(mask[..., None].expand_as(x), source)


BODIES = {f.__name__: f for f in list(globals().values()) if getattr(f, "__module__", "") == __name__}


class Model(nn.Module):
    """An embedding, causal attention, one of the bodies, and a loss."""

    def __init__(self, body):
        super().__init__()
        self.embedding, self.qkv, self.body = nn.Embedding(20, D), nn.Linear(D, 3 * D), body

    def forward(self, ids, n):
        x = self.embedding(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.body(x, n).pow(2).mean()


@pytest.mark.parametrize("name", BODIES)
def test_nothing_is_gathered(name):
    torch.manual_seed(0)
    model = Model(BODIES[name]).double()
    ids = torch.randint(20, (B, T), generator=torch.Generator().manual_seed(1))
    inputs = {"ids": ids, "n": torch.tensor([T, T - 3])}
    joint, reference = capture(model, inputs), eager(model, inputs)
    for ranks in (2, 3, 13):
        local, sharded = joint.shard(ranks)
        assert not sharded.gathers
        hidden = [t for t in transfers(local.graph, ranks) if "attention" not in t.purpose.op]
        if name != "unequal_parts":  # its parts change places
            gathered = [t for t in hidden if t.op != "all_reduce"]
            few = ["cumsum", "masked_scatter", "convolution", "avg_pool2d"]  # counts, and edges
            few += ["unfold", "index_put"] if "windows" in name else []
            sent = [t for t in gathered if not any(op in t.purpose.op + t.purpose.consumer for op in few)]
            moved = name in ("shifted_round", "from_the_end")  # by a few tokens; a block, to its mirror image
            assert all(t.op == "mirror" or t.elements <= 4 * B * D for t in sent) if moved else not sent, (
                hidden
            )
        assert reference.error(*joint.run(ranks, nan_padding=True)) <= 1e-9


@pytest.mark.parametrize("name", ["shifted_round", "windows", "windows_in_steps"])
def test_nor_by_the_backend(name):
    """Where the passes run inside of a compilation, under its fake mode."""
    inputs = {"ids": torch.arange(2 * T).view(2, T) % 20, "n": torch.tensor([T, T - 3])}
    report = spcompile.explain(Model(BODIES[name]), ranks=3)(**inputs)
    assert not report.gathers and not report.breaks


@pytest.mark.parametrize("index", [T, -T - 1])
def test_an_index_that_the_sequence_does_not_have_stays_an_error(index):
    x, at = torch.randn(B, T, D), torch.full((B,), index)
    call = Call(torch.ops.aten.index.Tensor, (x, [torch.arange(B), at.clamp(0, T - 1)]), {}, x[:, 0])
    split = rule_for(call).split("in", 0, Shard(1, T, 7))
    collectives._simulated_rank.append(1)
    try:
        with pytest.raises(IndexError):
            split.emit(Context(collectives.Group(2, "simulated")), [x[:, 6:], torch.arange(B), at])
    finally:
        collectives._simulated_rank.pop()
