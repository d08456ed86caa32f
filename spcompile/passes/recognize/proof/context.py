"""Index symbols with their ranges, conditions on them, and numbers that depend on conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

from spcompile.passes.shadow import Value

__all__ = ["INF", "Choice", "Context", "both", "choose", "either", "is_bool", "lift", "pick", "symbols"]

INF = float("inf")


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


def symbols(expr: object) -> set[sympy.Symbol]:
    if isinstance(expr, Choice):
        return symbols(expr.test) | symbols(expr.then) | symbols(expr.other)
    assert isinstance(expr, sympy.Basic)
    return expr.free_symbols


def pick(expr: Any, facts: dict) -> Any:
    """The leaf of a Choice that the facts lead to; None if they do not decide."""
    while isinstance(expr, Choice):
        test = expr.test.xreplace(facts)
        if test not in (sympy.true, sympy.false):
            return None
        expr = expr.then if test == sympy.true else expr.other
    return expr
