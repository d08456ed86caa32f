"""Weights of keys per query, w(i, j), as decays: what linear attention can carry in its state.

A product of masks and decays is settled between the thresholds of its conditions (`proof.prover`), where it
is one expression (`proof.reals`). Below the diagonal, and above it, it must be 0 or

    w(i, j) = rows(i) columns(j) exp(f(i) - f(j)),

and then the log decay of token t is f(t) - f(t - 1): the slope where f is linear, x where f is the running
sum of x, else the difference. Above the diagonal time runs backwards. Weights on both sides are two states.

An exponent of a row that no key's exponent answers (a maximum that is taken off, say) is left alone: the
state by itself could overflow where the product does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef

from spcompile.passes.recognize.algebra.dims import Atom, Dims, resolve
from spcompile.passes.recognize.proof.context import Context, pick, symbols
from spcompile.passes.recognize.proof.masks import Span, Spans
from spcompile.passes.recognize.proof.prover import between_thresholds
from spcompile.passes.recognize.proof.reals import Reals
from spcompile.passes.recognize.proof.views import Index
from spcompile.passes.shadow import Value

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


@dataclass(frozen=True)
class Side:
    """One run of the state: expressions in the row's symbol i, or in the column's, j."""

    reverse: bool
    exclusive: bool
    step: sympy.Expr
    """The log decay of token i."""
    rows: sympy.Expr
    columns: sympy.Expr


@dataclass(frozen=True)
class Weights:
    """No sides: every query sees every key alike."""

    sides: tuple[Side, ...] = ()
    scale: float = 1.0

    @property
    def decays(self) -> bool:
        return any((s.step, s.rows, s.columns) != (ZERO, ONE, ONE) for s in self.sides)

    @property
    def kind(self) -> str:
        if not self.sides:
            return "all"
        (side, *more) = self.sides
        name = "bidirectional" if more else "reversed" if side.reverse else "causal"
        name = f"strictly {name}" if side.exclusive and not more else name
        return f"{name} with decay" if any(s.step != ZERO for s in self.sides) else name


class Table:
    """The weights of one pair of dims: rows of atom t, columns of atom s."""

    def __init__(self, t: Atom, s: Atom) -> None:
        self.ctx = Context()
        self.ctx.ranges[self.ctx.i], self.ctx.ranges[self.ctx.j] = (0, t.size - 1), (0, s.size - 1)
        self.reals = Reals(self.ctx)
        self.t, self.s = t, s
        self.named = {t: self.ctx.i, s: self.ctx.j}
        self.known: dict[tuple, Spans | None] = {}

    def index(self, dims: Dims) -> Index:
        """The index of each dim, from the symbols of its atoms."""
        out = []
        for dim in dims:
            e: sympy.Expr = ZERO
            for a in resolve(dim):
                if a not in self.named:
                    self.named[a] = self.ctx.index(a.size)
                e = e * a.size + self.named[a]
            out.append(sympy.expand(e))
        return tuple(out)

    def dims(self, index: Index) -> tuple[Dims, int] | None:
        """The dims that an index stands for, and how many tokens it is ahead; None if it is no such index."""
        atoms = {x: a for a, x in self.named.items()}
        out, ahead = [], 0
        for e in index:
            constant, rest = sympy.expand(e).as_coeff_Add()
            dim, width = [], 1
            for term in sorted(sympy.Add.make_args(rest) if rest else (), key=lambda x: x.as_coeff_Mul()[0]):
                c, x = term.as_coeff_Mul()
                if x not in atoms or c != width:
                    return None
                dim.append(atoms[x])
                width *= atoms[x].size
            if constant and (ahead or rest not in (self.ctx.i, self.ctx.j)):
                return None
            ahead += int(constant)
            out.append(tuple(dim[::-1]))
        return tuple(out), ahead

    def spans(self, value: Value, dims: Dims, inverse: bool = False) -> Spans | None:
        """`value` by intervals of i - j; None if that isn't proved."""
        key = (value, tuple(resolve(d) for d in dims), inverse)
        if key not in self.known:
            self.known[key] = self._spans(value, dims, inverse)
        return self.known[key]

    def _spans(self, value: Value, dims: Dims, inverse: bool) -> Spans | None:
        tree = self.reals.at(value, self.index(dims))
        intervals = between_thresholds(self.ctx, tests(tree), self.t.size, self.s.size)
        if intervals is None:
            return None
        out = []
        for lo, hi, facts in intervals:
            e = pick(tree, facts)
            if e is None or e is sympy.nan or e.has(sympy.oo, -sympy.oo, sympy.zoo) or (inverse and e == 0):
                return None
            out.append(Span(lo, hi, 1 / e if inverse else e))
        return out

    # ---- reading

    def read(self, spans: Sequence[Span]) -> Weights | None:
        """The weights as states; None if they are none."""
        values = {s.value for s in spans}
        if len(values) == 1 and (only := values.pop()).is_Number and only != 0:
            return Weights((), float(only))
        if self.t.size != self.s.size:
            return None
        diagonal = next(s.value for s in spans if s.lo <= 0 <= s.hi)
        sides, covered = [], diagonal == 0
        for reverse in (False, True):
            there = {s.value for s in spans if (s.lo < 0 if reverse else s.hi > 0)}
            if len(there) != 1:
                return None
            e = there.pop()
            if e == 0:
                continue
            inclusive = not covered and self._equal_on_diagonal(e, diagonal)
            covered |= inclusive
            side = self._side(e, reverse, not inclusive)
            if side is None:
                return None
            sides.append(side)
        return self._scaled(sides) if covered and sides else None

    def _equal_on_diagonal(self, a: sympy.Expr, b: sympy.Expr) -> bool:
        a, b = (x.subs(self.ctx.i, self.ctx.j) for x in (a, b))
        return a == b or sympy.expand(a - b) == 0

    def _scaled(self, sides: list[Side]) -> Weights:
        """A number that all rows have in common is a scale."""
        numbers = {s.rows.as_coeff_Mul()[0] for s in sides}
        if len(numbers) != 1:
            return Weights(tuple(sides))
        (c,) = numbers
        plain = (Side(s.reverse, s.exclusive, s.step, sympy.expand(s.rows / c), s.columns) for s in sides)
        return Weights(tuple(plain), float(c))

    def _side(self, e: sympy.Expr, reverse: bool, exclusive: bool) -> Side | None:
        found = self._factors(e)
        if found is None:
            return None
        log, rows, columns = found
        parts: list[list[sympy.Expr]] = [[], [], []]  # of i, of j, of neither
        for term in sympy.Add.make_args(sympy.expand(log)):
            here = [term.has(self.ctx.i), term.has(self.ctx.j)]
            if all(here):
                return None
            parts[here.index(True) if any(here) else 2].append(term)
        f, g, rest = (sympy.Add(*p) for p in parts)
        to, before = (1 if reverse else -1), g.subs(self.ctx.j, self.ctx.i)
        left = sympy.expand(f + before)
        if left.as_coefficients_dict().keys() & (f.as_coefficients_dict().keys() - {ZERO, ONE}):
            step = self._step(-before, to)
            if step is None or not exclusive or sympy.expand(step + left) != 0:
                return None  # but a row may leave out its own decay
        else:
            step = self._step(f, to)
            columns *= sympy.exp(left.subs(self.ctx.i, self.ctx.j))
            rows *= sympy.exp(step) if exclusive and step is not None else ONE
        if step is None or (step.is_Number and step > 0):
            return None
        return Side(reverse, exclusive, step, rows * sympy.exp(rest), columns)

    def _factors(self, e: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr] | None:
        """(log, rows, columns) of a product exp(log) rows columns."""
        log, rows, columns = ZERO, ONE, ONE
        for x in sympy.Mul.make_args(e):
            if isinstance(x, sympy.exp):
                log += x.args[0]
            elif x.is_Pow and x.exp.free_symbols & {self.ctx.i, self.ctx.j}:
                log += x.exp * sympy.log(x.base)
            elif x.has(self.ctx.i) and x.has(self.ctx.j):
                return None
            elif x.has(self.ctx.j):
                columns *= x
            else:
                rows *= x
        return log, rows, columns

    def _step(self, f: sympy.Expr, to: int) -> sympy.Expr | None:
        """f(i) - f(i + to), the log decay of token i."""
        i, total = self.ctx.i, ZERO
        for term in sympy.Add.make_args(f) if f != 0 else ():
            fixed, x = term.as_independent(i, as_Add=False)
            if isinstance(x, AppliedUndef):
                change = self._change(x, to)
            else:
                change = sympy.expand(x - x.subs(i, i + to))
                change = None if change.has(i) else change
            if change is None:
                return None
            total += fixed * change
        return sympy.expand(total)

    def _change(self, x: AppliedUndef, to: int) -> sympy.Expr | None:
        """f(i) - f(i + to) of a source."""
        i, source = self.ctx.i, self.reals.sources[x.func]
        places = [n for n, e in enumerate(x.args) if e.has(i)]
        if len(places) != 1 or x.args[places[0]] != i:
            return None
        if source.summed is None:
            return x - x.subs(i, i + to)
        if source.summed != places[0]:
            return None
        index = x.args if to < 0 else tuple(e.subs(i, i + 1) for e in x.args)
        return -to * self.reals.source(source.value, index)


def tests(tree: object) -> set[sympy.Symbol]:
    """The symbols that a Choice's conditions depend on."""
    if not hasattr(tree, "test"):
        return set()
    return symbols(tree.test) | tests(tree.then) | tests(tree.other)  # type: ignore[attr-defined]
