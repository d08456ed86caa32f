"""Masks are decided by proof: a symbolic evaluator of the code that builds a mask.

A mask is followed back to `arange`, `ones`, `tril`, comparisons and the like as a function from index
symbols to a typed expression (`mask_ops`). Its only undecided parts are then *atoms* `e >= 0`, with e a
polynomial in the row i and the column j, and data. Every atom must be settled by interval arithmetic over
the index ranges, or depend on i - j alone; then the mask is a function of d = i - j that is constant between
the atoms' thresholds, and one evaluation per piece is a complete proof, with nothing of size T x T. What is
left is "general".

The result is a list of `Piece`s: constant values over intervals of d. A new kind (a band, say) is a new
reading of the same pieces in `kind_of`; kinds that are not constant in d (ALiBi, decay) need pieces whose
value is an expression.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

from spcompile.passes.recognize.dims import Atom, Dims, resolve
from spcompile.passes.recognize.products import Mask
from spcompile.passes.shadow import Value

INF = float("inf")
_ROWS_AT_ONCE = 8192  # thresholds of a polynomial in d are looked for one d at a time, up to this many


@dataclass(frozen=True)
class Piece:
    """The mask's value for every i, j with lo <= i - j <= hi: True/False, or a number (minus infinity is
    allowed)."""

    lo: int
    hi: int
    value: bool | float


Pieces = list[Piece]


class Context:
    """Hash-consed symbols, their ranges, and the evaluation of expressions over ranges."""

    def __init__(self, counts: frozenset[Value] = frozenset()) -> None:
        """``counts``: Values of integers that are taken not to come near the ends of their dtype."""
        self.counts = counts
        self.ranges: dict[sympy.Symbol, tuple[float, float]] = {}
        self.atoms: dict[sympy.Symbol, sympy.Expr] = {}
        self.known: dict[object, object] = {}
        """What has been evaluated: by (Value, index)."""
        self._interned: dict[object, sympy.Symbol] = {}
        self.i = self.index(1)
        self.j = self.index(1)

    def index(self, size: int) -> sympy.Symbol:
        s = sympy.Symbol(f"x{len(self.ranges)}", integer=True)
        self.ranges[s] = (0, size - 1)
        return s

    def data(self, key: object, boolean: bool, lo: float = -INF, hi: float = INF) -> sympy.Basic:
        """An uninterpreted function of its indices: the same key is the same symbol."""
        key = (key, boolean)
        if key not in self._interned:
            if boolean:
                self._interned[key] = sympy.Symbol(f"p{len(self._interned)}")
            else:
                self._interned[key] = s = sympy.Symbol(f"y{len(self._interned)}", integer=True)
                self.ranges[s] = (lo, hi)
        return self._interned[key]

    def interval(self, e: sympy.Expr) -> tuple[float, float]:
        """Bounds of a polynomial; exact if every symbol occurs once, which holds for affine ones."""
        if e.is_Number:
            return (float(e), float(e)) if not e.is_Rational or not e.is_Integer else (int(e), int(e))
        if e.is_Symbol:
            return self.ranges[e]
        if e.is_Add:
            bounds = [self.interval(a) for a in e.args]
            return sum(b[0] for b in bounds), sum(b[1] for b in bounds)
        if e.is_Mul:
            lo, hi = 1.0, 1.0
            for a in e.args:
                x, y = self.interval(a)
                ends = [_times(p, q) for p in (lo, hi) for q in (x, y)]
                lo, hi = min(ends), max(ends)
            return lo, hi
        if e.is_Pow and e.exp.is_Integer and e.exp > 0:
            x, y = self.interval(e.base)
            n = int(e.exp)
            ends = [x**n, y**n]
            return (0 if n % 2 == 0 and x <= 0 <= y else min(ends)), max(ends)
        return -INF, INF

    def at_least_zero(self, e: sympy.Expr) -> Boolean:
        """The atom `e >= 0` for an integer-valued e (or e with a rational constant), decided if its range
        decides it."""
        e = sympy.expand(e)
        constant, rest = e.as_coeff_Add()
        if rest == 0:
            return sympy.true if constant >= 0 else sympy.false
        if not all(c.is_Integer for c in rest.as_coefficients_dict().values()):
            return self.data(("sign", e), True)
        e = rest + sympy.floor(constant)
        lo, hi = self.interval(e)
        if lo >= 0:
            return sympy.true
        if hi < 0:
            return sympy.false
        flip = _leading(rest) < 0
        if flip:  # one of e >= 0 and -e - 1 >= 0 is the name of both
            e = sympy.expand(-e - 1)
        key = ("atom", e)
        if key not in self._interned:
            self._interned[key] = s = sympy.Symbol(f"a{len(self._interned)}")
            self.atoms[s] = e
        s = self._interned[key]
        return sympy.Not(s) if flip else s


def _times(a: float, b: float) -> float:
    return 0 if a == 0 or b == 0 else a * b


def _leading(e: sympy.Expr) -> int:
    """The sign of the first term, in sympy's canonical order."""
    return -1 if e.as_ordered_terms()[0].could_extract_minus_sign() else 1


