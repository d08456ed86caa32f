"""Experts stay sharded: each rank sorts, groups and computes its own tokens; what reads the order of all is right.

The reference is eager in float64, every gradient and buffer; padding is NaN.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx

from tests.experts import APART, HIDDEN, LOCAL, Experts, inputs_of
from tests.proof import capture, eager

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
