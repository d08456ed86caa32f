"""Decays, symbolically: the code that makes a real-valued mask, as an expression over the reals.

A decay's values are real numbers, and an op that replaces its code need only agree with it up to rounding.
Here a Value is a tree of `Choice`s, whose tests are the exact domain's, and whose leaves are sympy
expressions in the index symbols and in *sources*: undefined functions of their indices, one for each Value
that stays data. A running sum of a source along a dim is a source of its own, so that
`cumsum(x)_i - cumsum(x)_j` and the masked segment sums of x are the same difference.

What does not vary along tokens (a slope per head) is data at once; a number is a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef, UndefinedFunction

from spcompile.passes.recognize.algebra.products import outer_product, scalar
from spcompile.passes.recognize.proof.constants import positive
from spcompile.passes.recognize.proof.context import Choice, Context, choose, lift
from spcompile.passes.recognize.proof.domain import SHARED, TOO_LARGE, Domain, Reader, copied
from spcompile.passes.recognize.proof.exact import Exact
from spcompile.passes.recognize.proof.values import as_number, leaves, number
from spcompile.passes.recognize.proof.views import Index
from spcompile.passes.shadow import Value


@dataclass(frozen=True)
class Source:
    """What an undefined function stands for: the entries of a Value, or its running sums along `summed`."""

    value: Value
    summed: int | None = None


class Parity(sympy.Function):
    """1, or -1 where the base (the first argument) is negative and the position (the second) is odd."""

    nargs = 2

    def _eval_power(self, exponent: sympy.Expr) -> sympy.Expr | None:
        return sympy.Integer(1) if exponent.is_even else None


class Reals(Domain):
    """Evaluates real-valued code over the symbols of one Context."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.exact = Exact(ctx)
        self.tokens = {ctx.i, ctx.j}
        self.sources: dict[UndefinedFunction, Source] = {}
        self._named: dict[Source, UndefinedFunction] = {}
        self._known: dict[tuple, object] = {}

    def at(self, v: Value, index: Index) -> object:
        """The entry of `v` at `index`, a Choice or an expression."""
        key = (v, index)
        if key not in self._known:
            self._known[key] = self._at(v, index)
        return self._known[key]

    def _at(self, v: Value, index: Index) -> object:
        out: object = None
        if not self.varies(index):
            out = self._exact(v, index)
            return out if isinstance(out, sympy.Expr) and out.is_Number else self.source(v, index)
        if v.dtype is None or v.dtype.is_complex:
            return self.source(v, index)
        known = v.dtype.is_floating_point and v.name in self.readers
        out = self.read(v, index) if known else self._exact(v, index)
        return self.source(v, index) if out is None or len(leaves(out)) > TOO_LARGE else out

    def varies(self, index: Index) -> bool:
        return any(e.free_symbols & self.tokens for e in index)

    def _exact(self, v: Value, index: Index) -> object:
        """By the exact domain; None if something of it is data."""
        out = as_number(self.exact.at(v, index))
        data = any(s.name[0] != "x" for x in leaves(out) for s in x.free_symbols)
        return None if data else out

    def source(self, v: Value, index: Index, summed: int | None = None) -> sympy.Expr:
        """The Value as data; its running sum along `summed`, up to and with that index, if given."""
        source = Source(v, summed)
        if source not in self._named:
            self._named[source] = f = sympy.Function(f"f{len(self._named)}", real=True)
            self.sources[f] = source
        return self._named[source](*index)

    def operand(self, x: object, index: Index) -> object:
        c = scalar(x)
        return super().operand(x, index) if c is None else number(c)

    def test(self, v: Value, index: Index) -> object:
        return self.exact.test(v, index)

    def arithmetic(self, f: Callable[..., sympy.Expr], v: Value, index: Index, *names: str) -> object:
        if v.args.get("rounding_mode"):
            return None
        return _lifted(f, *(self.operand(v.args[n], index) for n in names))

    # ---- running sums

    def running_sum(self, v: Value, index: Index) -> object:
        """sum of the operand's entries m <= index along the dim."""
        x, d = v.args["self"], v.args["dim"]
        m = self.ctx.index(v.shape[d])
        self.tokens.add(m)
        inner = (*index[:d], m, *index[d + 1 :])
        found = self._sum(self.at(x, inner), m, index[d])
        return self.source(x, index, d) if found is None else found

    def _sum(self, x: object, m: sympy.Symbol, top: sympy.Expr) -> object:
        """sum_{m <= top} x(m); None if it can't be said."""
        if not isinstance(x, Choice):
            assert isinstance(x, sympy.Expr)
            return self._sum_terms(x, m, top)
        if not isinstance(x.test, (sympy.Symbol, sympy.Not)):
            return None
        test, yes, no = (
            (x.test.args[0], x.other, x.then) if isinstance(x.test, sympy.Not) else (x.test, x.then, x.other)
        )
        e = self.ctx.atoms.get(test)
        if e is None:
            return None
        c = sympy.expand(e).coeff(m)
        if c == 0:
            a, b = self._sum(x.then, m, top), self._sum(x.other, m, top)
            return None if a is None or b is None else choose(x.test, a, b)
        if c not in (1, -1) or sympy.expand(e - c * m).has(m):
            return None
        # m >= start holds `yes`, m < start holds `no`
        start = sympy.expand(-c * (e - c * m)) if c == 1 else sympy.expand(e + m + 1)
        if c == -1:
            yes, no = no, yes
        return self._sum_from(yes, no, m, start, top)

    def _sum_from(
        self, yes: object, no: object, m: sympy.Symbol, start: sympy.Expr, top: sympy.Expr
    ) -> object:
        """The sum of `no` before `start` and of `yes` from there to `top`."""
        before = sympy.expand(start - 1)
        wanted = ((yes, top), (yes, before), (no, before), (no, top))
        parts = [self._sum(x, m, e) for x, e in wanted]
        if any(p is None for p in parts) or self.ctx.interval(before)[0] < -1:
            return None
        ahead = lift(lambda a, b, c: sympy.expand(a - b + c), *parts[:3])
        return choose(self.ctx.at_least_zero(top - start), ahead, parts[3])

    def _sum_terms(self, x: sympy.Expr, m: sympy.Symbol, top: sympy.Expr) -> sympy.Expr | None:
        total = sympy.Integer(0)
        for term in sympy.Add.make_args(sympy.expand(x)) if x != 0 else ():
            fixed, rest = term.as_independent(m, as_Add=False)
            if rest == 1:
                total += fixed * (top + 1)
                continue
            if not isinstance(rest, AppliedUndef) or self.sources[rest.func].summed is not None:
                return None
            places = [n for n, e in enumerate(rest.args) if e.has(m)]
            if len(places) != 1 or rest.args[places[0]] != m:
                return None
            total += fixed * self._sum_of(self.sources[rest.func].value, rest.args, places[0], top)
        return sympy.expand(total)

    def _sum_of(self, v: Value, index: Index, d: int, top: sympy.Expr) -> sympy.Expr:
        """The running sum of a source up to `top`; up to e - 1 it is that up to e, less the entry e."""

        def at(e: sympy.Expr) -> Index:
            return (*index[:d], e, *index[d + 1 :])

        if (top + 1).is_Symbol:
            return self.source(v, at(top + 1), d) - self.source(v, at(top + 1))
        return self.source(v, at(top), d)


