"""Masks as structure: which masks of i - j are a band, and what of a mask is a band or data per token.

A mask is a conjunction. What of it is a function of i - j alone becomes the operator's options. What has no
row in it (padding) stays data, one value per key and not one per pair; and so do the two sides of an equation
between a number of the row's token and the same of the key's (documents, chunks), and such an equation beside
the function of i - j ("or": prefixes). None of them needs a name: it is
whatever Value of the shadow was evaluated, on the way to the mask, to just that part of the conjunction, or
to just that side of the equation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import sympy
from sympy.logic.boolalg import Boolean

from spcompile.passes.recognize.algebra.dims import Atom, Dims
from spcompile.passes.recognize.proof import masks
from spcompile.passes.recognize.proof.context import Context, is_bool, lift
from spcompile.passes.recognize.proof.exact import Exact
from spcompile.passes.recognize.proof.masks import Spans
from spcompile.passes.recognize.proof.prover import indices, settle
from spcompile.passes.recognize.proof.values import leaves
from spcompile.passes.recognize.proof.views import Index
from spcompile.passes.recognize.softmax.documents import Documents, conjuncts, documents_of, named_dims
from spcompile.passes.recognize.softmax.prefixes import Prefixes, prefixes_of
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


def band_of(spans: Spans) -> Band | None:
    """The band that a boolean mask of d = i - j is; None if it is another mask."""
    if not all(isinstance(p.value, bool) for p in spans):
        return None
    lo, hi = spans[0].lo, spans[-1].hi
    kept = [p for p in spans if p.value]
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


@dataclass
class Split:
    """A mask as (a function of i - j) and (of keys) and (alike of row and key): where a row sees a key.

    With prefixes the first is (the function of i - j, or of one prefix), and the function is no factor alone.
    """

    spans: Spans
    keys: list[OfKeys]
    documents: Documents | None = None
    prefixes: Prefixes | None = None


Keeps = Callable[[Any], bool | None]
"""Whether a number of the mask lets a score be (True), hides it (False) or does something else (None)."""


def split(
    value: Value,
    dims: Dims,
    rows: Atom,
    cols: Atom,
    keeps: Keeps,
    held: Callable[[Value], bool],
    counts: frozenset[Value] = frozenset(),
) -> Split | None:
    """A mask, whose dims are named, as a conjunction of structure and of data per token; None if it is none.

    Args:
        keeps: what a number of the mask does; of a bool it is asked about 1 and 0.
        held: whether a Value can be had where the operator will stand.
        counts: Values that are known to count tokens.
    """
    ctx = Context(counts)
    ctx.ranges[ctx.i], ctx.ranges[ctx.j] = (0, rows.size - 1), (0, cols.size - 1)
    named = {rows: ctx.i, cols: ctx.j}
    index = indices(ctx, dims, named)
    expr = _kept(Exact(ctx).at(value, index), keeps)
    if expr is None:
        return None
    whole: Spans = [masks.Span(1 - cols.size, rows.size - 1, True)]
    atoms, parts, documents = {s: a for a, s in named.items()}, conjuncts(expr), None
    prefixes: Prefixes | None = None
    if rows.size == cols.size:
        documents, parts = documents_of(ctx, parts, atoms, held)
        positions = None if documents is None else documents.positions
        if positions is not None and positions not in counts:
            return split(value, dims, rows, cols, keeps, held, counts | {positions})
        beside = prefixes_of(ctx, parts, atoms, held)
        if beside is not None:
            prefixes, whole, parts = beside
    rest: set[Boolean] = set()
    for part in parts:
        spans = settle(ctx, part, rows.size, cols.size)
        if spans is None:
            rest.add(part)
        elif prefixes is not None:
            return None  # a band that holds for prefixes too
        else:
            whole = masks.combine(lambda a, b: bool(a and b), whole, spans)
    found = _of_keys(ctx, rest, atoms, held) if rest else []
    return None if found is None else Split(whole, found, documents, prefixes)


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


def _of_keys(
    ctx: Context, rest: set[Boolean], atoms: dict[sympy.Symbol, Atom], held: Callable[[Value], bool]
) -> list[OfKeys] | None:
    """Values without a row whose conjunction is ``rest``; None if there are none such."""
    able: list[tuple[set[Boolean], OfKeys]] = []
    for known, expr in list(ctx.known.items()):
        v, index = cast("tuple[Value, Index]", known)
        if not is_bool(expr) or any(ctx.i in e.free_symbols for e in index):
            continue
        dims = named_dims(v, index, atoms)
        for keep in (True, False):
            parts = conjuncts(cast(Boolean, expr if keep else sympy.Not(expr)))
            if dims is not None and parts and parts <= rest and held(v):
                able.append((parts, OfKeys(v, dims, keep)))
    found, left = [], set(rest)
    for parts, one in sorted(able, key=lambda x: -len(x[0])):
        if parts <= left:
            found.append(one)
            left -= parts
    return None if left else found
