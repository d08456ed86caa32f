"""Packed documents in a mask: the equation between a number of the row's token and the same of the key's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import sympy
import torch
from sympy.logic.boolalg import Boolean

from spcompile.passes.recognize.algebra.dims import Atom, Dims, atoms_of, resolve
from spcompile.passes.recognize.proof.context import Context
from spcompile.passes.recognize.proof.exact import Exact
from spcompile.passes.recognize.proof.views import Index
from spcompile.passes.shadow import Value

__all__ = ["Documents", "conjuncts", "documents_of", "for_row", "named_dims", "of_tokens"]


@dataclass(frozen=True)
class Documents:
    """A Value of integers, one for each token: a row sees the keys that have its own."""

    value: Value
    dims: Dims
    index: Index = field(default=(), compare=False)
    """Where ``value`` is read for a key."""
    positions: Value | None = field(default=None, compare=False)
    """What differs, where row and key are of one document, as their places do (see :func:`_positions`)."""


def documents_of(
    ctx: Context,
    parts: set[Boolean],
    atoms: dict[sympy.Symbol, Atom],
    held: Callable[[Value], bool],
) -> tuple[Documents | None, set[Boolean]]:
    """The equation x(i) = x(j) among the parts of a conjunction, and the others under it.

    x is a Value of integers, one for each token. An equation is g >= 0 and -g >= 0.

    Args:
        atoms: the dims that index symbols stand for.
        held: whether a Value can be had where the operator will stand.
    """
    least = {part: g for part in parts if (g := _at_least_zero(ctx, part)) is not None}
    for one, g in sorted(least.items(), key=lambda pair: str(pair[0])):
        other = next((part for part, h in least.items() if part != one and sympy.expand(g + h) == 0), None)
        terms = g.as_coefficients_dict()
        if other is None or sorted(terms.values()) != [-1, 1]:
            continue
        (row,), (key,) = ([x for x, n in terms.items() if n == sign] for sign in (1, -1))
        found = _same_of_both(ctx, row, key, atoms, held)
        if found is not None:
            return found, {_within(ctx, found, part) for part in parts - {one, other}}
    return None, parts


def _at_least_zero(ctx: Context, part: Boolean) -> sympy.Expr | None:
    """What a condition says to be >= 0: e, or, of a condition that denies it, -e - 1."""
    if isinstance(part, sympy.Not):
        e = ctx.atoms.get(cast(sympy.Symbol, part.args[0]))
        return None if e is None else sympy.expand(-e - 1)
    return ctx.atoms.get(cast(sympy.Symbol, part))


def _same_of_both(
    ctx: Context,
    row: sympy.Expr,
    key: sympy.Expr,
    atoms: dict[sympy.Symbol, Atom],
    held: Callable[[Value], bool],
) -> Documents | None:
    """A Value that is ``key`` where it is read for a key, and ``row`` where it is read for the row."""
    for v, index, dims, expr in of_tokens(ctx, atoms, held):
        if expr == key and for_row(ctx, v, index) == row:
            return Documents(v, dims, index, _positions(v))
    return None


def of_tokens(
    ctx: Context, atoms: dict[sympy.Symbol, Atom], held: Callable[[Value], bool]
) -> Iterator[tuple[Value, Index, Dims, object]]:
    """Values of integers or conditions, one for each token, where a mask has read them for a key: and
    what they are there."""
    for known, expr in list(ctx.known.items()):
        v, index = cast("tuple[Value, Index]", known)
        if ctx.j not in index or any(ctx.i in e.free_symbols for e in index):
            continue
        dims = named_dims(v, index, atoms)
        if dims is not None and v.dtype is not None and not v.dtype.is_floating_point and held(v):
            yield v, index, dims, expr


def for_row(ctx: Context, v: Value, index: Index) -> object:
    """What a Value that is read at ``index`` for a key is for the row."""
    return Exact(ctx).at(v, tuple(ctx.i if e == ctx.j else e for e in index))


def _within(ctx: Context, documents: Documents, part: Boolean) -> Boolean:
    """A condition where row and key are of one document: positions differ there as places do."""
    if documents.positions is None:
        return part
    index = documents.index
    key, row = (
        Exact(ctx).at(documents.positions, tuple(by.get(e, e) for e in index)) for by in ({}, {ctx.j: ctx.i})
    )
    if not (isinstance(key, sympy.Symbol) and isinstance(row, sympy.Symbol)):
        return part
    known = {}
    for s in part.free_symbols & ctx.atoms.keys():
        e = sympy.expand(ctx.atoms[cast(sympy.Symbol, s)].subs(row, key + ctx.i - ctx.j))
        known[s] = ctx.at_least_zero(e)
    return cast(Boolean, part.xreplace(known))


def _positions(ids: Value) -> Value | None:
    """The x of ``cumsum(diff(x) != 1)``: tokens of one number are those between which x grows by one each.

    Then x(i) - x(j) = i - j where both are of one number (positions are taken not to overflow their dtype).
    """
    total = _same_numbers(ids)
    if total.name != "cumsum" or total.args["dim"] != len(ids.shape) - 1:
        return None
    test = _same_numbers(total.args["self"])
    if test.name in ("logical_not", "bitwise_not"):
        equal, right = test.args["self"], test.args["self"].name == "eq"
    else:
        equal, right = test, test.name == "ne"
    if not right or equal.args["other"] != 1 or not isinstance(equal.args["self"], Value):
        return None
    step = equal.args["self"]
    if step.name != "diff" or step.args.get("n", 1) != 1 or step.args.get("append") is not None:
        return None
    first, x = step.args.get("prepend"), step.args["self"]
    along = step.args["dim"] == len(step.shape) - 1
    floats = x.dtype is None or x.dtype.is_floating_point or x.dtype == torch.bool
    same = x.shape == step.shape == ids.shape and isinstance(first, Value)
    return x if along and same and not floats else None


def _same_numbers(v: Value) -> Value:
    """Of casts to integers, what is cast."""
    while v.name in ("clone", "_to_copy") and v.dtype in (torch.int64, torch.int32):
        v = v.args["self"]
    return v


def conjuncts(e: Boolean) -> set[Boolean]:
    """The parts of a conjunction, also of one that is written as no disjunction."""
    if isinstance(e, sympy.And):
        return set().union(*(conjuncts(a) for a in e.args))
    if isinstance(e, sympy.Not) and isinstance(e.args[0], sympy.Or):
        return set().union(*(conjuncts(sympy.Not(a)) for a in e.args[0].args))
    return set() if e == sympy.true else {e}


def named_dims(v: Value, index: Index, atoms: dict[sympy.Symbol, Atom]) -> Dims | None:
    """The dims of a Value that is read at ``index``, if each is a dim of the mask or has length 1."""
    dims: list[tuple[Atom, ...]] = []
    for e, size in zip(index, v.shape, strict=True):
        atom = atoms.get(e) if isinstance(e, sympy.Symbol) else None
        if size != 1 and (atom is None or atom.size != size or atom.parts):
            return None
        dims.append(() if size == 1 or atom is None else (atom,))
    seen = atoms_of(tuple(dims))
    return tuple(dims) if len(set(seen)) == len(seen) == len(resolve(seen)) else None
