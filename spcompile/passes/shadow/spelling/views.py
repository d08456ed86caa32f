"""Views, copies, parts and tensors that are made: one spelling of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spcompile.passes.shadow.spelling.call import Call, Derive, Rewrite, each
from spcompile.passes.shadow.values import Value

__all__ = ["REWRITES", "numbers", "shaped"]

_PARTS = {"split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk", "tensor_split"}


# ---------------------------------------------------------------- views and copies


def shaped(c: Call, x: Value) -> Call:
    return c.of("reshape", "default", self=x, shape=list(c.shape))


def _reshape(c: Call, derive: Derive) -> Call | None:
    x = c.source
    return None if x is None or c.overload == "dtype" else shaped(c, x)


def _permuted(c: Call, x: Value, order: Sequence[int]) -> Call:
    return c.of("permute", "default", self=x, dims=list(order))


def _permute(c: Call, derive: Derive) -> Call:
    return _permuted(c, c.args["self"], [d % c.rank for d in c.args["dims"]])


def _transpose(c: Call, derive: Derive) -> Call:
    a, b = (x for name, x in c.args.items() if name != "self")
    return _swapped(c, a, b) if c.rank else c.of("clone", "default", self=c.args["self"])


def _swapped(c: Call, a: int, b: int) -> Call:
    order = list(range(c.rank))
    order[a % c.rank], order[b % c.rank] = order[b % c.rank], order[a % c.rank]
    return _permuted(c, c.args["self"], order)


def _last_two(c: Call, derive: Derive) -> Call:
    return _swapped(c, -1, -2) if c.rank >= 2 else c.of("clone", "default", self=c.args["self"])


def _reversed(c: Call, derive: Derive) -> Call:
    return _permuted(c, c.args["self"], range(c.rank)[::-1])


def _movedim(c: Call, derive: Derive) -> Call:
    """Output dim n is input dim order[n]."""
    ends = c.args["source"], c.args["destination"]
    source, destination = ([e % c.rank] if isinstance(e, int) else [d % c.rank for d in e] for e in ends)
    rest = iter([d for d in range(c.rank) if d not in source])
    where = dict(zip(destination, source, strict=True))
    return _permuted(c, c.args["self"], [where[n] if n in where else next(rest) for n in range(c.rank)])


def _expand(c: Call, derive: Derive) -> Call:
    return c.of("expand", "default", self=c.args["self"], size=list(c.shape))


def _copy(c: Call, derive: Derive) -> Call | None:
    x = c.source
    if x is None or x.shape != c.shape:
        return None
    if x.dtype == c.dtype:
        return c.of("clone", "default", self=x)
    return c.of("_to_copy", "default", self=x, dtype=c.dtype)


def _dropout(c: Call, derive: Derive) -> Call | None:
    inert = c.args.get("p") == 0 or c.args.get("train") is False
    return _copy(c, derive) if inert else None


# ---------------------------------------------------------------- parts


def _cut(c: Call, x: Value, dim: int, start: int, stop: int, step: int = 1) -> Call:
    if c.shape == x.shape and step == 1:
        return c.of("clone", "default", self=x)
    return c.of("slice", "Tensor", self=x, dim=dim, start=start, end=stop, step=step)


def _slice(c: Call, derive: Derive) -> Call:
    x = c.args["self"]
    dim = c.args.get("dim", 0) % len(x.shape)
    size, start, end = x.shape[dim], c.args.get("start") or 0, c.args.get("end")
    end = size if end is None else end
    start, end = (min(max(n + size if n < 0 else n, 0), size) for n in (start, end))
    return _cut(c, x, dim, start, end, c.args.get("step", 1))


def _narrow(c: Call, derive: Derive) -> Call | None:
    x, start = c.args["self"], c.args["start"]
    dim = c.args["dim"] % len(x.shape)
    if not isinstance(start, int):
        return None
    start = start % x.shape[dim] if start < 0 else start
    return _cut(c, x, dim, start, start + c.args["length"])


def _select(c: Call, derive: Derive) -> Call:
    x = c.args["self"]
    dim = c.args["dim"] % len(x.shape)
    return c.of("select", "int", self=x, dim=dim, index=c.args["index"] % x.shape[dim])


def _item(c: Call, derive: Derive) -> Call:
    """One of several results; `before` is the shapes of those before it."""
    many, index = c.args["self"], c.args["index"]
    x = many.args.get("self")
    if many.name not in _PARTS or not isinstance(x, Value):
        return c.of("getitem", "", self=many, index=index)
    dim = many.args.get("dim", 0) % len(x.shape)
    if many.name == "unbind":
        return c.of("select", "int", self=x, dim=dim, index=index)
    start = sum(shape[dim] for shape in c.args["before"])
    return _cut(c, x, dim, start, start + c.shape[dim])


def _along(c: Call, derive: Derive) -> Call | None:
    """With its dim counted from the front."""
    rank = c.rank or 1
    dim = c.args.get("dim", -1 if c.name == "diff" else 0)
    return c.of(c.name, c.overload, **c.args | {"dim": dim % rank}) if isinstance(dim, int) else None


def _softmax(c: Call, derive: Derive) -> Call:
    return c.of("softmax", "int", **c.args | {"dim": c.args["dim"] % (c.rank or 1)})


def _flip(c: Call, derive: Derive) -> Call:
    """One dim at a time."""
    x, dims = c.args["self"], [d % c.rank for d in c.args["dims"]]
    if not dims:
        return c.of("clone", "default", self=x)
    for d in dims[:-1]:
        x = derive(c.of("flip", "default", self=x, dims=[d]))
    return c.of("flip", "default", self=x, dims=dims[-1:])


# ---------------------------------------------------------------- creation


def _filled(c: Call, number: Any) -> Call:
    if c.shape == ():
        return c.of("literal", "", value=number)
    how = {"dtype": c.dtype, "device": c.device}
    return c.of("full", "default", size=list(c.shape), fill_value=number, **how)


def numbers(c: Call, start: Any, end: Any, step: Any) -> Call:
    how = {"dtype": c.dtype, "device": c.device}
    return c.of("arange", "start_step", start=start, end=end, step=step, **how)


def _zeros(c: Call, derive: Derive) -> Call:
    return _filled(c, 0)


def _ones(c: Call, derive: Derive) -> Call:
    return _filled(c, 1)


def _full(c: Call, derive: Derive) -> Call:
    """A number, or a tensor of one."""
    number = next(c.args[n] for n in ("fill_value", "value", "s") if n in c.args)
    if not isinstance(number, Value):
        return _filled(c, number)
    if number.dtype != c.dtype:
        number = derive(c.made(number.shape).of("_to_copy", "default", self=number, dtype=c.dtype))
    return c.of("expand", "default", self=number, size=list(c.shape))


def _arange(c: Call, derive: Derive) -> Call:
    return numbers(c, c.args.get("start", 0), c.args["end"], c.args.get("step", 1))


REWRITES: dict[str, Rewrite] = {
    **each("view reshape _unsafe_view view_as reshape_as flatten unflatten ravel _reshape_alias", _reshape),
    **each("unsqueeze squeeze", _reshape),
    "permute": _permute,
    "numpy_T": _reversed,
    **each("transpose swapaxes swapdims", _transpose),
    **each("t mT mH adjoint matrix_H", _last_two),
    **each("movedim moveaxis", _movedim),
    **each("expand expand_as broadcast_to", _expand),
    **each("clone contiguous alias lift_fresh lift_fresh_copy to _to_copy type_as", _copy),
    **each("dropout alpha_dropout feature_dropout", _dropout),
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "getitem": _item,
    "flip": _flip,
    **each("cumsum diff cat stack", _along),
    **each("softmax special_softmax", _softmax),
    **each("zeros zeros_like new_zeros zero", _zeros),
    **each("ones ones_like new_ones", _ones),
    **each("full full_like new_full fill scalar_tensor", _full),
    "arange": _arange,
}
