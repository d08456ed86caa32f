"""Sums, products, contractions and choices: one spelling of each."""

from __future__ import annotations

import string
from typing import Any

import torch

from spcompile.passes.shadow.spelling.call import Call, Derive, Rewrite, each
from spcompile.passes.shadow.spelling.views import numbers, shaped
from spcompile.passes.shadow.values import Value

__all__ = ["REWRITES", "SYNONYMS"]


# ---------------------------------------------------------------- arithmetic


def _added(c: Call, a: Any, b: Any, alpha: Any = 1) -> Call:
    """a + alpha b, of which `a` is a tensor."""
    if not isinstance(b, Value):  # PyTorch's own decompositions don't take three numbers by place
        b, alpha = alpha * b, 1
    more = {} if alpha == 1 else {"alpha": alpha}
    return c.of("add", "Tensor" if isinstance(b, Value) else "Scalar", self=a, other=b, **more)


def _times(c: Call, a: Any, b: Any) -> Call:
    """a b, of which `a` is a tensor."""
    return c.of("mul", "Tensor" if isinstance(b, Value) else "Scalar", self=a, other=b)


def _add(c: Call, derive: Derive) -> Call:
    return _added(c, c.args["self"], c.args["other"], c.args.get("alpha", 1))


def _sub(c: Call, derive: Derive) -> Call:
    return _added(c, c.args["self"], c.args["other"], -c.args.get("alpha", 1))


def _rsub(c: Call, derive: Derive) -> Call:
    x, y, alpha = c.args["self"], c.args["other"], c.args.get("alpha", 1)
    if isinstance(y, Value):
        return _added(c, y, x, -alpha)
    return _added(c, derive(_times(c.made(x.shape), x, -alpha)), y)


def _neg(c: Call, derive: Derive) -> Call:
    return _times(c, c.args["self"], -1)


def _addc(c: Call, derive: Derive) -> Call:
    """self + value tensor1 tensor2, or divided by it."""
    a, b = c.args["tensor1"], c.args["tensor2"]
    inner = c.made(torch.broadcast_shapes(a.shape, b.shape))
    product = inner.of("mul" if c.name == "addcmul" else "div", "Tensor", self=a, other=b)
    return _added(c, c.args["self"], derive(product), c.args.get("value", 1))


def _lerp(c: Call, derive: Derive) -> Call:
    """start + weight (end - start)."""
    start, end = c.args["self"], c.args["end"]
    inner = c.made(torch.broadcast_shapes(start.shape, end.shape))
    way = derive(_added(inner, end, start, -1))
    return _added(c, start, derive(_times(c, way, c.args["weight"])))


def _square(c: Call, derive: Derive) -> Call:
    return c.of("pow", "Tensor_Scalar", self=c.args["self"], exponent=2)


def _floor_divide(c: Call, derive: Derive) -> Call:
    overload = "Tensor_mode" if isinstance(c.args["other"], Value) else "Scalar_mode"
    return c.of("div", overload, **c.args, rounding_mode="floor")


def _clamp(c: Call, derive: Derive) -> Call:
    bounds = {end: c.args[end] for end in ("min", "max") if c.args.get(end) is not None}
    tensors = any(isinstance(x, Value) for x in bounds.values())
    return c.of("clamp", "Tensor" if tensors else "default", self=c.args["self"], **bounds)


def _extreme(c: Call, derive: Derive) -> Call | None:
    """`max` and `min` of two tensors."""
    name = {"max": "maximum", "min": "minimum"}[c.name]
    return c.of(name, "default", **c.args) if c.overload == "other" else None


# ---------------------------------------------------------------- contractions


def _contracted(c: Call, equation: str, *operands: Value) -> Call:
    return c.of("einsum", "default", equation=equation, tensors=list(operands))


def _matmul(c: Call, derive: Derive) -> Call:
    return _matrices(c, c.args["self"], next(c.args[n] for n in ("other", "mat2", "vec") if n in c.args))


def _matrices(c: Call, a: Value, b: Value) -> Call:
    """`torch.matmul`, letters of the batch from the right."""
    batch = string.ascii_letters[: max(len(a.shape), len(b.shape), 2) - 2]
    row, column = "y" if len(a.shape) > 1 else "", "z" if len(b.shape) > 1 else ""
    left = batch[len(batch) - max(len(a.shape) - 2, 0) :] + row + "x"
    right = batch[len(batch) - max(len(b.shape) - 2, 0) :] + "x" + column
    return _contracted(c, f"{left},{right}->{batch}{row}{column}", a, b)


def _linear(c: Call, derive: Derive) -> Call | None:
    x, weight, bias = c.args["input"], c.args["weight"], c.args.get("bias")
    if len(weight.shape) != 2:
        return None
    batch = string.ascii_letters[: len(x.shape) - 1]
    product = _contracted(c, f"{batch}x,zx->{batch}z", x, weight)
    return product if bias is None else _added(c, derive(product), bias)


