"""Masks as structure: which masks of i - j are a band, and what of a mask is a band or data per token.

A mask is a conjunction. What of it is a function of i - j alone becomes the operator's options. What has no
row in it (padding) stays data, one value per key and not one per pair; and so do the two sides of an equation
between a number of the row's token and the same of the key's (documents, chunks). Neither needs a name: it is
whatever Value of the shadow was evaluated, on the way to the mask, to just that part of the conjunction, or
to just that side of the equation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import sympy
from sympy.logic.boolalg import Boolean

from spcompile.passes.recognize import masks
from spcompile.passes.recognize.dims import Atom, Dims, atoms_of, resolve
from spcompile.passes.recognize.mask_values import Index, evaluate, leaves
from spcompile.passes.recognize.masks import Context, Pieces, is_bool, lift
from spcompile.passes.shadow import Value

__all__ = ["Band", "OfKeys", "Split", "band_of", "split"]


@dataclass(frozen=True)
class Band:
    """Row i sees key j only if ``j <= i``, where causal, and ``|i - j| < window``, where there is one."""

    causal: bool = False
    window: int | None = None

    @property
    def name(self) -> str:
        """For reports; empty for no mask."""
        if self.window is None:
            return "causal" if self.causal else ""
        return f"causal window of {self.window}" if self.causal else f"window of {self.window}"


def band_of(pieces: Pieces) -> Band | None:
    """The band that a boolean mask of d = i - j is; None if it is another mask."""
    if not all(isinstance(p.value, bool) for p in pieces):
        return None
    lo, hi = pieces[0].lo, pieces[-1].hi
    kept = [p for p in pieces if p.value]
    if len(kept) != 1:
        return None
    first, last = kept[0].lo, kept[0].hi
    if first == 0 and lo < 0:
        return Band(True, None if last == hi else last + 1)
    window = last + 1 if last < hi else 1 - first
    if (first, last) == (lo, hi):
        return Band()
    inside = max(1 - window, lo) == first and min(window - 1, hi) == last
    return Band(False, window) if inside and window > 0 else None


@dataclass(frozen=True)
class OfKeys:
    """A Value that says of a key, whatever the row, that it is seen (or, if not ``keep``, that it is not)."""

    value: Value
    dims: Dims
    keep: bool


@dataclass(frozen=True)
class Documents:
    """A Value of integers, one for each token: a row sees the keys that have its own."""

    value: Value
    dims: Dims


@dataclass
class Split:
    """A mask as (a function of i - j) and (of keys) and (alike of row and key): where a row sees a key."""

    pieces: Pieces
    keys: list[OfKeys]
    documents: Documents | None = None


Keeps = Callable[[Any], bool | None]
"""Whether a number of the mask lets a score be (True), hides it (False) or does something else (None)."""


def split(
    prover: masks.Prover,
    value: Value,
    dims: Dims,
    rows: Atom,
    cols: Atom,
    keeps: Keeps,
    held: Callable[[Value], bool],
) -> Split | None:
    """A mask, whose dims are named, as a conjunction of structure and of data per token; None if it is none.

    Args:
        keeps: what a number of the mask does; of a bool it is asked about 1 and 0.
        held: whether a Value can be had where the operator will stand.
    """
    ctx = Context()
    ctx.ranges[ctx.i], ctx.ranges[ctx.j] = (0, rows.size - 1), (0, cols.size - 1)
    named = {rows: ctx.i, cols: ctx.j}
    index = masks.indices(ctx, dims, named)
    expr = _kept(evaluate(value, prover.functions)(ctx, index), keeps)
    if expr is None:
        return None
    whole: Pieces = [masks.Piece(1 - cols.size, rows.size - 1, True)]
    rest: set[Boolean] = set()
    for part in _conjuncts(expr):
        pieces = masks.settle(ctx, part, rows.size, cols.size)
        if pieces is None:
            rest.add(part)
        else:
            whole = masks.combine(lambda a, b: bool(a and b), whole, pieces)
    atoms, documents = {s: a for a, s in named.items()}, None
    if rest and rows.size == cols.size:
        documents, rest = _documents(ctx, prover, rest, atoms, held)
    found = _of_keys(ctx, rest, atoms, held) if rest else []
    return None if found is None else Split(whole, found, documents)


def _kept(expr: Any, keeps: Keeps) -> Boolean | None:
    """Where the mask lets scores be, as one condition."""
    if is_bool(expr):
        yes, no = keeps(sympy.Integer(1)), keeps(sympy.Integer(0))
        return None if yes is None or no is None or yes == no else expr if yes else sympy.Not(expr)
    does = {x: keeps(x) if x.is_Number and x is not sympy.nan else None for x in leaves(expr)}
    if None in does.values():
        return None
    found = lift(lambda x: sympy.true if does[x] else sympy.false, expr)
    return found if is_bool(found) else None


def _conjuncts(e: Boolean) -> set[Boolean]:
    """The parts of a conjunction, also of one that is written as no disjunction."""
    if isinstance(e, sympy.And):
        return set().union(*(_conjuncts(a) for a in e.args))
    if isinstance(e, sympy.Not) and isinstance(e.args[0], sympy.Or):
        return set().union(*(_conjuncts(sympy.Not(a)) for a in e.args[0].args))
    return set() if e == sympy.true else {e}


def _of_keys(
    ctx: Context, rest: set[Boolean], atoms: dict[sympy.Symbol, Atom], held: Callable[[Value], bool]
) -> list[OfKeys] | None:
    """Values without a row whose conjunction is ``rest``; None if there are none such."""
    able: list[tuple[set[Boolean], OfKeys]] = []
    for known, expr in list(ctx.known.items()):
        v, index = cast("tuple[Value, Index]", known)
        if not is_bool(expr) or any(ctx.i in e.free_symbols for e in index):
            continue
        dims = _named(v, index, atoms)
        for keep in (True, False):
            parts = _conjuncts(cast(Boolean, expr if keep else sympy.Not(expr)))
            if dims is not None and parts and parts <= rest and held(v):
                able.append((parts, OfKeys(v, dims, keep)))
    found, left = [], set(rest)
    for parts, one in sorted(able, key=lambda x: -len(x[0])):
        if parts <= left:
            found.append(one)
            left -= parts
    return None if left else found


def _documents(
    ctx: Context,
    prover: masks.Prover,
    rest: set[Boolean],
    atoms: dict[sympy.Symbol, Atom],
    held: Callable[[Value], bool],
) -> tuple[Documents | None, set[Boolean]]:
    """The equation x(i) = x(j) in a conjunction, and what is left; an x that is a Value of integers.

    An equation is g >= 0 and -g >= 0.
    """
    least = {part: g for part in rest if (g := _at_least_zero(ctx, part)) is not None}
    for one, g in sorted(least.items(), key=lambda pair: str(pair[0])):
        other = next((part for part, h in least.items() if part != one and sympy.expand(g + h) == 0), None)
        terms = g.as_coefficients_dict()
        if other is None or sorted(terms.values()) != [-1, 1]:
            continue
        (row,), (key,) = ([x for x, n in terms.items() if n == sign] for sign in (1, -1))
        found = _same_of_both(ctx, prover, row, key, atoms, held)
        if found is not None:
            return found, rest - {one, other}
    return None, rest


def _at_least_zero(ctx: Context, part: Boolean) -> sympy.Expr | None:
    """What a condition says to be >= 0: e, or, of a condition that denies it, -e - 1."""
    if isinstance(part, sympy.Not):
        e = ctx.atoms.get(cast(sympy.Symbol, part.args[0]))
        return None if e is None else sympy.expand(-e - 1)
    return ctx.atoms.get(cast(sympy.Symbol, part))


def _same_of_both(
    ctx: Context,
    prover: masks.Prover,
    row: sympy.Expr,
    key: sympy.Expr,
    atoms: dict[sympy.Symbol, Atom],
    held: Callable[[Value], bool],
) -> Documents | None:
    """A Value that is ``key`` where it is read for a key, and ``row`` where it is read for the row."""
    for known, expr in list(ctx.known.items()):
        v, index = cast("tuple[Value, Index]", known)
        if expr != key or ctx.j not in index or any(ctx.i in e.free_symbols for e in index):
            continue
        dims = _named(v, index, atoms)
        if dims is None or v.dtype is None or v.dtype.is_floating_point or not held(v):
            continue
        of_row = tuple(ctx.i if e == ctx.j else e for e in index)
        if evaluate(v, prover.functions)(ctx, of_row) == row:
            return Documents(v, dims)
    return None


def _named(v: Value, index: Index, atoms: dict[sympy.Symbol, Atom]) -> Dims | None:
    """The dims of a Value that is read at ``index``, if each is a dim of the mask or has length 1."""
    dims: list[tuple[Atom, ...]] = []
    for e, size in zip(index, v.shape, strict=True):
        atom = atoms.get(e) if isinstance(e, sympy.Symbol) else None
        if size != 1 and (atom is None or atom.size != size or atom.parts):
            return None
        dims.append(() if size == 1 or atom is None else (atom,))
    seen = atoms_of(tuple(dims))
    return tuple(dims) if len(set(seen)) == len(seen) == len(resolve(seen)) else None
