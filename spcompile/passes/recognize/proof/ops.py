"""What each op does to a mask: the table from op names to symbolic functions."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from sympy.logic.boolalg import Boolean

from spcompile.passes.recognize.proof import views
from spcompile.passes.recognize.proof.context import Context, both, choose, either, is_bool, lift
from spcompile.passes.recognize.proof.values import (
    OPS,
    Function,
    Index,
    Memo,
    as_bool,
    as_number,
    at_least,
    equal,
    evaluate,
    exact,
    holds,
    leaves,
    number,
    operand,
    where,
)
from spcompile.passes.shadow import Value

__all__ = ["evaluate"]


# ---------------------------------------------------------------- elementwise


def _elementwise(f: Callable[..., object], *names: str) -> Callable[[Value, Memo], Function | None]:
    def maker(v: Value, memo: Memo) -> Function | None:
        parts = [operand(v.args.get(n), memo) for n in names]
        if any(p is None for p in parts) or v.args.get("rounding_mode"):
            return None
        # What is not followed is still the same wherever the same numbers meet.
        literals = v.dtype, v.args.get("alpha", 1)
        what = v.name, *literals, *(getattr(v.args[n], "dtype", None) for n in names)

        def g(ctx: Context, index: Index) -> object:
            given = tuple(p(ctx, index) for p in parts if p is not None)
            out = f(ctx, *given)
            return out if holds(ctx, v, out) else ctx.data((what, given), v.dtype == torch.bool)

        return g

    return maker


def _arithmetic(f: Callable[..., sympy.Expr]) -> Callable:
    return lambda ctx, *xs: lift(lambda *e: sympy.expand(f(*e)), *(as_number(x) for x in xs))


def _add(v: Value, memo: Memo) -> Function | None:
    alpha = v.args.get("alpha", 1)
    if alpha not in (1, -1):
        return None
    return _elementwise(_arithmetic(lambda a, b: a + alpha * b), "self", "other")(v, memo)


def _compare(f: Callable[[Context, sympy.Expr, sympy.Expr], Boolean]) -> Callable:
    return lambda ctx, a, b: lift(lambda x, y: _no_nan(f, ctx, x, y), as_number(a), as_number(b))


def _no_nan(f: Callable, ctx: Context, x: sympy.Expr, y: sympy.Expr) -> Boolean:
    return ctx.data(("nan", x, y), True) if sympy.nan in (x, y) else f(ctx, x, y)


def _logical(f: Callable[..., Boolean]) -> Callable:
    return lambda ctx, *xs: f(*(as_bool(ctx, x) for x in xs))


def _bitwise(f: Callable[..., Boolean]) -> Callable:
    """On bools the logic; on integers it is not followed."""

    def apply(ctx: Context, *xs: object) -> object:
        if all(is_bool(x) for x in xs):
            return f(*xs)
        return None

    return apply


def _max(ctx: Context, a: sympy.Expr, b: sympy.Expr) -> object:
    return choose(at_least(ctx, a, b), a, b)


def _absolute(ctx: Context, x: object) -> object:
    return lift(lambda e: choose(at_least(ctx, e, sympy.Integer(0)), e, -e), as_number(x))


def _extreme(larger: bool) -> Callable[[Context, object, object], object]:
    def apply(ctx: Context, a: object, b: object) -> object:
        pick = (lambda x, y: _max(ctx, x, y)) if larger else (lambda x, y: choose(at_least(ctx, y, x), x, y))
        return lift(pick, as_number(a), as_number(b))

    return apply


def _clamp(v: Value, memo: Memo) -> Function | None:
    x = operand(v.args["self"], memo)
    lo, hi = (v.args.get(n) for n in ("min", "max"))
    if x is None or any(b is not None and not isinstance(b, (int, float)) for b in (lo, hi)):
        return None

    def f(ctx: Context, index: Index) -> object:
        out = as_number(x(ctx, index))
        if lo is not None:
            out = lift(lambda e: _max(ctx, e, number(lo)), out)
        if hi is not None:
            out = lift(lambda e: choose(at_least(ctx, number(hi), e), e, number(hi)), out)
        return out

    return f


def _cast(v: Value, memo: Memo) -> Function:
    f = evaluate(v.args["self"], memo)
    source = v.args["self"].dtype

    def cast(ctx: Context, index: Index) -> object:
        x = f(ctx, index)
        if v.dtype == torch.bool:
            return as_bool(ctx, x)
        if source is not None and source.is_floating_point and not v.dtype.is_floating_point:  # type: ignore[union-attr]
            if any(not e.is_Integer and not exact(ctx, e, source) for e in leaves(x)):
                return None  # truncation
        return as_number(x)

    return cast


def _floordiv(ctx: Context, a: sympy.Expr, n: sympy.Expr) -> sympy.Expr:
    lo, hi = ctx.interval(a)
    if abs(lo) == float("inf") or abs(hi) == float("inf"):
        return ctx.data(("div", a, n), False)
    return (
        sympy.Integer(lo // int(n))
        if lo // int(n) == hi // int(n)
        else ctx.data(("div", a, n), False, lo // int(n), hi // int(n))
    )


def _division(remainder: bool) -> Callable[[Value, Memo], Function | None]:
    def maker(v: Value, memo: Memo) -> Function | None:
        n = v.args["other"]
        floor = remainder or v.args.get("rounding_mode") == "floor"
        if not isinstance(n, int) or n <= 0 or not floor or v.dtype.is_floating_point:  # type: ignore[union-attr]
            return None
        f, number = evaluate(v.args["self"], memo), sympy.Integer(n)

        def one(ctx: Context, e: sympy.Expr) -> sympy.Expr:
            q = _floordiv(ctx, e, number)
            return sympy.expand(e - number * q) if remainder else q

        return lambda ctx, index: lift(lambda e: one(ctx, e), as_number(f(ctx, index)))

    return maker


# ---------------------------------------------------------------- creation


def _full(v: Value, memo: Memo) -> Function | None:
    part = operand(v.args["fill_value" if v.name == "full" else "value"], memo)
    if part is None:
        return None
    to_bool = v.dtype == torch.bool
    return lambda ctx, index: as_bool(ctx, part(ctx, ())) if to_bool else as_number(part(ctx, ()))


def _arange(v: Value, memo: Memo) -> Function | None:
    start, step = v.args["start"], v.args["step"]
    if not all(isinstance(x, int) or float(x).is_integer() for x in (start, step)):
        return None
    return lambda ctx, index: sympy.expand(int(start) + int(step) * index[0])


def _eye(v: Value, memo: Memo) -> Function:
    def f(ctx: Context, index: Index) -> object:
        same = equal(ctx, index[0], index[1])
        return same if v.dtype == torch.bool else as_number(same)

    return f


def _cumsum(v: Value, memo: Memo) -> Function | None:
    """Of a tensor that is constant along the dim: c (i + 1)."""
    source = v.args["self"]
    d, f = v.args["dim"], evaluate(source, memo)

    def g(ctx: Context, index: Index) -> object:
        probe = ctx.index(v.shape[d])
        x = as_number(f(ctx, (*index[:d], probe, *index[d + 1 :])))
        if not isinstance(x, sympy.Expr) or not x.is_Number:
            return None
        return sympy.expand(x * (index[d] + 1))

    return g


_SAME = _elementwise(lambda ctx, x: x, "self")
_AND, _OR, _XOR = _bitwise(both), _bitwise(either), _bitwise(sympy.Xor)
OPS.update(
    {
        **dict.fromkeys(("literal", "full"), _full),
        "arange": _arange,
        "eye": _eye,
        "cumsum": _cumsum,
        "_to_copy": _cast,
        **dict.fromkeys(("clone", "detach"), _SAME),
        **{name: views.reindex(remap) for name, remap in views.REMAPS.items()},
        "index": views.gather,
        "cat": views.cat,
        "diff": views.diff,
        "add": _add,
        "mul": _elementwise(_arithmetic(lambda a, b: a * b), "self", "other"),
        "abs": _elementwise(_absolute, "self"),
        "maximum": _elementwise(_extreme(larger=True), "self", "other"),
        "minimum": _elementwise(_extreme(larger=False), "self", "other"),
        "clamp": _clamp,
        "div": _division(False),
        "remainder": _division(True),
        "ge": _elementwise(_compare(at_least), "self", "other"),
        "le": _elementwise(_compare(lambda c, a, b: at_least(c, b, a)), "self", "other"),
        "gt": _elementwise(_compare(lambda c, a, b: sympy.Not(at_least(c, b, a))), "self", "other"),
        "lt": _elementwise(_compare(lambda c, a, b: sympy.Not(at_least(c, a, b))), "self", "other"),
        "eq": _elementwise(_compare(equal), "self", "other"),
        "ne": _elementwise(_compare(lambda c, a, b: sympy.Not(equal(c, a, b))), "self", "other"),
        "bitwise_and": _elementwise(_AND, "self", "other"),
        "bitwise_or": _elementwise(_OR, "self", "other"),
        "bitwise_xor": _elementwise(_XOR, "self", "other"),
        "bitwise_not": _elementwise(_bitwise(sympy.Not), "self"),
        "logical_and": _elementwise(_logical(both), "self", "other"),
        "logical_or": _elementwise(_logical(either), "self", "other"),
        "logical_xor": _elementwise(_logical(sympy.Xor), "self", "other"),
        "logical_not": _elementwise(_logical(sympy.Not), "self"),
        "where": _elementwise(where, "condition", "self", "other"),
    }
)
