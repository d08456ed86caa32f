"""Gradients of returned tensors that are computed piece by piece: small graphs by hand, then whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from spcompile import _torch, ports, simulate
from spcompile.passes import chunks
from spcompile.passes.chunks import in_pieces
from spcompile.sharded import Letter
from spcompile.simulate import simulated
from tests.outputs_worker import LM, LOSSES, gradients, seeded, tokens, worst
from tests.proof import relative_error

aten = torch.ops.aten
B, T, V, H = 2, 7, 5, 3
R = B * T


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """14 rows are 5, 5 and 4."""
    monkeypatch.setattr(chunks, "LEAST_BYTES", 1)
    monkeypatch.setattr(chunks, "PIECES", 3)


# ---------------------------------------------------------------------------------------- graphs by hand


class Operands:
    """Of functions of a gradient ``g`` to which a late one is added by ``late``."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.logits, self.hidden = torch.randn(B, T, V).double(), torch.randn(R, H).double()
        self.weight, self.token = torch.randn(V, H).double(), torch.zeros((), dtype=torch.float64)
        self.other = self.token.clone()
        self.per_token, self.labels = torch.randn(T).double(), torch.randint(V, (R, 1))


def late(g: Tensor, o: Operands) -> Tensor:
    return ports.add_late(g, o.token, [1], "")


def both_products(o: Operands) -> Any:
    g = late(o.logits.exp() * 0.1, o).reshape(R, V)
    return g.t() @ o.hidden, g @ o.weight


def turned_products(o: Operands) -> Any:
    g = late(o.logits.sin(), o).reshape(R, V)
    return o.hidden.t() @ g, o.weight.t() @ g.t()


def bias(o: Operands) -> Any:
    g = late(o.logits.sin(), o)
    flat = g.reshape(R, V)
    return g.sum([0, 1], True), flat.sum([0]), flat @ o.weight


def softmax(o: Operands) -> Any:
    x = o.logits.reshape(R, V)
    e = (x - x.amax(1, True)).exp()
    p = e / e.sum(-1, keepdim=True)
    hot = torch.zeros_like(x).scatter(1, o.labels, -1.0)
    g = late((p + hot).reshape(B, T, V) * o.per_token.view(1, T, 1), o).reshape(R, V)
    return g.t() @ o.hidden, g @ o.weight


def columns_left_out(o: Operands) -> Any:
    top = o.logits.amax(2)  # [B, T]
    g = late(o.logits * (top * o.per_token).unsqueeze(2), o).reshape(R, V)
    return g @ o.weight


def masked_after_turning(o: Operands) -> Any:
    g = late(o.logits.sin(), o).reshape(R, V)
    mask = o.per_token.expand(B, T).reshape(R) > 0
    scale = o.weight[:, :1]
    return torch.where(mask.view(1, R), g.t() * scale, 0.0) @ o.hidden, g @ o.weight


def added_late(o: Operands) -> Any:
    """The gradient of a tied embedding comes after all that the product of the columns leads to."""
    g = late(o.logits.sin(), o).reshape(R, V)
    before = (g @ o.weight).sin()
    embedding = torch.zeros(V, H).double().index_add(0, o.labels[:, 0], before)
    return torch.addmm(embedding, g.t(), o.hidden)


def read_later(o: Operands) -> Any:
    """What a product needs is computed after the other is used."""
    g = late(o.logits.sin(), o).reshape(R, V)
    used = (g @ o.weight).sin()
    hidden = o.hidden.cos()
    return used, g.t() @ hidden


def two_letters(o: Operands) -> Any:
    g = ports.add_late(late(o.logits.sin(), o).cos(), o.other, [1], "").reshape(R, V)
    return g @ o.weight


DONE = [
    both_products,
    turned_products,
    bias,
    softmax,
    columns_left_out,
    masked_after_turning,
    added_late,
    read_later,
    two_letters,
]


def returned(o: Operands) -> Any:
    g = late(o.logits.sin(), o).reshape(R, V)
    return g @ o.weight, g


def over_tokens(o: Operands) -> Any:
    g = late(o.logits.sin(), o)
    return g.cumsum(1).reshape(R, V) @ o.weight


def with_itself(o: Operands) -> Any:
    g = late(o.logits.sin(), o).reshape(R, V)
    return g.t() @ g


def normalised_over_rows(o: Operands) -> Any:
    g = late(o.logits.sin(), o).reshape(R, V)
    return (g - g.sum([0], True)) @ o.weight


def broadcast_over_rows(o: Operands) -> Any:
    g = late(o.logits + o.logits[:1], o).reshape(R, V)
    return g @ o.weight


def read_and_computed(o: Operands) -> Any:
    g = late(o.logits.sin(), o).reshape(R, V)
    return g.t() @ (g @ o.weight)


def late_is_returned(o: Operands) -> Any:
    inner = late(o.logits.sin(), o)
    g = ports.add_late(inner.cos(), o.other, [1], "").reshape(R, V)
    return g @ o.weight, inner.sum(1)


def added_to_itself(o: Operands) -> Any:
    g = late(o.logits.sin(), o).reshape(R, V)
    return torch.addmm(g, g, o.weight @ o.weight.t())


