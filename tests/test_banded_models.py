"""Hugging Face models with windows, soft caps and sinks: named so, no mask of rows x T, equal to eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from spcompile.simulate import simulated
from tests.huggingface import BANDED, build
from tests.proof import capture, eager

# As in test_huggingface: their norms, rotary embeddings, softmax or losses compute in float32.
TOLERANCE = 2e-5
MASKS = {
    "mistral": ["causal window of 7"] * 2,
    "gemma2": ["causal window of 7, soft cap", "causal, soft cap"],
    "gemma3": ["causal window of 7", "causal"],
    "gpt_oss": ["causal window of 7, sinks", "causal, sinks"],
}


def square(graph: fx.Graph, block: int, length: int, ranks: int) -> list[str]:
    """Tensors with two dims as long as a rank's rows, or longer."""
    long = {block, length, block * ranks, length + 1}
    found = []
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and sum(int(size) in long for size in value.shape) > 1:
            found.append(f"{node.name} {list(value.shape)}")
    return found


@pytest.mark.parametrize("name", BANDED)
def test_loss_gradients_and_masks(name: str) -> None:
    """At 47 tokens: a window of 7 is shorter than a shard, of up to 24, and its edges alone are sent."""
    model, arguments = build(name, 47, use_cache=False)
    expected, joint = eager(model, arguments), capture(model, arguments)
    assert [(s.kind, s.mask) for s in joint.sites if s.rewritten] == [("softmax", m) for m in MASKS[name]]
    for ranks in (2, 3):
        local, _ = joint.shard(ranks)
        assert not square(local.graph, -(-47 // ranks), 47, ranks)
        assert expected.error(*joint.run(ranks, nan_padding=True)) <= TOLERANCE


def test_a_padded_batch() -> None:
    """Padding is one number per key, beside a window."""
    model, arguments = build("mistral", 29, use_cache=False)
    mask = torch.ones(2, 29, dtype=torch.long)
    mask[0, 22:] = 0
    arguments["attention_mask"] = mask
    arguments["labels"] = arguments["labels"].masked_fill(mask == 0, -100)
    expected, joint = eager(model, arguments), capture(model, arguments)
    assert [s.mask for s in joint.sites] == ["causal window of 7 and padding"] * 2
    for ranks in (2, 4):
        local, _ = joint.shard(ranks)
        assert not square(local.graph, -(-29 // ranks), 29, ranks)
        assert expected.error(*joint.run(ranks, nan_padding=True)) <= TOLERANCE


def test_lengths_on_both_sides_of_the_window() -> None:
    """One function, compiled for lengths below and above its window, and below and above a shard."""
    import torch.nn.functional as F

    def run(q: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        keep = (i <= i[:, None]) & (i > i[:, None] - 6)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=keep)

    torch.compiler.reset()
    compiled = torch.compile(run, backend=simulated(3, nan_padding=True))
    for length in (5, 6, 7, 13, 15, 17, 18, 19, 40):
        q: Any = torch.randn(1, 2, length, 4, dtype=torch.float64).requires_grad_()
        outs = [f(q) for f in (compiled, run)]
        torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad(out.square().sum(), q)[0] for out in outs]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-11)
