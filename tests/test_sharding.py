"""The promise, with all ranks simulated: the loss and every gradient of unsharded eager, in float64."""

from __future__ import annotations

import functools

import pytest
import torch

import models
from tests.proof import Eager, Joint, capture, eager

RANKS = (1, 2, 3, 4, 8)
# Divisible by all but 3, by none, and fewer tokens than ranks.
LENGTHS = (16, 13, 3)
# The layers, and whether linear ones have a normaliser; softmax layers have none.
LAYERS = [("L", False), ("L", True), ("N", False), ("LN", False), ("LN", True)]
SHAPES = {"vocab": 50, "hidden": 16, "heads": 2, "kv_heads": 1, "mlp": 24}


@functools.lru_cache(maxsize=4)
def case(pattern: str, causal: bool, normaliser: bool, length: int, recognize: bool) -> tuple[Eager, Joint]:
    torch.manual_seed(0)
    overrides = {"pattern": pattern, "layers": len(pattern), "causal": causal, "normaliser": normaliser}
    model = models.get("linear_llama3:tiny", **SHAPES, **overrides)().double()
    ids = torch.randint(0, SHAPES["vocab"], (2, length))
    labels = ids.clone()
    labels[0, 1:2] = -100
    inputs = {"ids": ids, "labels": labels}
    return eager(model, inputs), capture(model, inputs, recognize)


@pytest.mark.parametrize(
    ("recognize", "length"),
    [
        pytest.param(
            recognize,
            length,
            id=f"{'recognized' if recognize else 'propagation-alone'}-{length}",
            marks=() if recognize or length == 13 else pytest.mark.sweep,
        )
        for recognize in (True, False)
        for length in LENGTHS
    ],
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("pattern", "normaliser"), LAYERS, ids=str)
def test_every_pattern_is_eager(
    pattern: str, causal: bool, normaliser: bool, recognize: bool, length: int
) -> None:
    expected, joint = case(pattern, causal, normaliser, length, recognize)
    rewritten = [s.kind for s in joint.sites if s.rewritten]
    assert rewritten == ([{"L": "linear", "N": "softmax"}[p] for p in pattern] if recognize else [])
    for ranks in RANKS:
        # Padding that is NaN must reach no result; where there is none, the two are the same.
        error = expected.error(*joint.run(ranks, nan_padding=length % ranks != 0))
        assert error <= 1e-9, f"P={ranks}: {error:.1e}"
