"""Prefixes in a mask: tokens that see each other, whatever the band says, because a number of theirs is one.

That is a prefix language model's prefix, and the tokens of one image in a text. A mask has them as an
alternative: "the band, or ...". What follows "or" is not taken apart; for each Value that is a number per
token it is asked whether the mask is the operator's own, with that Value in it, as a matter of logic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import sympy
import torch
from sympy.logic.boolalg import Boolean
from sympy.logic.inference import satisfiable

from spcompile.passes.recognize.algebra.dims import Atom, Dims
from spcompile.passes.recognize.proof.context import Context, both, either, is_bool, lift
from spcompile.passes.recognize.proof.masks import Spans
from spcompile.passes.recognize.proof.prover import settle
from spcompile.passes.recognize.proof.values import at_least, equal
from spcompile.passes.recognize.softmax.documents import for_row, of_tokens
from spcompile.passes.shadow import Value

__all__ = ["Prefixes", "prefixes_of"]

_MOST_SYMBOLS = 12  # of a condition that is compared with another one


@dataclass(frozen=True)
class Prefixes:
    """A Value, one for each token: those of one number >= 0 see each other, or all that are ``keep``."""

    value: Value
    dims: Dims
    keep: bool = True


@dataclass(frozen=True)
class _Reading:
    """A Value, or of a condition the opposite, read for a key, and for the row."""

    found: Prefixes
    key: object
    row: object


def prefixes_of(
    ctx: Context,
    parts: set[Boolean],
    atoms: dict[sympy.Symbol, Atom],
    held: Callable[[Value], bool],
) -> tuple[Prefixes, Spans, set[Boolean]] | None:
    """The prefixes in a conjunction, the band beside them, and the other parts; None: there are none.

    Args:
        atoms: the dims that index symbols stand for.
        held: whether a Value can be had where the operator will stand.
    """
    rows, cols = atoms[ctx.i].size, atoms[ctx.j].size
    for part in sorted(parts, key=str):
        whole = part.to_nnf(simplify=False)
        if not isinstance(whole, sympy.Or) or len(whole.free_symbols) > _MOST_SYMBOLS:
            continue
        spans = {a: settle(ctx, a, rows, cols) for a in whole.args}
        band = sympy.Or(*(a for a, p in spans.items() if p is not None))
        of_band = settle(ctx, band, rows, cols)
        if band == sympy.false or of_band is None or None not in spans.values():
            continue
        for x in _readings(ctx, atoms, held):
            if any(_same(whole, either(band, more)) for more in _alternatives(ctx, x, of_band)):
                return x.found, of_band, parts - {part}
    return None


def _readings(
    ctx: Context, atoms: dict[sympy.Symbol, Atom], held: Callable[[Value], bool]
) -> Iterator[_Reading]:
    """Values of which there is one for each token, as the mask has read them for keys."""
    for v, index, dims, key in of_tokens(ctx, atoms, held):
        row = for_row(ctx, v, index)
        yield _Reading(Prefixes(v, dims), key, row)
        if v.dtype == torch.bool:
            opposite = sympy.Not(cast(Boolean, key)), sympy.Not(cast(Boolean, row))
            yield _Reading(Prefixes(v, dims, False), *opposite)


def _alternatives(ctx: Context, x: _Reading, band: Spans) -> Iterator[Boolean]:
    """What a mask may say beside its band, if tokens of one number of ``x`` see each other."""
    if x.found.value.dtype == torch.bool:
        assert is_bool(x.key) and is_bool(x.row)
        key, row = cast(Boolean, x.key), cast(Boolean, x.row)
        yield both(key, row)
        if _first_tokens(ctx, key) and all(p.value for p in band if p.hi >= 0):
            yield key  # a row behind the prefix sees the whole of it as well, by the band
        return
    same = lift(lambda a, b: equal(ctx, a, b), x.row, x.key)
    some = [lift(lambda a: at_least(ctx, a, sympy.Integer(0)), side) for side in (x.row, x.key)]
    if is_bool(same) and all(is_bool(s) for s in some):
        yield both(cast(Boolean, same), cast(Boolean, some[0]))
        yield both(cast(Boolean, same), cast(Boolean, some[1]))
        yield both(cast(Boolean, same), *(cast(Boolean, s) for s in some))


def _first_tokens(ctx: Context, key: Boolean) -> bool:
    """Whether a condition that holds for a key holds for all keys before it: c - n j >= 0 with n > 0."""
    flip = isinstance(key, sympy.Not)
    e = ctx.atoms.get(cast(sympy.Symbol, key.args[0] if flip else key))
    if e is None or ctx.i in e.free_symbols:
        return False
    rest = sympy.expand(e.subs(ctx.j, ctx.j + 1) - e)
    return bool(rest.is_Integer and (rest > 0 if flip else rest < 0))


def _same(a: Boolean, b: Boolean) -> bool:
    """Whether two conditions are one, whatever their symbols stand for."""
    if b.free_symbols - a.free_symbols:
        return False
    return not satisfiable(sympy.Or(sympy.And(a, sympy.Not(b)), sympy.And(b, sympy.Not(a))))
