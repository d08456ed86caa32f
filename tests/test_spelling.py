"""One spelling of every operation: each row of the tables has a sample, which is canonical and computes what
it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from spcompile._torch import FakeTensorMode
from spcompile.passes.shadow import Shadow, Value, trace
from spcompile.passes.shadow.spelling import arithmetic, views
from spcompile.passes.shadow.values import values_in

X = torch.arange(12.0).reshape(3, 4) + 1
Sample = Callable[[Tensor], Any]
aten = torch.ops.aten

SAMPLES: dict[str, list[Sample]] = {
    "add": [lambda x: x + 2, lambda x: torch.add(x, x.sum(), alpha=3), lambda x: x + x],
    "sub": [lambda x: x - 2, lambda x: torch.sub(x, x.exp(), alpha=2)],
    "rsub": [lambda x: 1 - x, lambda x: torch.rsub(x, x * x, alpha=2)],
    "neg": [lambda x: -x],
    "lerp": [lambda x: torch.lerp(x, x * x, 0.25), lambda x: torch.lerp(x, x * x, x.sigmoid())],
    "square": [lambda x: x.square()],
    "addcmul": [lambda x: torch.addcmul(x, x[:1], x[:, :1], value=0.5)],
    "addcdiv": [lambda x: torch.addcdiv(x, x[:1], x[:, :1], value=0.5)],
    "floor_divide": [lambda x: torch.floor_divide(x, 3), lambda x: x // x[:1]],
    "clamp": [lambda x: x.clamp(2, 5), lambda x: x.clamp(min=x[:1])],
    "clamp_min": [lambda x: x.clamp_min(3)],
    "clamp_max": [lambda x: x.clamp_max(3)],
    "max": [lambda x: torch.max(x, x[:1]), lambda x: x.max(1)[0]],
    "min": [lambda x: torch.min(x, x[:1])],
    "matmul": [
        *(lambda x: x @ x.mT, lambda x: x @ x[0], lambda x: x[0] @ x.mT, lambda x: x[0] @ x[1]),
        *(lambda x: x[None] @ x.mT.expand(5, 2, 4, 3), lambda x: x.expand(5, 1, 3, 4) @ x.mT.expand(2, 4, 3)),
    ],
    "mm": [lambda x: torch.mm(x, x.mT)],
    "bmm": [lambda x: torch.bmm(x[None], x.mT[None])],
    "mv": [lambda x: torch.mv(x, x[0])],
    "linalg_matmul": [lambda x: torch.linalg.matmul(x, x.mT)],
    "addmm": [
        lambda x: torch.addmm(x[:, :3], x, x.mT),
        lambda x: torch.addmm(x[0, 0], x, x.mT, beta=2, alpha=3),
    ],
    "addr": [lambda x: torch.addr(x[:, :2], x[:, 0], x[0, :2], alpha=2)],
    "addmv": [lambda x: torch.addmv(x[:, 0], x, x[0])],
    "baddbmm": [
        lambda x: torch.baddbmm(x[:1, :3], x[None], x.mT[None], beta=0.5, alpha=2),
        lambda x: torch.baddbmm(x[:1, :3], x[None], x.mT[None], beta=0, alpha=2),
    ],
    "outer": [lambda x: torch.outer(x[0], x[1])],
    "ger": [lambda x: torch.ger(x[0], x[1])],
    "linear": [lambda x: F.linear(x, x[:2]), lambda x: F.linear(x[None], x[:2], x[0, :2])],
    "dot": [lambda x: torch.dot(x[0], x[1])],
    "tensordot": [
        lambda x: torch.tensordot(x, x, ([1], [1])),
        lambda x: torch.tensordot(x, x, ([0, 1], [0, 1])),
    ],
    "sum": [
        *(lambda x: x.sum(), lambda x: x.sum(-1, keepdim=True), lambda x: x.sum((0, 1))),
        lambda x: x.sum(0),
    ],
    "where": [
        *(lambda x: torch.where(x > 5, x, 0.0), lambda x: torch.where(x > 5, 0.0, x)),
        *(lambda x: torch.where(x > 5, x, x[:1]), lambda x: torch.where(x > 5, 1.0, 0.0)),
    ],
    "masked_fill": [lambda x: x.masked_fill(x > 5, 0.0), lambda x: x.masked_fill(x > 5, x[0, 0])],
    "index_put": [lambda x: _written(x, x > 5), lambda x: aten.index_put(x, [x > 5], x[0, 0])],
    "tril": [lambda x: x.tril(), lambda x: (x > 2).tril(-1), lambda x: x[None].tril(1)],
    "triu": [lambda x: x.triu(), lambda x: (x > 2).triu(1)],
    "view": [lambda x: x.view(2, 6), lambda x: x.view(torch.int32)],
    "reshape": [lambda x: x.mT.reshape(2, 6)],
    "_unsafe_view": [lambda x: aten._unsafe_view(x, [4, 3])],
    "view_as": [lambda x: x.view_as(torch.empty(2, 6))],
    "reshape_as": [lambda x: x.reshape_as(torch.empty(2, 6))],
    "flatten": [lambda x: x.flatten()],
    "unflatten": [lambda x: x.unflatten(1, (2, 2))],
    "ravel": [lambda x: x.ravel()],
    "_reshape_alias": [lambda x: aten._reshape_alias(x, [2, 6], [6, 1])],
    "unsqueeze": [lambda x: x[:, None]],
    "squeeze": [lambda x: x[:1].squeeze(), lambda x: x[:, :1].squeeze(1)],
    "permute": [lambda x: x[None].permute(1, -1, 0)],
    "numpy_T": [lambda x: aten.numpy_T(x[None].expand(2, 3, 4))],
    "transpose": [lambda x: x.transpose(-1, 0)],
    "swapaxes": [lambda x: x.swapaxes(0, 1)],
    "swapdims": [lambda x: x.swapdims(0, 1)],
    "t": [lambda x: x.t(), lambda x: x[0].t()],
    "mT": [lambda x: x.mT],
    "mH": [lambda x: x.mH],
    "adjoint": [lambda x: x.adjoint()],
    "matrix_H": [lambda x: x.H],
    "movedim": [lambda x: x[None].movedim(0, -1), lambda x: x[None].movedim((0, 1), (2, 0))],
    "moveaxis": [lambda x: x[None].moveaxis(2, 0)],
    "expand": [lambda x: x.expand(2, -1, -1)],
    "expand_as": [lambda x: x[:1].expand_as(x)],
    "broadcast_to": [lambda x: torch.broadcast_to(x, (2, 3, 4))],
    "clone": [lambda x: x.clone()],
    "contiguous": [lambda x: x.mT.contiguous()],
    "alias": [lambda x: aten.alias(x)],
    "lift_fresh": [lambda x: aten.lift_fresh(x)],
    "lift_fresh_copy": [lambda x: aten.lift_fresh_copy(x)],
    "to": [lambda x: x.to(torch.float64), lambda x: x.to(torch.float32), lambda x: x.to(x.device)],
    "_to_copy": [lambda x: aten._to_copy(x, dtype=torch.int64)],
    "type_as": [lambda x: x.type_as(torch.empty(1, dtype=torch.float64))],
    "dropout": [lambda x: F.dropout(x, 0.0), lambda x: F.dropout(x, 0.5, training=False)],
    "alpha_dropout": [lambda x: F.alpha_dropout(x, 0.5, training=False)],
    "feature_dropout": [lambda x: aten.feature_dropout(x, 0.5, False)],
    "slice": [lambda x: x[:, 1:-1], lambda x: x[-2:], lambda x: x[:, ::2], lambda x: x[:99], lambda x: x[5:]],
    "narrow": [lambda x: x.narrow(-1, -2, 2)],
    "select": [lambda x: x[:, -1], lambda x: x.select(-1, 2)],
    "getitem": [
        *(lambda x: x.split(3, -1)[1], lambda x: x.split([1, 3], 1)[1], lambda x: x.chunk(2)[1]),
        *(lambda x: x.unbind(-1)[2], lambda x: torch.tensor_split(x, 3, 1)[1], lambda x: x.sort(1)[0]),
    ],
    "flip": [lambda x: x.flip(-1, 0)],
    "cumsum": [lambda x: x.cumsum(-1)],
    "diff": [lambda x: x.diff(), lambda x: x.diff(dim=0)],
    "cat": [lambda x: torch.cat([x, x], -1), lambda x: torch.cat([x, x])],
    "stack": [lambda x: torch.stack([x, x], -1), lambda x: torch.stack([x, x])],
    "softmax": [lambda x: x.softmax(-1), lambda x: torch.softmax(x, 0, dtype=torch.float64)],
    "special_softmax": [lambda x: torch.special.softmax(x, -1)],
    "zeros": [lambda x: torch.zeros(2, 3)],
    "zeros_like": [lambda x: torch.zeros_like(x, dtype=torch.bool)],
    "new_zeros": [lambda x: x.new_zeros(2)],
    "zero": [lambda x: x.clone().zero_()],
    "ones": [lambda x: torch.ones(2, 3)],
    "ones_like": [lambda x: torch.ones_like(x)],
    "new_ones": [lambda x: x.new_ones(())],
    "full": [lambda x: torch.full((2,), 3.0), lambda x: torch.full((), 3)],
    "full_like": [lambda x: torch.full_like(x, -torch.inf)],
    "new_full": [lambda x: x.new_full((2,), 3)],
    "fill": [lambda x: x.clone().fill_(2), lambda x: x.clone().fill_(x[0, 0].double())],
    "scalar_tensor": [lambda x: torch.scalar_tensor(3.0)],
    "arange": [lambda x: torch.arange(5), lambda x: torch.arange(1, 9, 2), lambda x: torch.arange(1, 4)],
}  # fmt: skip
SYNONYMS: dict[str, Sample] = {
    "multiply": lambda x: torch.multiply(x, 2),
    "subtract": lambda x: torch.subtract(x, x.exp()),
    "divide": lambda x: torch.divide(x, 2),
    "true_divide": lambda x: torch.true_divide(x, x),
    "negative": lambda x: torch.negative(x),
    "greater": lambda x: torch.greater(x, 5),
    "greater_equal": lambda x: torch.greater_equal(x, x[:1]),
    "less": lambda x: torch.less(x, 5),
    "less_equal": lambda x: torch.less_equal(x, 5),
    "not_equal": lambda x: torch.not_equal(x, 5),
    "__and__": lambda x: aten.__and__(x > 2, x < 5),
    "__or__": lambda x: aten.__or__(x > 2, x < 5),
    "__xor__": lambda x: aten.__xor__(x > 2, x < 5),
    "absolute": lambda x: torch.absolute(x - 5),
    "concat": lambda x: torch.concat([x, x]),
    "concatenate": lambda x: torch.concatenate([x, x], -1),
    "clip": lambda x: torch.clip(x, 2, 5),
}


def _written(x: Tensor, at: Tensor) -> Tensor:
    y = x.clone()
    y[at] = 0.0
    return y


def shadow_of(function: Sample, x: Tensor) -> Shadow:
    """Of a graph that calls the function and nothing else."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    graph.output(graph.call_function(function, (node,)))
    mode = FakeTensorMode()
    node.meta["example_value"] = mode.from_tensor(x)
    shadow = trace(fx.GraphModule({}, graph))
    assert shadow is not None
    return shadow


