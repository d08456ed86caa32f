"""Unmodified Hugging Face models on simulated ranks: all attention recognized, loss and gradients eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spcompile.simulate import simulated
from tests.huggingface import MODELS, build
from tests.proof import capture, eager, left_behind
from tests.releases import each_change

# The models are built in float64, but their norms, rotary embeddings or losses compute in float32.
TOLERANCE = 2e-5
CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in MODELS if name != "gpt2"]
CASES += [("llama", {"use_cache": False}), ("llama", {"use_cache": True})]


@pytest.mark.parametrize("ranks", each_change([3, 2], [3]))
@pytest.mark.parametrize(
    "recognize",
    [
        pytest.param(True, id="recognized"),
        pytest.param(False, id="propagation-alone", marks=pytest.mark.sweep),
    ],
)
@pytest.mark.parametrize(("name", "inputs"), CASES, ids=str)
def test_loss_and_gradients(name: str, inputs: dict[str, Any], recognize: bool, ranks: int) -> None:
    model, arguments = build(name, 37, **inputs)
    expected, joint = eager(model, arguments), capture(model, arguments, recognize)
    if recognize:
        assert [(s.kind, s.rewritten) for s in joint.sites] == [("softmax", True)] * 2
    _, sharded = joint.shard(ranks)
    assert not sharded.gathers
    assert expected.error(*joint.run(ranks, nan_padding=True)) <= TOLERANCE


def test_gpt2_which_breaks_the_graph() -> None:
    """It logs a warning while it computes the loss, where Dynamo breaks the graph; the pieces are right."""
    model, arguments = build("gpt2", 37)
    expected = eager(model, arguments)
    compiled = torch.compile(model, backend=simulated(3, nan_padding=True))
    loss = compiled(**arguments).loss
    loss.backward()
    assert expected.error(loss.detach(), left_behind(model, arguments)) <= TOLERANCE


def test_a_padded_batch() -> None:
    """An attention mask of the user's makes the mask data: general, and still right."""
    model, arguments = build("llama", 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 15:] = 0
    arguments["attention_mask"] = mask
    arguments["labels"] = arguments["labels"].masked_fill(mask == 0, -100)
    expected, joint = eager(model, arguments), capture(model, arguments)
    for ranks in (2, 3):
        assert expected.error(*joint.run(ranks, nan_padding=True)) <= TOLERANCE
