"""Biases by head and distance i - j alone (ALiBi, T5's buckets), as a table of distances.

The code that makes such a bias makes the table as well, run on all distances in place of all pairs of a row
and a key: where it first has an integer that is an affine function of i - j (as the exact evaluator
proves), the table has that function of 1 - L, ..., L - 1. What follows must take each entry by itself (a
pointwise operation, an embedding, an index), or only rename dims; then row and key are one dim of 2 L - 1
entries. Gradients flow to what is learned by autograd, through the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from spcompile.passes.recognize.algebra.dims import Atom, Dims, atoms_of, resolve
from spcompile.passes.recognize.edit import Editor, Operand, Refused, Writer
from spcompile.passes.recognize.proof.constants import bounded
from spcompile.passes.recognize.proof.context import Context
from spcompile.passes.recognize.proof.exact import Exact
from spcompile.passes.shadow import Value
from spcompile.passes.shadow.spelling import by_schema, target_of

__all__ = ["Relative", "emit_relative", "read_relative"]

_DEEP = 64  # calls on the way from the distances to the bias
_MADE = ("literal", "full")
_SIZES = {"reshape": "shape", "expand": "size", "full": "size"}
"""The arguments that say a shape."""


@dataclass(frozen=True)
class _Place:
    """Which dims of a Value are rows and keys; None: it has none such, or one of length one."""

    row: int | None
    key: int | None

    def moved(self, where: Callable[[int], int | None]) -> _Place:
        """In the operand, by where a dim of the result is there."""
        return _Place(*(None if d is None else where(d) for d in (self.row, self.key)))

    @property
    def is_free(self) -> bool:
        return self.row is None and self.key is None


@dataclass(frozen=True)
class _Held:
    """A tensor of Dynamo's graph, without rows and keys."""

    value: Value


@dataclass(frozen=True)
class _Distances:
    """slope (i - j) + start."""

    value: Value
    place: _Place
    slope: int
    start: int


@dataclass(frozen=True)
class _Call:
    """An operation on recipes."""

    value: Value
    place: _Place
    args: dict[str, Any]


_Recipe = _Held | _Distances | _Call


@dataclass
class Relative:
    """A bias by distance, times a number."""

    recipe: _Recipe
    value: Value
    dims: Dims
    number: float


class _Reader:
    """Reads the code of one bias."""

    def __init__(self, rows: int, held: Callable[[Value], bool]) -> None:
        self.held = held
        self.ctx = Context()
        self.ctx.ranges[self.ctx.i] = self.ctx.ranges[self.ctx.j] = (0, rows - 1)
        self.known: dict[tuple[Value, _Place], _Recipe | None] = {}

    def read(self, v: Value, place: _Place, depth: int = 0) -> _Recipe | None:
        if (v, place) not in self.known:
            self.known[v, place] = self._read(v, place, depth) if depth < _DEEP else None
        return self.known[v, place]

    def _read(self, v: Value, place: _Place, depth: int) -> _Recipe | None:
        if place.is_free and not v.derived and self.held(v):
            return _Held(v)
        if v.dtype is None or v.dtype.is_complex or v.name in ("input", "opaque"):
            return None
        found = self._distances(v, place)
        if found is not None:
            return found
        if v.name in _MADE:
            return _Call(v, place, v.args) if bounded(v) else None  # or it is a mask
        places = _operands(v, place)
        if places is None:
            return None
        args: dict[str, Any] = {}
        for name, x in v.args.items():
            many = x if isinstance(x, (list, tuple)) else [x]
            recipes = [self.read(y, places[y], depth + 1) if isinstance(y, Value) else y for y in many]
            if any(isinstance(y, Value) and r is None for y, r in zip(many, recipes, strict=True)):
                return None
            args[name] = recipes if isinstance(x, (list, tuple)) else recipes[0]
        return _Call(v, place, args)

    def _distances(self, v: Value, place: _Place) -> _Distances | None:
        """Where it is an integer that is affine in i - j."""
        at = {place.row: self.ctx.i, place.key: self.ctx.j}
        index = tuple(at[d] if d in at else self.ctx.index(size) for d, size in enumerate(v.shape))
        e = Exact(self.ctx).at(v, index)
        if v.dtype == torch.bool or not isinstance(e, sympy.Expr):
            return None
        distance = sympy.Symbol("d", integer=True)
        e = sympy.expand(e.subs(self.ctx.i, self.ctx.j + distance))
        slope, start = e.coeff(distance), e.subs(distance, 0)
        if e.free_symbols - {distance} or not (slope.is_Integer and start.is_Integer):
            return None
        return _Distances(v, place, int(slope), int(start)) if e == slope * distance + start else None


def _operands(v: Value, place: _Place) -> dict[Value, _Place] | None:
    """Where rows and keys are in each operand of what a table goes through; None: it does not."""
    if v.name in ("reshape", "expand", "permute", "select"):
        source = v.args["self"]
        found = _through_view(v, source, place)
        return None if found is None else {source: found}
    if v.name == "embedding":
        return {v.args["weight"]: _Place(None, None), v.args["indices"]: place}
    if v.name == "index" and len(v.args["indices"]) == 1:
        (picks,) = v.args["indices"]
        whole = isinstance(picks, Value) and picks.dtype != torch.bool
        return {v.args["self"]: _Place(None, None), picks: place} if whole else None
    if v.name in ("clone", "_to_copy", "where") or _is_pointwise(v):
        return {o: place.moved(_broadcast(o, v)) for o in v.operands()}
    return None


