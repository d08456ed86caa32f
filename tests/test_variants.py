"""The linear family: each model of models/, pure and hybrid, on simulated ranks equals unsharded eager."""

from __future__ import annotations

import functools

import pytest
import torch

import models
from tests.proof import Eager, Joint, capture, eager

SHAPE = {"vocab": 20, "hidden": 8, "heads": 2, "kv_heads": 1, "mlp": 12}
VARIANTS = [
    *("retention", "lightning", "simple_gla", "mamba2", "gla", "hgrn2"),
    *("rwkv6", "deltanet", "gated_deltanet", "kda", "based", "rebased"),
]
LENGTH = 7  # no multiple of the ranks

# Whose decay is no exp of anything, so that its recurrence is scanned as it stands.
SCANS = {"hgrn2"}


@functools.lru_cache(maxsize=1)
def case(name: str, pattern: str) -> tuple[Eager, Joint]:
    torch.manual_seed(0)
    model = models.get(f"{name}:tiny", **SHAPE, pattern=pattern, layers=len(pattern))().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)  # so that every part matters
    inputs = model.example_inputs(seq=LENGTH, batch=2)
    return eager(model, inputs), capture(model, inputs)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("pattern", ["L", "LN"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_eager(name: str, pattern: str, ranks: int) -> None:
    expected, joint = case(name, pattern)
    kinds = {"L": "scan" if name in SCANS else "linear", "N": "softmax"}
    found = [s.kind for s in joint.sites if s.rewritten and s.kind != "loop"]
    assert found == [kinds[p] for p in pattern]
    assert expected.error(*joint.run(ranks, nan_padding=True)) <= 1e-9
