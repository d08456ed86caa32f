"""The promise, with all ranks simulated: the loss and every gradient of unsharded eager, in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import models
from tests.proof import Eager, Joint, capture, eager

RANKS = (1, 2, 3, 4, 8)
# Divisible by all but 3, by none, and fewer tokens than ranks; with how many of them each change is tried.
LENGTHS = {16: (4,), 13: (1, 3), 3: (8,)}
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


# The recognizer or propagation alone, the length, and the ranks that are tried for each change.
HOW = [(True, length, some) for length, some in LENGTHS.items()] + [(False, 13, (2,))]


def cases() -> Iterator[Any]:
    """For each change every layer, causal or not, in one of the ways."""
    layers = enumerate(itertools.product(LAYERS, (True, False)))
    for (n, (layer, causal)), (m, (recognize, length, some)) in itertools.product(layers, enumerate(HOW)):
        now = (n + n // 2) % len(HOW) == m
        names = "causal" if causal else "bidirectional", "recognized" if recognize else "propagation-alone"
        for ranks, marks in (some, () if now else pytest.mark.sweep), (_others(some), pytest.mark.sweep):
            name = "-".join(map(str, (*layer, *names, length, ranks)))
            yield pytest.param(*layer, causal, recognize, length, ranks, id=name, marks=marks)
    for (layer, causal), length in itertools.product(itertools.product(LAYERS, (True, False)), LENGTHS):
        name = "-".join(map(str, (*layer, "causal" if causal else "bidirectional", "alone", length)))
        yield pytest.param(*layer, causal, False, length, RANKS, id=name, marks=pytest.mark.sweep)


def _others(some: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(r for r in RANKS if r not in some)


@pytest.mark.parametrize(("pattern", "normaliser", "causal", "recognize", "length", "ranks"), list(cases()))
def test_every_pattern_is_eager(
    pattern: str, causal: bool, normaliser: bool, recognize: bool, length: int, ranks: tuple[int, ...]
) -> None:
    expected, joint = case(pattern, causal, normaliser, length, recognize)
    rewritten = [s.kind for s in joint.sites if s.rewritten]
    assert rewritten == ([{"L": "linear", "N": "softmax"}[p] for p in pattern] if recognize else [])
    for p in ranks:
        # Padding that is NaN must reach no result; where there is none, the two are the same.
        error = expected.error(*joint.run(p, nan_padding=length % p != 0))
        assert error <= 1e-9, f"P={p}: {error:.1e}"
