"""The exact domain: what each operation does to the conditions and integers that make a mask.

An entry is a Bool (a sympy Boolean) of bool tensors, otherwise a sympy number or a `Choice` of numbers. Any
number that its dtype may not hold exactly is data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from spcompile.passes.recognize.algebra.picks import Pick, joined, picks
from spcompile.passes.recognize.proof.context import Choice, Context, both, choose, either, is_bool, lift
from spcompile.passes.recognize.proof.domain import SHARED, TOO_LARGE, Domain, Reader, copied, where
from spcompile.passes.recognize.proof.values import (
    as_bool,
    as_number,
    at_least,
    equal,
    exact,
    leaves,
    number,
    rounded,
)
from spcompile.passes.recognize.proof.views import Index
from spcompile.passes.shadow import Value

__all__ = ["Exact"]


class Exact(Domain):
    """Evaluates masks; its results are kept in the Context."""

    def at(self, v: Value, index: Index) -> Any:
        key = (v, index)
        if key not in self.ctx.known:
            self.ctx.known[key] = self._at(v, index)
        return self.ctx.known[key]

    def _at(self, v: Value, index: Index) -> object:
        """What is read if it is of the right type, and exact in v's dtype; else data."""
        out = None if v.dtype is None or v.dtype.is_complex else self.read(v, index)
        if not self.holds(v, out):
            return self._data(v, index)
        if v.dtype == torch.bool:
            return out
        return lift(lambda x: rounded(x, v.dtype) if x.is_Number and x is not sympy.nan else x, out)

    def holds(self, v: Value, out: object) -> bool:
        """Whether `out` is of v's type, and exact in its dtype."""
        if v.dtype == torch.bool:
            return is_bool(out)
        ends = leaves(out)
        if out is None or len(ends) > TOO_LARGE or any(is_bool(x) for x in ends):
            return False
        return all(x.is_Number or _is_datum(x) or exact(self.ctx, x, v.dtype) for x in ends)

    def _data(self, v: Value, index: Index) -> sympy.Basic:
        if v in self.ctx.counts and v.dtype is not None:
            info = torch.iinfo(v.dtype)
            return self.ctx.data((v, index), False, info.min // 4, info.max // 4)
        return self.ctx.data((v, index), v.dtype == torch.bool)

    def test(self, v: Value, index: Index) -> Boolean:
        return as_bool(self.ctx, self.operand(v, index))

    def arithmetic(self, f: Callable[..., sympy.Expr], v: Value, index: Index, *names: str) -> object:
        return self.apply(lambda _, *xs: _combined(f, *xs), v, index, *names)

    def apply(self, f: Callable[..., object], v: Value, index: Index, *names: str) -> object:
        """f(ctx, *arguments). What is not followed is still the same wherever the same numbers meet."""
        given = tuple(self.operand(v.args.get(n), index) for n in names)
        if any(x is None for x in given) or v.args.get("rounding_mode"):
            return None
        out = f(self.ctx, *given)
        if self.holds(v, out):
            return out
        dtypes = tuple(getattr(v.args[n], "dtype", None) for n in names)
        return self.ctx.data((v.name, v.dtype, v.args.get("alpha", 1), dtypes, given), v.dtype == torch.bool)


def _is_datum(x: sympy.Expr) -> bool:
    return bool(x.is_Symbol) and x.name[0] == "y"


# ---------------------------------------------------------------- elementwise


def _elementwise(f: Callable[..., object], *names: str) -> Reader:
    return lambda d, v, index: d.apply(f, v, index, *names)


def _combined(f: Callable[..., sympy.Expr], *xs: object) -> object:
    return lift(lambda *e: sympy.expand(f(*e)), *(as_number(x) for x in xs))


def _mul(d: Exact, v: Value, index: Index) -> object:
    return d.arithmetic(lambda a, b: a * b, v, index, "self", "other")


def _compare(f: Callable[[Context, sympy.Expr, sympy.Expr], Boolean]) -> Callable:
    return lambda ctx, a, b: lift(lambda x, y: _no_nan(f, ctx, x, y), as_number(a), as_number(b))


def _no_nan(f: Callable, ctx: Context, x: sympy.Expr, y: sympy.Expr) -> Boolean:
    return ctx.data(("nan", x, y), True) if sympy.nan in (x, y) else f(ctx, x, y)


def _logical(f: Callable[..., Boolean]) -> Callable:
    return lambda ctx, *xs: f(*(as_bool(ctx, x) for x in xs))


def _bitwise(f: Callable[..., Boolean]) -> Callable:
    """On bools the logic; on integers it is not followed."""
    return lambda ctx, *xs: f(*xs) if all(is_bool(x) for x in xs) else None


def _max(ctx: Context, a: sympy.Expr, b: sympy.Expr) -> object:
    return choose(at_least(ctx, a, b), a, b)


def _absolute(ctx: Context, x: object) -> object:
    return lift(lambda e: choose(at_least(ctx, e, sympy.Integer(0)), e, -e), as_number(x))


def _extreme(larger: bool) -> Callable[[Context, object, object], object]:
    def apply(ctx: Context, a: object, b: object) -> object:
        pick = (lambda x, y: _max(ctx, x, y)) if larger else (lambda x, y: choose(at_least(ctx, y, x), x, y))
        return lift(pick, as_number(a), as_number(b))

    return apply


def _clamp(d: Exact, v: Value, index: Index) -> object:
    lo, hi = (v.args.get(n) for n in ("min", "max"))
    if any(b is not None and not isinstance(b, (int, float)) for b in (lo, hi)):
        return None
    out = as_number(d.operand(v.args["self"], index))
    if lo is not None:
        out = lift(lambda e: _max(d.ctx, e, number(lo)), out)
    if hi is not None:
        out = lift(lambda e: choose(at_least(d.ctx, number(hi), e), e, number(hi)), out)
    return out


def _cast(d: Exact, v: Value, index: Index) -> object:
    x, source = d.at(v.args["self"], index), v.args["self"].dtype
    if v.dtype == torch.bool:
        return as_bool(d.ctx, x)
    if source is not None and source.is_floating_point and not v.dtype.is_floating_point:  # type: ignore[union-attr]
        if any(not e.is_Integer and not exact(d.ctx, e, source) for e in leaves(x)):
            return None  # truncation
    return as_number(x)


def _floordiv(ctx: Context, a: sympy.Expr, n: sympy.Expr) -> sympy.Expr:
    lo, hi = ctx.interval(a)
    if abs(lo) == float("inf") or abs(hi) == float("inf"):
        return ctx.data(("div", a, n), False)
    return (
        sympy.Integer(lo // int(n))
        if lo // int(n) == hi // int(n)
        else ctx.data(("div", a, n), False, lo // int(n), hi // int(n))
    )


def _division(remainder: bool) -> Reader:
    def reader(d: Exact, v: Value, index: Index) -> object:
        n = v.args["other"]
        floor = remainder or v.args.get("rounding_mode") == "floor"
        if not isinstance(n, int) or n <= 0 or not floor or v.dtype.is_floating_point:  # type: ignore[union-attr]
            return None

        def one(e: sympy.Expr) -> sympy.Expr:
            q = _floordiv(d.ctx, e, sympy.Integer(n))
            return sympy.expand(e - n * q) if remainder else q

        return lift(one, as_number(d.at(v.args["self"], index)))

    return reader


# ---------------------------------------------------------------- creation, sums, joins


def _full(d: Exact, v: Value, index: Index) -> object:
    x = d.operand(v.args["fill_value" if v.name == "full" else "value"], ())
    return x if x is None else as_bool(d.ctx, x) if v.dtype == torch.bool else as_number(x)


def _arange(d: Exact, v: Value, index: Index) -> object:
    start, step = v.args["start"], v.args["step"]
    if not all(isinstance(x, int) or float(x).is_integer() for x in (start, step)):
        return None
    return sympy.expand(int(start) + int(step) * index[0])


def _eye(d: Exact, v: Value, index: Index) -> object:
    same = equal(d.ctx, index[0], index[1])
    return same if v.dtype == torch.bool else as_number(same)


def _cumsum(d: Exact, v: Value, index: Index) -> object:
    """Of a tensor that is constant along the dim: c (i + 1)."""
    dim = v.args["dim"]
    probe = d.ctx.index(v.shape[dim])
    x = as_number(d.at(v.args["self"], (*index[:dim], probe, *index[dim + 1 :])))
    return sympy.expand(x * (index[dim] + 1)) if isinstance(x, sympy.Expr) and x.is_Number else None


def _gather(d: Exact, v: Value, index: Index) -> object:
    """x[rows, cols] with an index tensor for each of the leading dims, all of v's shape after
    broadcasting."""
    source, picks = v.args["self"], v.args["indices"]
    if any(not isinstance(p, Value) or p.dtype == torch.bool for p in picks):
        return None
    rest = len(source.shape) - len(picks)
    if rest < 0:
        return None
    lead = len(v.shape) - rest
    at = [d.operand(p, index[:lead]) for p in picks]
    for e, size in zip(at, source.shape, strict=False):
        if isinstance(e, Choice) or not 0 <= d.ctx.interval(e)[0] <= d.ctx.interval(e)[1] < size:
            return None
    return d.at(source, (*at, *index[lead:]))


def _parts(d: Exact, v: Value, index: Index) -> object:
    """Of `cat` and `stack`."""
    found = picks(v)
    return None if found is None else _joined(d, found, index)


def _joined(d: Exact, parts: Sequence[Pick], index: Index) -> object:
    """The entry of parts that follow each other along a dim."""
    *before, last = parts
    here = d.at(last.source, tuple(sympy.expand(e) for e in last.index(index)))
    if not before:
        return here
    reached = d.ctx.at_least_zero(index[last.dim] + last.offset)
    return where(reached, here, _joined(d, before, index))


def _diff(d: Exact, v: Value, index: Index) -> object:
    """y_t = x_{t+1} - x_t, of x between what is prepended and appended."""
    if v.args.get("n", 1) != 1 or v.dtype == torch.bool:
        return None
    parts = [p for p in (v.args.get("prepend"), v.args["self"], v.args.get("append")) if p is not None]
    found, dim = joined(parts, v.args["dim"]), v.args["dim"]
    after = (*index[:dim], index[dim] + 1, *index[dim + 1 :])
    return _combined(lambda a, b: a - b, *(_joined(d, found, i) for i in (after, index)))


_BINARY = ("self", "other")
Exact.readers = {
    **SHARED,
    "detach": copied,  # conditions and integers have no gradients
    **dict.fromkeys(("literal", "full"), _full),
    "arange": _arange,
    "eye": _eye,
    "cumsum": _cumsum,
    "_to_copy": _cast,
    "index": _gather,
    **dict.fromkeys(("cat", "stack"), _parts),
    "diff": _diff,
    "mul": _mul,
    "abs": _elementwise(_absolute, "self"),
    "maximum": _elementwise(_extreme(larger=True), *_BINARY),
    "minimum": _elementwise(_extreme(larger=False), *_BINARY),
    "clamp": _clamp,
    "div": _division(False),
    "remainder": _division(True),
    "ge": _elementwise(_compare(at_least), *_BINARY),
    "le": _elementwise(_compare(lambda c, a, b: at_least(c, b, a)), *_BINARY),
    "gt": _elementwise(_compare(lambda c, a, b: sympy.Not(at_least(c, b, a))), *_BINARY),
    "lt": _elementwise(_compare(lambda c, a, b: sympy.Not(at_least(c, a, b))), *_BINARY),
    "eq": _elementwise(_compare(equal), *_BINARY),
    "ne": _elementwise(_compare(lambda c, a, b: sympy.Not(equal(c, a, b))), *_BINARY),
    "bitwise_and": _elementwise(_bitwise(both), *_BINARY),
    "bitwise_or": _elementwise(_bitwise(either), *_BINARY),
    "bitwise_xor": _elementwise(_bitwise(sympy.Xor), *_BINARY),
    "bitwise_not": _elementwise(_bitwise(sympy.Not), "self"),
    "logical_and": _elementwise(_logical(both), *_BINARY),
    "logical_or": _elementwise(_logical(either), *_BINARY),
    "logical_xor": _elementwise(_logical(sympy.Xor), *_BINARY),
    "logical_not": _elementwise(_logical(sympy.Not), "self"),
}
