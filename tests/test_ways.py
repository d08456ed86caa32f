"""Every way across the ranks on whole models: eager's results, and what crosses by the formulas."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import models
from spcompile.config import Config
from spcompile.reports.traffic import rows, transfers
from spcompile.strategies import LINEAR, SOFTMAX
from tests.proof import Eager, Joint, capture, eager
from tests.real_ranks import run_ranks
from tests.releases import each_change

SHAPE = {"vocab": 20, "hidden": 8, "heads": 2, "kv_heads": 1, "mlp": 12}
OTHERS = [name for name in LINEAR if name != "allgather"]
OTHERS_OF_SOFTMAX = [name for name in SOFTMAX if name != "allgather"]
# No decay, one that every rank knows, one per key, and a matrix.
MODELS = ("linear_llama3", "retention", "gla", "gated_deltanet")
LENGTH = 13


@functools.lru_cache(maxsize=1)
def case(name: str) -> tuple[Eager, Joint]:
    torch.manual_seed(0)
    model = models.get(f"{name}:tiny", **SHAPE, pattern="LN", layers=2)().double()
    inputs = model.example_inputs(seq=LENGTH, batch=2)
    return eager(model, inputs), capture(model, inputs)


# For each change a known decay by the scan, and one per key by the ring; the operators of all are in
# tests/test_linear_strategies.py.
@pytest.mark.parametrize(
    ("name", "strategy"),
    each_change(
        itertools.product(MODELS, OTHERS),
        [("retention", "scan"), ("gla", "ring"), ("gated_deltanet", "pipelined")],
    ),
)
def test_a_model_is_eager(name: str, strategy: str) -> None:
    expected, joint = case(name)
    for ranks in (1, 2, 3, 4, 8):
        error = expected.error(*joint.run(ranks, nan_padding=True, linear=strategy))
        assert error <= 1e-9, f"P={ranks}: {error:.1e}"


@pytest.mark.parametrize("strategy", OTHERS)
@pytest.mark.parametrize("name", each_change(MODELS, ["gla"]))
def test_what_crosses_is_in_the_formula(name: str, strategy: str) -> None:
    """Steps that do not depend on the length; the last state is sent only where somebody asks for it."""
    ranks = 4
    module, _ = case(name)[1].shard(ranks, linear=strategy)
    crossing = rows((t, 1) for t in transfers(module.graph, ranks))
    states = [c for c in crossing if c.purpose.startswith("linear")]
    # Heads of 4 columns are 4 slices.
    steps = {"ring": ranks - 1, "scan": 3, "pipelined": ranks + 4 - 2}[strategy]
    shifts = [(c.op, c.phase, c.count) for c in states if c.op == "shift"]
    assert shifts == [("shift", phase, steps) for phase in ("forward", "backward")]
    # The gradient of a decay per key asks for that of the state before the first token.
    lasts = [(c.op, c.phase, c.count) for c in states if c.op != "shift"]
    assert lasts == [("all_reduce", "backward", 1)] * (name == "gla")
    assert all(c.formula and c.grows is False for c in states), states


@pytest.mark.parametrize("strategy", OTHERS_OF_SOFTMAX)
def test_a_model_with_softmax_is_eager(strategy: str) -> None:
    """Two heads and one of keys: ranks that share them out, and more ranks than heads."""
    expected, joint = case("linear_llama3")
    for ranks in (1, 2, 3, 4, 8):
        error = expected.error(*joint.run(ranks, nan_padding=True, softmax=strategy))
        assert error <= 1e-9, f"P={ranks}: {error:.1e}"
    module, _ = joint.shard(2, softmax=strategy)
    crossing = [
        c for c in rows((t, 1) for t in transfers(module.graph, 2)) if c.purpose.startswith("softmax")
    ]
    assert {c.op for c in crossing} == {OPERATORS[strategy]}
    assert all(c.formula and c.grows for c in crossing), crossing


OPERATORS = {"alltoall": "all_to_all", "ring": "shift"}


def test_an_option_that_is_no_row_is_an_error() -> None:
    with pytest.raises(Exception, match="linear") as raised:
        Config.of({"linear": "rings"})
    assert all(name in str(raised.value) for name in LINEAR)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_real_ranks() -> None:
    """Through Inductor, which does not know the sends for collectives: three ranks, one length padded."""
    for result in run_ranks("ways", 3, timeout=580):
        assert result["errors"].keys() == {*OTHERS, *OTHERS_OF_SOFTMAX}
        assert max(result["errors"].values()) <= 1e-9, result
