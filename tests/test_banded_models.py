"""Hugging Face models with windows, soft caps and sinks: named so, no mask of rows x T, equal to eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import spcompile
from spcompile.reports import traffic
from spcompile.simulate import simulated
from tests.huggingface import BANDED, build
from tests.proof import capture, eager, relative_error
from tests.releases import each_change

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


@pytest.mark.parametrize("ranks", each_change([3, 2], [3]))
@pytest.mark.parametrize("name", each_change(BANDED, ["gemma3", "gpt_oss"]))
def test_loss_gradients_and_masks(name: str, ranks: int) -> None:
    """At 53 tokens: a window of 7 is shorter than a shard, of 18 or more, and its edges alone are sent."""
    model, arguments = build(name, 53, use_cache=False)
    expected, joint = eager(model, arguments), capture(model, arguments)
    assert [(s.kind, s.mask) for s in joint.sites if s.rewritten] == [("softmax", m) for m in MASKS[name]]
    local, _ = joint.shard(ranks)
    assert not square(local.graph, -(-53 // ranks), 53, ranks)
    assert expected.error(*joint.run(ranks, nan_padding=True)) <= TOLERANCE


def test_a_padded_batch() -> None:
    """Padding is one number per key, beside a window."""
    model, arguments = build("mistral", 33, use_cache=False)
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[0, 22:] = 0
    arguments["attention_mask"] = mask
    arguments["labels"] = arguments["labels"].masked_fill(mask == 0, -100)
    expected, joint = eager(model, arguments), capture(model, arguments)
    assert [s.mask for s in joint.sites] == ["causal window of 7 and padding"] * 2
    for ranks in (2, 4):
        local, _ = joint.shard(ranks)
        assert not square(local.graph, -(-33 // ranks), 33, ranks)
        assert expected.error(*joint.run(ranks, nan_padding=True)) <= TOLERANCE


PACKED = {
    "llama": ["causal and documents"] * 2,
    "mistral": ["causal window of 7 and documents"] * 2,
    "gemma2": ["causal window of 7 and documents, soft cap", "causal and documents, soft cap"],
}


def test_sinks_of_a_batch_of_one() -> None:
    """The dim of the batch is no dim then; the sinks are the heads' all the same."""
    model, arguments = build("gpt_oss", 33, use_cache=False)
    one = {n: x[:1] if isinstance(x, Tensor) else x for n, x in arguments.items()}
    joint = capture(model, one)
    assert [s.mask for s in joint.sites if s.rewritten] == MASKS["gpt_oss"]
    assert eager(model, one).error(*joint.run(2, nan_padding=True)) <= TOLERANCE


@pytest.mark.parametrize("name", each_change(PACKED, ["mistral"]))
def test_packed_documents(name: str) -> None:
    """Five documents in one sequence, told apart by their positions, are the five by themselves."""
    lengths = [10, 14, 5, 1, 23]
    model, arguments = build(name, sum(lengths), use_cache=False)
    ids = arguments["input_ids"][:1]
    labels = torch.cat([x.clone().index_fill_(1, torch.tensor(0), -100) for x in ids.split(lengths, 1)], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}
    alone = [x.split(lengths, 1) for x in (ids, labels)]
    tokens = sum(n - 1 for n in lengths)

    def separate() -> Tensor:
        losses = [
            model(input_ids=x, labels=y, use_cache=False, num_items_in_batch=tokens).loss
            for x, y in zip(*alone, strict=True)
            if x.shape[1] > 1
        ]
        return torch.stack(losses).sum()

    joint, expected = capture(model, packed), eager(model, packed)
    assert relative_error(separate().detach(), expected.loss) <= TOLERANCE
    assert [s.mask for s in joint.sites if s.rewritten] == PACKED[name]
    for ranks in (2, 3):
        local, _ = joint.shard(ranks)
        assert not square(local.graph, -(-53 // ranks), 53, ranks)
        assert expected.error(*joint.run(ranks, nan_padding=True)) <= TOLERANCE


def test_lengths_on_both_sides_of_the_window() -> None:
    """One function, compiled for lengths below and above its window, and below and above a shard."""

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


class Windowed(nn.Module):
    """Attention of 2 heads of 8 under a window, between projections."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.project, self.window = nn.Linear(16, 48), window

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.project(x).view(B, T, 3, 2, 8).permute(2, 0, 3, 1, 4)
        i = torch.arange(T, device=x.device)
        keep = (i <= i[:, None]) & (i > i[:, None] - self.window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return (x + out.transpose(1, 2).reshape(B, T, 16)).pow(2).mean()


def test_a_million_tokens_on_64_ranks() -> None:
    """The report says what is sent, 4,095 tokens in place of 16,384, and nothing there is rows x T."""
    ranks, tokens = 64, 1_048_576
    with torch.device("meta"):
        model = Windowed(4096)
    report = spcompile.explain(model, ranks=ranks)(torch.zeros(1, tokens, 16, device="meta"))
    assert [(s.mask, s.rewritten) for s in report.sites] == [("causal window of 4096", True)]
    size = (ranks - 1) * 4095 * 2 * (8 + 8) * 4
    found = {(c.phase, c.op, c.purpose): c for c in report.collectives}
    for key in (
        ("forward", "all_gather", "softmax: neighbours' keys and values"),
        ("backward", "all_gather", "softmax: gradients of neighbours' keys and values"),
    ):
        row = found.pop(key)
        assert (row.count, row.bytes, row.grows, row.values["E"]) == (1, size, False, 4095)
        assert round(traffic._evaluated(row.formula, row.values)) == row.bytes
    assert not any(c.grows for c in found.values())
    # Three times the edges of all ranks; rows x T would be 16 GiB, of one byte each.
    assert report.memory is not None and report.memory.backward < 3 * ranks * 4095 * 2 * 16 * 4


@pytest.mark.parametrize("options", [{"regather": True}, {"regather": False}], ids=str)
@pytest.mark.parametrize("window", [1, 3, 40])
def test_edges_gathered_again_or_kept(window: int, options: dict[str, Any]) -> None:
    """Edges, all keys or none; kept for the backward or gathered again."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = Windowed(window).double(), torch.randn(2, 17, 16, dtype=torch.float64)
    loss = torch.compile(model, backend=simulated(3, nan_padding=True, **options))(x)
    want = model(x)
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-12)
    weights = list(model.parameters())
    grads = zip(torch.autograd.grad(loss, weights), torch.autograd.grad(want, weights), strict=True)
    for got, right in grads:
        torch.testing.assert_close(got, right, rtol=0, atol=1e-12)