# ---------------------------------------------------------------- what each op does


def _lifted(f: Callable[..., sympy.Expr], *xs: object) -> object:
    """f on every combination of leaves; None if an operand is missing, or there are too many."""
    if any(x is None for x in xs) or math.prod(len(leaves(x)) for x in xs) > TOO_LARGE:
        return None
    return lift(f, *xs)


def _elementwise(f: Callable[..., sympy.Expr], *names: str) -> Reader:
    return lambda r, v, index: r.arithmetic(f, v, index, *names)


def _product(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """a b. An infinity times data is minus infinity: it is there to be exponentiated to 0, and with the other
    sign the code that is read would overflow."""
    for x, y in ((a, b), (b, a)):
        if x.is_infinite and not y.is_Number:
            return -sympy.oo
    return sympy.expand(a * b)


def _exp(x: sympy.Expr) -> sympy.Expr:
    return sympy.Integer(0) if x == -sympy.oo else sympy.exp(x)


def _power(r: Reals, v: Value, index: Index) -> object:
    """x ** n for an integer n; b ** x for a base that is the same for all tokens."""
    base, exponent = v.args["self"], v.args["exponent"]
    e = r.operand(exponent, index)
    if isinstance(e, sympy.Integer):
        return _lifted(lambda x: x**e, r.operand(base, index))
    b = r.operand(base, index)
    if not isinstance(b, sympy.Expr) or b.free_symbols & r.tokens or (b.is_Number and b <= 0):
        return None
    if b.is_Number or positive(base):
        log = sympy.Float(math.log(b)) if b.is_Number else sympy.log(b)
        return _lifted(lambda x: _exp(_product(log, x)), e)
    if e is None or not all(_whole(r, x) for x in leaves(e)):
        return None
    return _lifted(lambda x: _exp(_product(sympy.log(sympy.Abs(b)), x)) * _sign(b, x), e)


def _whole(r: Reals, x: sympy.Expr) -> bool:
    """Whether it is a sum of positions, whole numbers of each."""
    terms = sympy.expand(x).as_coefficients_dict()
    return x == 0 or all(s in r.tokens and c.is_Integer for s, c in terms.items())


def _sign(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """The sign of base ** exponent, for a base of any sign."""
    terms = sympy.expand(exponent).as_coefficients_dict()
    return sympy.Mul(*(Parity(base, s) for s, c in terms.items() if c % 2))


def _finite(r: Reals, v: Value, index: Index) -> object:
    """nan_to_num: what is a number stays."""
    if v.args.get("nan") not in (None, 0.0):
        return None
    return _lifted(lambda x: sympy.Integer(0) if x is sympy.nan else x, r.operand(v.args["self"], index))


def _einsum(r: Reals, v: Value, index: Index) -> object:
    """An outer product, nothing summed."""
    parts = outer_product(v, index)
    if parts is None:
        return None
    out: object = sympy.Integer(1)
    for x, at in parts:
        out = _lifted(_product, out, r.at(x, at))
    return out


_LN2 = sympy.Float(math.log(2.0))
_BINARY = ("self", "other")
Reals.readers = {
    **SHARED,
    "_to_copy": copied,
    "mul": _elementwise(_product, *_BINARY),
    "div": _elementwise(lambda a, b: a / b, *_BINARY),
    "reciprocal": _elementwise(lambda a: 1 / a, "self"),
    "exp": _elementwise(_exp, "self"),
    "exp2": _elementwise(lambda a: _exp(_product(_LN2, a)), "self"),
    **dict.fromkeys(("pow", "float_power"), _power),
    "nan_to_num": _finite,
    "cumsum": Reals.running_sum,
    "einsum": _einsum,
}
