"""Masks are decided by proof: a symbolic evaluator of the code that builds a mask.

A mask is followed back to `arange`, `ones`, `tril`, comparisons and the like as a function from index
symbols to a typed expression (`exact`). Its only undecided parts are then *atoms* `e >= 0`, with e a
polynomial in the row i and the column j, and data. Every atom must be settled by interval arithmetic over
the index ranges, or depend on i - j alone; then the mask is a function of d = i - j that is constant between
the atoms' thresholds, and one evaluation per piece is a complete proof, with nothing of size T x T. What is
left is "general".

The result is a list of `Span`s: constant values over intervals of d (see `masks`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy

from spcompile.passes.recognize.algebra.dims import Atom, Dims, resolve
from spcompile.passes.recognize.algebra.products import Mask
from spcompile.passes.recognize.proof.context import Context, pick, symbols
from spcompile.passes.recognize.proof.exact import Exact
from spcompile.passes.recognize.proof.masks import Span, Spans, mapped, triangle
from spcompile.passes.shadow import Value

__all__ = ["Prover", "between_thresholds", "indices", "settle"]

_ROWS_AT_ONCE = 8192  # thresholds of a polynomial in d are looked for one d at a time, up to this many


@dataclass
class Prover:
    """Proves masks of one shadow; keeps what it has proved."""

    proved: dict[tuple, Spans | None] = field(default_factory=dict)

    def spans(self, value: Value, dims: Dims, rows: Atom, cols: Atom) -> Spans | None:
        """`value`, whose dims are named, as a function of i - j (rows i, columns j); None if that isn't
        proved."""
        numbers = {rows: 0, cols: 1}
        key = (
            value,
            *(tuple((numbers.setdefault(a, len(numbers)), a.size) for a in resolve(d)) for d in dims),
        )
        key += (rows.size, cols.size)
        if key not in self.proved:
            self.proved[key] = self._prove(value, dims, rows, cols)
        return self.proved[key]

    def _prove(self, value: Value, dims: Dims, rows: Atom, cols: Atom) -> Spans | None:
        ctx = Context()
        ctx.ranges[ctx.i], ctx.ranges[ctx.j] = (0, rows.size - 1), (0, cols.size - 1)
        index = indices(ctx, dims, {rows: ctx.i, cols: ctx.j})
        expr = Exact(ctx).at(value, index)
        return settle(ctx, expr, rows.size, cols.size)

    def keeps(self, mask: Mask, rows: Atom, cols: Atom) -> Spans | None:
        """A factor of zeros and a constant: what it keeps, as bools or as numbers."""
        if mask.value is None:
            ordered = tuple(resolve(d) for d in mask.dims) == ((rows,), (cols,))
            return triangle(rows, cols, mask.diagonal) if ordered else None
        spans = self.spans(mask.value, mask.dims, rows, cols)
        return mapped(lambda x: not x, spans) if spans is not None and mask.complement else spans


def indices(ctx: Context, dims: Dims, named: dict[Atom, sympy.Symbol]) -> tuple[sympy.Expr, ...]:
    """The index of each dim, from the symbols of its atoms, in row-major order."""
    out = []
    for dim in dims:
        e: sympy.Expr = sympy.Integer(0)
        for a in resolve(dim):
            if a not in named:
                named[a] = ctx.index(a.size)
            e = e * a.size + named[a]
        out.append(sympy.expand(e))
    return tuple(out)


def settle(ctx: Context, expr: object, rows: int, cols: int) -> Spans | None:
    """Evaluate once per interval between the atoms' thresholds in d."""
    intervals = between_thresholds(ctx, symbols(expr), rows, cols)
    if intervals is None:
        return None
    out: Spans = []
    for a, b, facts in intervals:
        value = _constant(expr, facts)
        if value is None:
            return None
        if out and out[-1].value == value and isinstance(out[-1].value, bool) == isinstance(value, bool):
            out[-1] = Span(out[-1].lo, b, value)
        else:
            out.append(Span(a, b, value))
    return out


def between_thresholds(
    ctx: Context, tests: set[sympy.Symbol], rows: int, cols: int
) -> list[tuple[int, int, dict]] | None:
    """The intervals (lo, hi) of d in which all tests are constant, and what they are there; None if some
    test is no function of d."""
    lo, hi = 1 - cols, rows - 1
    truth: dict[sympy.Symbol, list[tuple[int, int]]] = {}
    cuts = {lo}
    for s in tests:
        if s not in ctx.atoms:
            return None  # data, or an index by itself
        where = _true_where(ctx, ctx.atoms[s], lo, hi)
        if where is None:
            return None
        truth[s] = where
        for a, b in where:
            cuts.update((a, b + 1))
    starts = sorted(c for c in cuts if lo <= c <= hi)
    out = []
    for a, b in zip(starts, [*starts[1:], hi + 1], strict=True):
        facts = {s: sympy.true if any(x <= a <= y for x, y in w) else sympy.false for s, w in truth.items()}
        out.append((a, b - 1, facts))
    return out


def _true_where(ctx: Context, e: sympy.Expr, lo: int, hi: int) -> list[tuple[int, int]] | None:
    """The d in [lo, hi] at which e(i, j) >= 0, if e is a function of d = i - j alone."""
    d = sympy.Symbol("d", integer=True)
    e = sympy.expand(e.subs(ctx.i, ctx.j + d))
    if e.free_symbols != {d}:
        return None
    poly = sympy.Poly(e, d)
    if poly.degree() == 1:
        a, c = (int(x) for x in poly.all_coeffs())
        return [(-(c // a), hi)] if a > 0 else [(lo, c // -a)]
    if hi - lo > _ROWS_AT_ONCE:
        return None
    coeffs = [int(x) for x in poly.all_coeffs()]
    return [(x, x) for x in range(lo, hi + 1) if _horner(coeffs, x) >= 0]


def _horner(coeffs: list[int], x: int) -> int:
    out = 0
    for c in coeffs:
        out = out * x + c
    return out


def _constant(expr: Any, facts: dict) -> bool | float | None:
    expr = pick(expr, facts)
    if expr is None:
        return None
    expr = expr.xreplace(facts)
    if expr in (sympy.true, sympy.false):
        return expr == sympy.true
    if not expr.is_Number or expr is sympy.nan:
        return None
    return float(expr)