LEFT = [
    late_is_returned,
    added_to_itself,
    returned,
    over_tokens,
    with_itself,
    normalised_over_rows,
    broadcast_over_rows,
    read_and_computed,
]


def traced(function: Callable[[Operands], Any]) -> tuple[fx.GraphModule, int, list[Tensor]]:
    """The function's graph after the pass, how many values its pieces read, and its operands."""
    names, values = zip(*vars(Operands()).items(), strict=True)

    def flat(*tensors: Tensor) -> Any:
        o = Operands.__new__(Operands)
        vars(o).update(zip(names, tensors, strict=True))
        return function(o)

    gm = _torch.make_fx(flat, decomposition_table=_torch.select_decomp_table(), tracing_mode="fake")(*values)
    in_pieces(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm, count_rows(gm.graph), list(values)


def count_rows(graph: fx.Graph) -> int:
    return sum(n.target is torch.ops.spcompile.rows.default for n in graph.nodes)


@pytest.mark.parametrize("function", [*DONE, *LEFT], ids=lambda f: f.__name__)
@pytest.mark.parametrize("letter", [False, True])
def test_a_gradient_in_pieces_is_the_gradient(function: Callable[[Operands], Any], letter: bool) -> None:
    gm, rows, values = traced(function)
    assert (rows >= 3) == (function in DONE)
    given = torch.randn(B, T, V, dtype=torch.float64)
    expected = Operands()
    found = gm(*(deliver(given) if letter and x.dim() == 0 else x for x in values))
    if letter:
        expected.token, expected.other = deliver(given), deliver(given)
    wanted = function(expected)
    pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, wanted)), strict=True)
    assert all(relative_error(a, b) <= 1e-12 for a, b in pairs)
    assert not ports._opened


def deliver(gradient: Tensor) -> Tensor:
    return ports.deliver(Letter(gradient))


def test_small_and_unknown_sizes_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LEAST_BYTES", R * V * 8 + 1)
    assert traced(both_products)[1] == 0
    monkeypatch.setattr(chunks, "LEAST_BYTES", 1)
    monkeypatch.setattr(chunks, "PIECES", 8)
    assert traced(both_products)[1] == 0


def test_nothing_is_computed_twice_or_left_over() -> None:
    gm, _, _ = traced(softmax)
    used = [n.target for n in gm.graph.nodes if n.users]
    assert used.count(aten.exp.default) == 3 and used.count(ports.ops.add_late.default) == 3
    assert all(list(n.meta["val"].shape) != [R, V] for n in gm.graph.nodes if n.target is aten.exp.default)


# ------------------------------------------------------------------------------------------- whole models


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each backward graph that is compiled, how many values its pieces read."""
    counts: list[int] = []

    def counted(graph: fx.Graph) -> None:
        in_pieces(graph)
        counts.append(count_rows(graph))

    monkeypatch.setattr(simulate, "in_pieces", counted)
    return counts


@pytest.mark.parametrize(("ranks", "length"), [(2, 13), (3, 12)])
def test_losses_are_eager(ranks: int, length: int, found: list[int]) -> None:
    net, ids = seeded(LM), tokens(length)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=simulated(ranks, nan_padding=True))

    def twice(call: Any) -> Tensor:
        out = call(ids, ids)
        out[0].backward(retain_graph=True)
        return LOSSES["both"](out)

    for loss in LOSSES.values():
        expected = gradients(net, lambda loss=loss: loss(net(ids, ids)))
        assert worst(gradients(net, lambda loss=loss: loss(compiled(ids, ids))), expected) <= 1e-9
    with torch._functorch.config.patch(donated_buffer=False):
        expected = gradients(net, lambda: twice(net))
        assert worst(gradients(net, lambda: twice(compiled)), expected) <= 1e-9
    assert found and all(found) and not ports._opened


@pytest.mark.slow
def test_a_hugging_face_model_in_pieces_is_eager(found: list[int]) -> None:
    from tests.huggingface import build
    from tests.test_huggingface import TOLERANCE

    net, inputs = build("llama", 13)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=simulated(2))
    for loss in (lambda out: out.loss, lambda out: out.loss + out.logits[:, 1:].sin().mean()):
        expected = gradients(net, lambda loss=loss: loss(net(**inputs)))
        assert worst(gradients(net, lambda loss=loss: loss(compiled(**inputs))), expected) <= TOLERANCE
    assert found and all(found)


def test_rounded_pieces_are_added_up_as_precisely_as_the_whole(found: list[int]) -> None:
    net, ids = seeded(LM), tokens()
    expected = gradients(net, lambda: net(ids, ids)[0])
    rounded = seeded(LM).bfloat16()
    errors = []
    for least in (1, 2**40):
        chunks.LEAST_BYTES = least
        torch._dynamo.reset()
        compiled = torch.compile(rounded, backend=simulated(2))
        got = gradients(rounded, lambda compiled=compiled: compiled(ids, ids)[0])
        errors.append(worst({n: g.double() for n, g in got.items()}, expected))
    assert found[0] > 0 and found[1] == 0 and errors[0] <= 1.5 * errors[1]
