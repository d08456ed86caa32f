"""Entries of a mask's code: sympy Booleans of bool tensors, else numbers or `Choice`s of numbers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from spcompile.passes.recognize.proof.context import INF, Choice, Context, both, choose, is_bool, lift

# The largest integer below which every integer is exact in a float dtype.
_EXACT = {torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}


def leaves(x: object) -> list:
    return leaves(x.then) + leaves(x.other) if isinstance(x, Choice) else [x]


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