# ---------------------------------------------------------------- numbers that depend on conditions


@dataclass(frozen=True)
class Choice:
    """`then` where `test` holds, else `other`; both are expressions or Choices."""

    test: Boolean
    then: object
    other: object


def is_bool(x: object) -> bool:
    """sympy's Symbol is also a Boolean, so ours say by their name: x (index) and y (data) are numbers."""
    return isinstance(x, Boolean) and not (isinstance(x, sympy.Symbol) and x.name[0] in "xy")


def both(*xs: Boolean) -> Boolean:
    """And, that knows that nothing is both true and false (sympy's does not look)."""
    e = sympy.And(*xs)
    return sympy.false if isinstance(e, sympy.And) and any(sympy.Not(a) in e.args for a in e.args) else e


def either(*xs: Boolean) -> Boolean:
    e = sympy.Or(*xs)
    return sympy.true if isinstance(e, sympy.Or) and any(sympy.Not(a) in e.args for a in e.args) else e


def choose(test: Boolean, then: object, other: object) -> object:
    if isinstance(test, BooleanTrue):
        return then
    if isinstance(test, BooleanFalse):
        return other
    return then if then == other else Choice(test, then, other)


def lift(f, *xs: object) -> object:
    """Apply `f` to plain expressions under every combination of the conditions."""
    for n, x in enumerate(xs):
        if isinstance(x, Choice):
            yes = lift(f, *xs[:n], x.then, *xs[n + 1 :])
            no = lift(f, *xs[:n], x.other, *xs[n + 1 :])
            if is_bool(yes) and is_bool(no):
                return either(both(x.test, yes), both(sympy.Not(x.test), no))
            return choose(x.test, yes, no)
    return f(*xs)


# ---------------------------------------------------------------- the proof


@dataclass
class Prover:
    """Evaluates masks of one shadow; keeps what it has evaluated."""

    functions: dict[Value, Any] = field(default_factory=dict)
    proved: dict[tuple, Pieces | None] = field(default_factory=dict)

    def pieces(self, value: Value, dims: Dims, rows: Atom, cols: Atom) -> Pieces | None:
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

    def _prove(self, value: Value, dims: Dims, rows: Atom, cols: Atom) -> Pieces | None:
        from spcompile.passes.recognize.mask_ops import evaluate

        ctx = Context()
        ctx.ranges[ctx.i], ctx.ranges[ctx.j] = (0, rows.size - 1), (0, cols.size - 1)
        index = indices(ctx, dims, {rows: ctx.i, cols: ctx.j})
        expr = evaluate(value, self.functions)(ctx, index)
        return settle(ctx, expr, rows.size, cols.size)

    def keeps(self, mask: Mask, rows: Atom, cols: Atom) -> Pieces | None:
        """A factor of zeros and a constant: what it keeps, as bools or as numbers."""
        if mask.value is None:
            ordered = tuple(resolve(d) for d in mask.dims) == ((rows,), (cols,))
            return triangle(rows, cols, mask.diagonal) if ordered else None
        pieces = self.pieces(mask.value, mask.dims, rows, cols)
        return mapped(lambda x: not x, pieces) if pieces is not None and mask.complement else pieces