def _is_pointwise(v: Value) -> bool:
    target = target_of(v)
    return target is not None and torch.Tag.pointwise in target.tags


def _broadcast(o: Value, v: Value) -> Callable[[int], int | None]:
    ahead = len(v.shape) - len(o.shape)
    return lambda d: None if d < ahead or o.shape[d - ahead] == 1 else d - ahead


def _through_view(v: Value, source: Value, place: _Place) -> _Place | None:
    if v.name == "expand":
        return place.moved(_broadcast(source, v))
    if v.name == "permute":
        return place.moved(lambda d: v.args["dims"][d])
    if v.name == "select":
        return place.moved(lambda d: d + (d >= v.args["dim"]))
    longer = [[n for n, size in enumerate(x.shape) if size != 1] for x in (source, v)]
    if [source.shape[n] for n in longer[0]] != [v.shape[n] for n in longer[1]]:
        return None  # more than dims of one that come and go
    return place.moved(dict(zip(longer[1], longer[0], strict=True)).get)


def read_relative(
    value: Value,
    dims: Dims,
    number: float,
    rows: Atom,
    keys: Atom,
    held: Callable[[Value], bool],
) -> Relative | None:
    """A bias, whose dims are named, as one by head and distance; None if it is not seen to be."""
    where = {resolve(d): n for n, d in enumerate(dims)}
    place = _Place(where.get((rows,)), where.get((keys,)))
    if rows.size != keys.size or None in (place.row, place.key):
        return None
    recipe = _Reader(rows.size, held).read(value, place)
    return None if recipe is None else Relative(recipe, value, dims, number)


# ---------------------------------------------------------------- the table


def emit_relative(
    found: list[Relative], heads: tuple[Atom, ...], rows: Atom, keys: Atom, editor: Editor, w: Writer
) -> fx.Node | None:
    """The sum of biases by distance, ``[H or 1, 2 L - 1]``."""
    total: fx.Node | None = None
    for one in found:
        width = Atom(2 * rows.size - 1)
        node = _Table(editor, w, rows.size).emit(one.recipe)
        named: dict[tuple[Atom, ...], tuple[Atom, ...]] = {(rows,): (), (keys,): (width,)}
        dims = tuple(named.get(resolve(d), d) for d in one.dims)
        if not set(atoms_of(dims)) <= {width, *resolve(heads)}:
            raise Refused("its relative bias differs along the batch")
        x = w.arrange(Operand(node, one.value, dims), (heads, (width,)), expand=False)
        x = x if one.number == 1 else w.call(torch.mul, x, one.number)
        total = x if total is None else w.call(torch.add, total, x)
    return total


class _Table:
    """Emits the operations of recipes: a row's dim has one entry, a key's the distances from 1 - L on."""

    def __init__(self, editor: Editor, w: Writer, length: int) -> None:
        self.editor, self.w, self.length = editor, w, length
        self.made: dict[int, fx.Node] = {}

    def emit(self, recipe: _Recipe) -> fx.Node:
        if id(recipe) not in self.made:
            self.made[id(recipe)] = self._emit(recipe)
        return self.made[id(recipe)]

    def _shape(self, v: Value, place: _Place) -> list[int]:
        shape = list(v.shape)
        for d, size in ((place.row, 1), (place.key, 2 * self.length - 1)):
            if d is not None:
                shape[d] = size
        return shape

    def _emit(self, recipe: _Recipe) -> fx.Node:
        if isinstance(recipe, _Held):
            node = self.editor.find(recipe.value, self.w.before)
            assert node is not None
            return node
        if isinstance(recipe, _Distances):
            return self._distances(recipe)
        v, shape = recipe.value, self._shape(recipe.value, recipe.place)
        if v.name == "literal":
            return self.w.call(torch.full, (), v.args["value"], dtype=v.dtype, device=self.w.device)
        args = {
            n: [self._argument(y) for y in x] if isinstance(x, list) else self._argument(x)
            for n, x in recipe.args.items()
        }
        if v.name in _SIZES:
            args[_SIZES[v.name]] = shape
        target = target_of(v)
        assert target is not None
        positional, named = by_schema(target, args)
        return self.w.call(target, *positional, **named)

    def _argument(self, x: Any) -> Any:
        return self.emit(x) if isinstance(x, (_Held, _Distances, _Call)) else x

    def _distances(self, recipe: _Distances) -> fx.Node:
        v, shape, w = recipe.value, self._shape(recipe.value, recipe.place), self.w
        how = {"dtype": v.dtype, "device": w.device}
        if recipe.slope == 0:
            return w.call(torch.full, shape, recipe.start, **how)
        x = w.call(torch.arange, 1 - self.length, self.length, **how)
        x = x if recipe.slope == 1 else w.call(torch.mul, x, recipe.slope)
        x = x if recipe.start == 0 else w.call(torch.add, x, recipe.start)
        assert recipe.place.key is not None
        x = w.call(torch.reshape, x, [n if d == recipe.place.key else 1 for d, n in enumerate(shape)])
        return x if w.shape(x) == tuple(shape) else w.method("expand", x, shape)
