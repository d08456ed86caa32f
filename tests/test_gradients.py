"""The option ``gradients="partial"``: the mean over the ranks is the gradient, and nobody has reduced it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.passes.shard import shard_joint_graph
from spcompile.reports.traffic import transfers
from spcompile.simulate import _Ranks
from tests.proof import Joint, capture, eager

SHAPE = {"vocab": 50, "hidden": 16, "heads": 2, "kv_heads": 1, "mlp": 24, "layers": 2, "pattern": "LN"}


def run(joint: Joint, ranks: int, **options: Any) -> tuple[list[Any], set[str]]:
    """What each rank returns, one list per output, and which collectives the backward has."""
    parameters = [f"primals_{i + 1}" for i, name in enumerate(joint.names) if name is not None]
    graph, group = joint.module.graph, Group(ranks, "simulated")
    shard_joint_graph(graph, group, Config.of(options), {}, parameters)
    joint.module.recompile()
    tangents = [torch.full(x.shape, float(x.dim() == 0), dtype=x.dtype) for x in joint._tangents()]
    with torch.no_grad():
        outputs = _Ranks(joint.module, ranks).run(*joint.primals, *tangents, enable_io_processing=False)
    return outputs, {t.op for t in transfers(graph, ranks) if t.phase == "backward"}


def gradients_of(joint: Joint, outputs: list[Any]) -> dict[str, list[Tensor]]:
    found = zip(joint.names, outputs[joint.outputs :], strict=True)
    return {name: list(terms) for name, terms in found if name is not None and terms is not None}


@pytest.mark.parametrize("length", [16, 13])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_mean_of_the_terms_is_the_gradient(ranks: int, length: int) -> None:
    torch.manual_seed(0)
    model = models.get("linear_llama3:tiny", **SHAPE)().double()
    ids = torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(0))
    inputs = {"ids": ids, "labels": ids.clone()}
    expected, joint = eager(model, inputs), capture(model, inputs)
    outputs, collectives = run(joint, ranks, gradients="partial", nan_padding=True)
    terms = gradients_of(joint, outputs)
    loss = next(x[0] for x in outputs[: joint.outputs] if x[0].dim() == 0)
    assert expected.error(loss, {n: torch.stack(x).mean(0) for n, x in terms.items()}) <= 1e-9
    assert "all_reduce" not in collectives
    assert any(not torch.equal(x[0], x[1]) for x in terms.values())  # or it would prove nothing


class _Embedded(nn.Module):
    """A linear map of an input that has a gradient too; the bias is also the output's own gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, embedded: Tensor, table: Tensor) -> Tensor:
        scores = torch.nn.functional.scaled_dot_product_attention(embedded, embedded, embedded)
        return (scores * self.scale * table).pow(2).sum()


def test_the_gradient_of_an_input_is_whole() -> None:
    torch.manual_seed(0)
    model = _Embedded().double()
    embedded = torch.randn(1, 1, 8, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(4, dtype=torch.float64, requires_grad=True)
    model(embedded, table).backward()
    expected = {"embedded": embedded.grad, "table": table.grad, "scale": model.scale.grad}
    joint = capture(model, {"embedded": embedded, "table": table})
    outputs, _ = run(joint, 2, gradients="partial")
    for primal, name, found in zip(joint.primals, joint.names, outputs[joint.outputs :], strict=True):
        which = name or ("embedded" if primal.shape == embedded.shape else "table")
        if name is None:
            assert torch.equal(found[0], found[1]), which
        torch.testing.assert_close(torch.stack(list(found)).mean(0), expected[which], rtol=1e-9, atol=1e-12)


def test_they_are_whole_by_default() -> None:
    torch.manual_seed(0)
    model = models.get("linear_llama3:tiny", **SHAPE)().double()
    ids = torch.zeros(1, 8, dtype=torch.int64)
    joint = capture(model, {"ids": ids, "labels": ids})
    outputs, collectives = run(joint, 2)
    assert "all_reduce" in collectives
    assert all(torch.equal(*terms) for terms in gradients_of(joint, outputs).values())