def triangle(rows: Atom, cols: Atom, diagonal: int) -> Pieces:
    """j <= i + diagonal."""
    lo, hi = 1 - cols.size, rows.size - 1
    return _clip([Piece(lo, -diagonal - 1, False), Piece(-diagonal, hi, True)], lo, hi)


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


def settle(ctx: Context, expr: object, rows: int, cols: int) -> Pieces | None:
    """Evaluate once per interval between the atoms' thresholds in d."""
    intervals = between_thresholds(ctx, symbols(expr), rows, cols)
    if intervals is None:
        return None
    out: Pieces = []
    for a, b, facts in intervals:
        value = _constant(expr, facts)
        if value is None:
            return None
        if out and out[-1].value == value and isinstance(out[-1].value, bool) == isinstance(value, bool):
            out[-1] = Piece(out[-1].lo, b, value)
        else:
            out.append(Piece(a, b, value))
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


def symbols(expr: object) -> set[sympy.Symbol]:
    if isinstance(expr, Choice):
        return symbols(expr.test) | symbols(expr.then) | symbols(expr.other)
    assert isinstance(expr, sympy.Basic)
    return expr.free_symbols


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


def pick(expr: Any, facts: dict) -> Any:
    """The leaf of a Choice that the facts lead to; None if they do not decide."""
    while isinstance(expr, Choice):
        test = expr.test.xreplace(facts)
        if test not in (sympy.true, sympy.false):
            return None
        expr = expr.then if test == sympy.true else expr.other
    return expr


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


def _clip(pieces: Pieces, lo: int, hi: int) -> Pieces:
    out = [Piece(max(p.lo, lo), min(p.hi, hi), p.value) for p in pieces]
    return [p for p in out if p.lo <= p.hi]


# ---------------------------------------------------------------- reading pieces


def combine(f, a: Pieces, b: Pieces) -> Pieces:
    """f of two masks, over the common refinement of their pieces; equal neighbours are joined."""
    out: Pieces = []
    for p in a:
        for q in b:
            lo, hi = max(p.lo, q.lo), min(p.hi, q.hi)
            if lo <= hi:
                out.append(Piece(lo, hi, f(p.value, q.value)))
    joined: Pieces = []
    for p in sorted(out, key=lambda p: p.lo):
        if joined and joined[-1].value == p.value:
            joined[-1] = Piece(joined[-1].lo, p.hi, p.value)
        else:
            joined.append(p)
    return joined


def mapped(f, a: Pieces) -> Pieces:
    return combine(lambda x, _: f(x), a, [Piece(a[0].lo, a[-1].hi, True)])


def kind_of(pieces: Pieces | None) -> str:
    """Name a boolean mask: "all", "none", "causal" (j <= i), "anticausal" (j > i), or "general"."""
    if pieces is None or not all(isinstance(p.value, bool) for p in pieces):
        return "general"
    if len(pieces) == 1:
        return "all" if pieces[0].value else "none"
    if len(pieces) == 2 and pieces[1].lo == 0:
        return "causal" if pieces[1].value else "anticausal"
    return "general"


def indicator(pieces: Pieces | None) -> tuple[Pieces, float] | None:
    """A mask that multiplies, as (where it is not zero, its one other value); None if it has more values
    or unknown."""
    if pieces is None:
        return None
    others = {float(p.value) for p in pieces} - {0.0}
    if len(others) > 1 or any(abs(x) == INF for x in others):
        return None
    return mapped(lambda x: float(x) != 0.0, pieces), others.pop() if others else 1.0


def keeps_every_row(pieces: Pieces, rows: int, cols: int) -> bool:
    """Whether each row i in [0, rows) keeps some column: a run of kept d meets [i - cols + 1, i] for every
    i."""
    kept = sorted((p.lo, p.hi) for p in pieces if p.value)
    reach = 0  # the first row not yet shown to keep a key
    for lo, hi in kept:
        if max(lo, 0) <= reach:
            reach = max(reach, min(hi + cols, rows) if hi >= 0 or hi + cols > reach else reach)
    return reach >= rows