def result(shadow: Shadow) -> Value:
    found = next(r.result for r in shadow.records.values() if r.node.op == "output")
    (value,) = values_in([found])
    return value


def run(value: Value, x: Tensor) -> Any:
    """A Value, by the calls that it is made of."""
    if value.name == "input":
        return x
    args = pytree.tree_map_only(Value, lambda v: run(v, x), value.args)
    if value.name == "literal":
        return torch.tensor(args["value"], dtype=value.dtype)
    if value.name == "getitem":
        return args["self"][args["index"]]
    return getattr(getattr(torch.ops.aten, value.name), value.overload)(**args)


def seen(value: Value) -> set[str]:
    return {value.name}.union(*(seen(v) for v in value.operands()), set())


# What a rewritten name may still be: where it has no other spelling, or a type is viewed as another.
KEPT = {
    *(
        "add",
        "mul",
        "div",
        "clamp",
        "max",
        "sum",
        "where",
        "reshape",
        "permute",
        "expand",
        "clone",
        "_to_copy",
    ),
    *(
        "slice",
        "select",
        "getitem",
        "flip",
        "cumsum",
        "diff",
        "cat",
        "stack",
        "softmax",
        "full",
        "arange",
        "view",
    ),
}


@pytest.mark.parametrize(
    ("name", "number"), [(name, n) for name, samples in SAMPLES.items() for n in range(len(samples))]
)
def test_a_call_is_spelled_in_one_way(name: str, number: int) -> None:
    check(name, SAMPLES[name][number])


@pytest.mark.parametrize("name", SYNONYMS)
def test_a_synonym_is_the_name_it_stands_for(name: str) -> None:
    check(name, SYNONYMS[name])


def check(name: str, function: Sample) -> None:
    value = result(shadow_of(function, X))
    expected = function(X)
    found = run(value, X)
    assert found.shape == expected.shape == value.shape and found.dtype == expected.dtype == value.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    spelled = arithmetic.REWRITES.keys() | views.REWRITES.keys() | arithmetic.SYNONYMS.keys()
    assert not (seen(value) & spelled) - KEPT
    assert name in KEPT or name not in seen(value)


def test_every_row_has_a_sample() -> None:
    assert SAMPLES.keys() == arithmetic.REWRITES.keys() | views.REWRITES.keys()
    assert SYNONYMS.keys() == arithmetic.SYNONYMS.keys()


def test_parts_of_a_call_are_held_by_no_node() -> None:
    shadow = shadow_of(lambda x: F.linear(x, x[:2], x[0, :2]), X)
    value = result(shadow)
    assert value.name == "add" and not value.derived
    product = value.args["self"]
    assert product.name == "einsum" and product.derived and product.node is value.node
    assert product.users == [value]