def _added_product(c: Call, derive: Derive) -> Call:
    """beta self + alpha (a b)."""
    pairs = ("batch1", "batch2"), ("mat1", "mat2"), ("mat", "vec"), ("vec1", "vec2")
    a, b = next((c.args[x], c.args[y]) for x, y in pairs if x in c.args)
    alpha, beta = c.args.get("alpha", 1), c.args.get("beta", 1)
    product = _contracted(c, "y,z->yz", a, b) if c.name == "addr" else _matrices(c, a, b)
    if alpha != 1:
        product = _times(c, derive(product), alpha)
    return product if beta == 0 else _added(c, derive(product), c.args["self"], beta)


def _outer(c: Call, derive: Derive) -> Call:
    return _contracted(c, "y,z->yz", c.args["self"], c.args["vec2"])


def _dot(c: Call, derive: Derive) -> Call:
    return _contracted(c, "x,x->", c.args["self"], c.args["tensor"])


def _tensordot(c: Call, derive: Derive) -> Call:
    a, b = c.args["self"], c.args["other"]
    left = list(string.ascii_letters[: len(a.shape)])
    right = list(string.ascii_letters[len(a.shape) : len(a.shape) + len(b.shape)])
    summed = set()
    for x, y in zip(c.args["dims_self"], c.args["dims_other"], strict=True):
        right[y % len(right)] = left[x % len(left)]
        summed.add(left[x % len(left)])
    out = [letter for letter in (*left, *right) if letter not in summed]
    return _contracted(c, f"{''.join(left)},{''.join(right)}->{''.join(out)}", a, b)


def _sum(c: Call, derive: Derive) -> Call | None:
    x, dim = c.source, c.args.get("dim")
    if x is None:
        return None
    over = [dim] if isinstance(dim, int) else list(dim or range(len(x.shape)))
    more = {} if c.args.get("dtype") is None else {"dtype": c.args["dtype"]}
    dims, keep = [d % len(x.shape) for d in over] if x.shape else [], c.args.get("keepdim", False)
    return c.of("sum", "dim_IntList", self=x, dim=dims, keepdim=keep, **more)


# ---------------------------------------------------------------- choices


def _where(c: Call, derive: Derive) -> Call:
    if "self" not in c.args:
        return c.of("nonzero_numpy", "default", self=c.args["condition"])
    return _chosen(c, c.args["condition"], c.args["self"], c.args["other"])


def _chosen(c: Call, condition: Value, a: Any, b: Any) -> Call:
    names = {(True, True): "self", (True, False): "ScalarOther", (False, True): "ScalarSelf"}
    overload = names.get((isinstance(a, Value), isinstance(b, Value)), "Scalar")
    return c.of("where", overload, condition=condition, self=a, other=b)


def _masked_fill(c: Call, derive: Derive) -> Call:
    return _chosen(c, c.args["mask"], c.args["value"], c.args["self"])


def _index_put(c: Call, derive: Derive) -> Call | None:
    """x[mask] = one number."""
    x, value, at = c.args["self"], c.args["values"], c.args["indices"]
    mask = at[0] if len(at) == 1 else None
    one = isinstance(value, Value) and value.shape == () and not c.args.get("accumulate")
    if not one or not isinstance(mask, Value) or mask.dtype != torch.bool or mask.shape != c.shape:
        return None
    return _chosen(c, mask, value, x)


def _triangle(c: Call, derive: Derive) -> Call:
    """j <= i + diagonal, or j >= i + diagonal."""
    rows, columns = c.shape[-2:]
    places = c.made((rows,), torch.int64)
    i = derive(shaped(places.made((rows, 1)), derive(numbers(places, 0, rows, 1))))
    i = derive(_added(places.made((rows, 1)), i, c.args.get("diagonal", 0)))
    j = derive(numbers(places.made((columns,)), 0, columns, 1))
    test = c.made((rows, columns), torch.bool)
    keep = derive(test.of("ge" if c.name == "tril" else "le", "Tensor", self=i, other=j))
    return _chosen(c, keep, c.args["self"], False if c.dtype == torch.bool else 0)


SYNONYMS = {
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "absolute": "abs",
    "concat": "cat",
    "concatenate": "cat",
    "clip": "clamp",
}
"""Names of one operation with one schema."""
REWRITES: dict[str, Rewrite] = {
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "neg": _neg,
    "lerp": _lerp,
    "square": _square,
    **each("addcmul addcdiv", _addc),
    "floor_divide": _floor_divide,
    **each("clamp clamp_min clamp_max", _clamp),
    **each("max min", _extreme),
    **each("matmul mm bmm mv linalg_matmul", _matmul),
    **each("addmm addmv addr baddbmm", _added_product),
    **each("outer ger", _outer),
    "linear": _linear,
    "dot": _dot,
    "tensordot": _tensordot,
    "sum": _sum,
    "where": _where,
    "masked_fill": _masked_fill,
    "index_put": _index_put,
    **each("tril triu", _triangle),
}
