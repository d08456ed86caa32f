"""Experts stay sharded: a rank sorts, groups and computes its own tokens; all else is right too.

The reference is eager in float64, every gradient and buffer; padding is NaN.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx

from tests import zoo
from tests.experts import APART, COUNTS, HIDDEN, LOCAL, Experts, grouped, inputs_of
from tests.proof import capture, eager
from tests.releases import each_change

EXACT = 1e-12


def _experts(spelling, top=2, **options):
    torch.manual_seed(top)
    return Experts(spelling, top, **options).double()


def _sends(graph: fx.Graph) -> list[int]:
    """The floating-point numbers that each collective but the gradients' sends."""
    sent = [n.args[0].meta["val"] for n in graph.nodes if "_c10d_functional.all_gather" in str(n.target)]
    return [x.numel() for x in sent if x.is_floating_point()]


@pytest.mark.parametrize("length", [8, 11])
@pytest.mark.parametrize("name", LOCAL)
def test_own_tokens_alone(name, length):
    model, inputs = _experts(LOCAL[name]), inputs_of(length)
    expected, joint = eager(model, inputs), capture(model, inputs)
    for ranks in (2, 3, 4):
        local, sharded = joint.shard(ranks)
        assert not sharded.gathers
        assert not [n for n in _sends(local.graph) if n >= math.ceil(length / ranks) * HIDDEN]
        assert expected.error(*joint.run(ranks, nan_padding=True)) <= EXACT


@pytest.mark.parametrize("name", APART)
def test_a_place_among_all_tokens(name):
    model, inputs = _experts(APART[name]), inputs_of(11)
    expected, joint = eager(model, inputs), capture(model, inputs)
    for ranks in (2, 3):
        assert expected.error(*joint.run(ranks, nan_padding=True)) <= EXACT


# transformers' own, by default in grouped products; in float64 eager computes one expert after another.
MODELS = ["qwen3_next", "gpt_oss"]
MORE = ["minimax", "granitemoehybrid", "jamba", "kimi_linear", "zaya", "mixtral"]
INSIDE = 2e-5  # they compute norms, routers and the loss in float32


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", each_change([*MODELS, *MORE], MODELS))
def test_models(name):
    model, inputs = zoo.MODELS[name](33)
    model, default = model.double(), model.config._experts_implementation
    model.config._experts_implementation = "eager"
    expected = eager(model, inputs)
    model.config._experts_implementation = default
    joint = capture(model, inputs)
    for ranks in (2, 3):
        _, sharded = joint.shard(ranks)
        assert not [g for g in sharded.gathers if g.source.startswith("moe.py:") or "xperts" in g.source]
        assert expected.error(*joint.run(ranks, nan_padding=True)) <= INSIDE


# ------------------------------------------------------------------------------------------ at random
ORDERS = {
    "sort": lambda ids: ids.sort(),
    "stable": lambda ids: ids.sort(stable=True),
    "descending": lambda ids: ids.sort(stable=True, descending=True),
}
STEPS = {
    "gate": lambda m, y, experts: F.silu(y) * y.sigmoid(),
    "bias": lambda m, y, experts: y + m.bias[experts],
    "norm": lambda m, y, experts: F.layer_norm(y, y.shape[1:]),
    "halves": lambda m, y, experts: torch.cat(y.chunk(2, -1)[::-1], -1),
    "mean": lambda m, y, experts: y - y.mean(),  # of all slots
    "along": lambda m, y, experts: y - 0.1 * y.cumsum(0) / y.shape[0],  # a place counts
    "numbers": lambda m, y, experts: y * torch.arange(y.shape[0])[:, None].sin(),  # and here
    "own matrix": lambda m, y, experts: torch.einsum("sd,sde->se", y, m.weight[experts]),
}


@st.composite
def spellings(draw):
    """A spelling put together at random: an order, counts, some steps, and a way back."""
    order_of = ORDERS[draw(st.sampled_from(list(ORDERS)))]
    counts = COUNTS[draw(st.sampled_from(list(COUNTS)))]
    steps = [STEPS[name] for name in draw(st.lists(st.sampled_from(list(STEPS)), max_size=3))]
    products, back = draw(st.booleans()), draw(st.sampled_from(["add", "places", "write"]))
    others = draw(st.booleans())

    def spelling(m, x, w, ids):
        flat = ids.reshape(-1)
        experts, order = order_of(flat)
        y = x[order // m.top]
        if products:
            counted = counts((flat + 1) % m.experts if others else flat, m.experts)
            y = grouped(y, m.weight, counted.cumsum(0).to(torch.int32))
        for step in steps:
            y = step(m, y, experts)
        y = y * w.reshape(-1)[order][:, None]
        if back == "add":
            return torch.zeros_like(x).index_add(0, order // m.top, y)
        if back == "places":
            return y[order.argsort()].view(-1, m.top, x.shape[1]).sum(1)
        rows = torch.zeros_like(y)
        rows[order] = y
        return rows.view(-1, m.top, x.shape[1]).sum(1)

    return spelling


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(spellings(), st.integers(1, 3), st.integers(2, 9), st.integers(1, 2), st.integers(2, 4))
def test_put_together_at_random(spelling, top, length, batch, ranks):
    model, inputs = _experts(spelling, top), inputs_of(length, batch)
    expected, joint = eager(model, inputs), capture(model, inputs)
    assert expected.error(*joint.run(ranks, nan_padding=True)) <= EXACT
