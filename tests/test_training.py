"""What training does besides one step, on simulated ranks: each against the same run of the eager model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import models
from spcompile.simulate import simulated
from tests.proof import Eager, eager, left_behind, relative_error

RANKS, LENGTH, VOCAB = 3, 13, 50


def tiny(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {"vocab": VOCAB, "hidden": 16, "heads": 2, "kv_heads": 1, "mlp": 24, "pattern": "LN", "layers": 2}
    return models.get("linear_llama3:tiny", **(shape | overrides))()


def batch(length: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids, "labels": ids.clone()}


def sharded(model: nn.Module, ranks: int = RANKS, **options: Any) -> Any:
    return torch.compile(model, backend=simulated(ranks, **options))


def step(
    compiled: Any, model: nn.Module, inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    loss = compiled(**inputs)
    loss.backward()
    return loss.detach(), left_behind(model, inputs)


def test_whole_logits_come_back_with_eager_strides() -> None:
    model = tiny().double()
    ids = batch()["ids"]
    expected = model(ids)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    reference = Eager(expected.detach(), {n: p.grad.clone() for n, p in model.named_parameters()})
    model.zero_grad()
    found = sharded(model, nan_padding=True)(ids)
    (found * weight).sum().backward()
    assert found.stride() == expected.stride()
    assert reference.error(found.detach(), {n: p.grad for n, p in model.named_parameters()}) <= 1e-9


def test_outputs_that_are_views() -> None:
    """A transposed output has eager's strides; a slice and an expanded dim have eager's values."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny()

        def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
            logits = self.model(ids)
            twice = logits[:, 1:, None].expand(-1, -1, 2, -1)
            return logits.transpose(1, 2) + 1, logits[:, :-1], twice, logits

    model, ids = Views().double(), batch()["ids"]
    expected, found = model(ids), sharded(model, nan_padding=True)(ids)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours.detach(), theirs.detach()) <= 1e-9
    assert found[0].stride() == expected[0].stride()


def test_inference_without_gradients() -> None:
    model = tiny().double()
    ids = batch()["ids"]
    with torch.no_grad():
        expected, found = model(ids), sharded(model, nan_padding=True)(ids)
    assert relative_error(found, expected) <= 1e-9


class _Checkpointed(nn.Module):
    """The blocks of a model under activation checkpointing, as a user would write it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.runs = 0
        for block in model.blocks:
            block.forward = self._wrap(block.forward)

    @staticmethod
    def _wrap(forward: Any) -> Any:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(ids, labels)


@pytest.mark.parametrize("regather", [False, True])
def test_activation_checkpointing(regather: bool) -> None:
    plain = tiny().double()
    reference = eager(plain, batch())
    model = _Checkpointed(plain)
    loss, gradients = step(sharded(model, nan_padding=True, regather=regather), model, batch())
    named = {n.removeprefix("model."): g for n, g in gradients.items()}
    assert reference.error(loss, named) <= 1e-9


def test_keys_gathered_again_in_the_backward() -> None:
    model = tiny(pattern="N").double()
    reference = eager(model, batch())
    assert reference.error(*step(sharded(model, regather=True, nan_padding=True), model, batch())) <= 1e-9


def test_gradient_accumulation_and_optimizer_steps() -> None:
    ours, theirs = tiny().double(), tiny().double()
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (ours, theirs)]
    compiled = sharded(ours, nan_padding=True)
    for update in range(3):
        for micro in range(2):
            inputs = batch(seed=10 * update + micro)
            found, expected = compiled(**inputs), theirs(**inputs)
            found.backward()
            expected.backward()
            assert relative_error(found.detach(), expected.detach()) <= 1e-9
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(found.detach(), expected.detach()) <= 1e-9, name


def test_bfloat16_autocast() -> None:
    """RMS ratio to the float64 model at most 1e-2 over all gradients.

    A single weight's gradient may cancel: eager under autocast is itself 3e-2 from the truth for the first
    layer's queries. There the yardstick is eager's own distance.
    """
    truth = eager(tiny().double(), batch(64))
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        yardstick = eager(model, batch(64))
        loss, gradients = step(sharded(model, nan_padding=True), model, batch(64))
    everything = torch.cat([(gradients[n].double() - g).flatten() for n, g in truth.gradients.items()])
    scale = torch.cat([g.flatten() for g in truth.gradients.values()])
    assert float(everything.norm() / scale.norm()) <= 1e-2
    assert relative_error(loss.double(), truth.loss) <= 1e-2
    for name, true in truth.gradients.items():
        found, theirs = gradients[name].double(), yardstick.gradients[name].double()
        assert (found - true).norm() <= max(1e-2 * true.norm(), 1.5 * (theirs - true).norm()), name


def test_lengths_that_change_between_calls() -> None:
    model = tiny().double()
    compiled = sharded(model)
    for length in (13, 14, 2, 13):
        inputs = batch(length)
        assert eager(model, inputs).error(*step(compiled, model, inputs)) <= 1e-9


def test_a_graph_break_between_sharded_graphs() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.last = tiny(), nn.Linear(VOCAB, VOCAB)

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            logits = self.model(ids)
            torch._dynamo.graph_break()
            return F.cross_entropy(self.last(logits)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model = Broken().double()
    reference = eager(model, batch())
    assert reference.error(*step(sharded(model, nan_padding=True), model, batch())) <= 1e-9


class _Dropped(nn.Module):
    """Two dropouts: of a tensor that is sharded, and of one that every rank has whole (a weight)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return F.dropout(self.embedding(ids) * 0 + 1, 0.5), F.dropout(self.weight, 0.5)


def test_dropout_of_shards_differs_and_of_whole_tensors_does_not() -> None:
    model = _Dropped().double()
    ids = batch(64)["ids"]
    compiled = sharded(model, ranks=2)  # raises if the ranks returned different tensors
    torch.manual_seed(7)
    tokens, weight = compiled(ids)
    torch.manual_seed(7)
    again, weight_again = compiled(ids)
    fresh, _ = compiled(ids)
    assert torch.equal(tokens, again) and torch.equal(weight, weight_again)
    assert not torch.equal(tokens, fresh)
    first, second = tokens[:, :32], tokens[:, 32:]
    assert not torch.equal(first, second), "both ranks drew the same numbers"
    assert 0.4 < float((tokens == 0).double().mean()) < 0.6
    assert set(tokens.unique().tolist()) == {0.0, 2.0} and set(weight.unique().tolist()) <= {0.0, 2.0}


def test_dropout_gives_the_backward_the_forwards_mask() -> None:
    model = _Dropped().double()
    _, weight = sharded(model, ranks=2)(torch.arange(VOCAB).reshape(1, -1))
    model.embedding.weight.grad = None
    (weight.sum()).backward()
    assert torch.equal(model.weight.grad != 0, weight != 0)


def test_one_rank_repeats_itself_under_a_seed() -> None:
    model = tiny(dropout=0.2).double()
    compiled = sharded(model, ranks=1)
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(compiled(**batch()).item())
    assert losses[0] == losses[1] != compiled(**batch()).item()
