"""A mask's symbolic value: a function from index expressions to a typed expression.

`evaluate(value)` gives f(ctx, index): Bool (a sympy Boolean) for bool tensors, otherwise a sympy number or a
`masks.Choice` of numbers. An op that is not in the table, and any number that its dtype may not hold
exactly, is data: an uninterpreted function of its indices, of which nothing is known but that it equals
itself.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from spcompile.passes.recognize.proof.context import INF, Choice, Context, both, choose, either, is_bool, lift
from spcompile.passes.shadow import Value

Index = tuple[sympy.Expr, ...]
Function = Callable[[Context, Index], object]
Memo = dict[Value, Function]
OPS: dict[str, Callable[[Value, Memo], Function | None]] = {}
"""By op name, filled by `ops`."""
# The largest integer below which every integer is exact in a float dtype.
_EXACT = {torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}
_TOO_LARGE = 64  # leaves of a Choice: more than any hand-written mask has


def evaluate(v: Value, memo: Memo) -> Function:
    """The symbolic function of `v`, memoised per Value; its results, per index, in the Context."""
    if v not in memo:
        memo[v] = _remember(v, _build(v, memo))
    return memo[v]


def _remember(v: Value, f: Function) -> Function:
    def call(ctx: Context, index: Index) -> object:
        key = (v, index)
        if key not in ctx.known:
            ctx.known[key] = _kept(ctx, v, index, f(ctx, index))
        return ctx.known[key]

    return call


def _kept(ctx: Context, v: Value, index: Index, out: object) -> object:
    """`out` if it is of the right type, and exact in v's dtype; else data."""
    if not holds(ctx, v, out):
        return _data(ctx, v, index)
    if v.dtype == torch.bool:
        return out
    return lift(lambda x: rounded(x, v.dtype) if x.is_Number and x is not sympy.nan else x, out)


def holds(ctx: Context, v: Value, out: object) -> bool:
    """Whether `out` is of v's type, and exact in its dtype."""
    if v.dtype == torch.bool:
        return is_bool(out)
    ends = leaves(out)
    if out is None or len(ends) > _TOO_LARGE or any(is_bool(x) for x in ends):
        return False
    return all(x.is_Number or (x.is_Symbol and x.name[0] == "y") or exact(ctx, x, v.dtype) for x in ends)


def leaves(x: object) -> list:
    return leaves(x.then) + leaves(x.other) if isinstance(x, Choice) else [x]


def _data(ctx: Context, v: Value, index: Index) -> sympy.Basic:
    if v in ctx.counts and v.dtype is not None:
        info = torch.iinfo(v.dtype)
        return ctx.data((v, index), False, info.min // 4, info.max // 4)
    return ctx.data((v, index), v.dtype == torch.bool)


def _build(v: Value, memo: Memo) -> Function:
    maker = OPS.get(v.name)
    made = maker(v, memo) if maker and v.dtype is not None and not v.dtype.is_complex else None
    return made or (lambda ctx, index: _data(ctx, v, index))


def operand(x: object, memo: Memo) -> Function | None:
    """An argument as a function of the output's index: a number, or a Value broadcast from the right."""
    if isinstance(x, (bool, int, float)):
        const = sympy.S(x) if isinstance(x, bool) else number(x)
        return lambda ctx, index: const
    return broadcast(x, memo) if isinstance(x, Value) else None


def broadcast(x: Value, memo: Memo) -> Function:
    """A Value as a function of the index of what it is broadcast to, from the right."""
    f = evaluate(x, memo)

    def g(ctx: Context, index: Index) -> object:
        tail = index[len(index) - len(x.shape) :]
        return f(ctx, tuple(sympy.Integer(0) if s == 1 else e for e, s in zip(tail, x.shape, strict=True)))

    return g


def number(x: float) -> sympy.Expr:
    return sympy.Integer(x) if isinstance(x, int) else rounded(x, torch.float64)


def as_number(x: object) -> object:
    return choose(x, sympy.Integer(1), sympy.Integer(0)) if is_bool(x) else x


def as_bool(ctx: Context, x: object) -> Boolean:
    if is_bool(x):
        return x
    return sympy.Not(lift(lambda e: equal(ctx, e, sympy.Integer(0)), x))


def equal(ctx: Context, a: sympy.Expr, b: sympy.Expr) -> Boolean:
    return both(at_least(ctx, a, b), at_least(ctx, b, a))


def at_least(ctx: Context, a: sympy.Expr, b: sympy.Expr) -> Boolean:
    if a.is_Number and b.is_Number:  # infinities included
        return sympy.true if a >= b else sympy.false
    if a.is_infinite or b.is_infinite:
        # An index or an integer is finite; data may be anything.
        return ctx.data(("order", a, b), True)
    return ctx.at_least_zero(a - b)


def where(ctx: Context, c: object, a: object, b: object) -> object:
    test = as_bool(ctx, c)
    if all(is_bool(x) for x in (a, b)):
        return either(both(test, a), both(sympy.Not(test), b))
    return choose(test, as_number(a), as_number(b))


def exact(ctx: Context, e: sympy.Expr, dtype: torch.dtype | None) -> bool:
    """Whether arithmetic that gives the index-dependent `e` is exact in `dtype`: an integer that it can
    hold."""
    lo, hi = ctx.interval(e)
    if max(abs(lo), abs(hi)) == INF or not all(c.is_Integer for c in e.as_coefficients_dict().values()):
        return False
    if dtype in _EXACT:
        return max(abs(lo), abs(hi)) <= _EXACT[dtype]
    if dtype is None or dtype.is_complex or dtype == torch.bool or dtype.is_floating_point:
        return False
    info = torch.iinfo(dtype)
    return info.min <= lo and hi <= info.max


def rounded(x: Any, dtype: torch.dtype | None) -> sympy.Expr:
    """A number as `dtype` holds it, exactly."""
    if dtype is None or not dtype.is_floating_point:
        return sympy.Integer(int(x))
    value = torch.tensor(float(x), dtype=dtype).double().item()
    if value != value:
        return sympy.nan
    if abs(value) == INF:
        return sympy.oo if value > 0 else -sympy.oo
    f = Fraction(value)
    return sympy.Rational(f.numerator, f.denominator)
