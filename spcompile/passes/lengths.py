"""Recognition where sizes are symbolic: one edit of Dynamo's graph for many lengths, proved for each.

Recognizers prove their claims of numbers: that a mask is causal, they show for T rows and columns. So where
Dynamo made sizes symbolic they run on copies of its graph at a few lengths. If all are edited alike but for
numbers that are affine in the sizes, these become expressions, and that is the edit of the symbolic graph.

NOTE [Each length is proved]
What holds at three lengths need not hold at a fourth (a window of 4,096 tokens is causal up to there). So a
call of a length that is new to the compiled graph runs recognition alone once more, on a copy at that length.
If it makes the same edit the length is remembered; if not, the call goes to another compilation of the
unedited graph, which recognizes anew. Sizes are the same on all ranks, so all go the same way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from spcompile.arguments import examples_of
from spcompile.passes.canonical import own_copy
from spcompile.passes.einsums import without_opt_einsum
from spcompile.passes.recognize import recognize
from spcompile.passes.sites import Site
from spcompile.sizes import InputSizes, is_symbolic

__all__ = ["Lengths", "recognize_lengths"]

Sizes = tuple[int, ...]

# By how much a symbol is changed, twice, in the search for an edit that serves all: by little, lest a window
# is crossed; or by itself, so that what divides it still does.
_CHANGES: tuple[Callable[[int], int], ...] = (lambda size: 1, lambda size: size)


class _Different(Exception):
    """Two lengths are not edited alike."""


@dataclass
class Lengths:
    """Whether the edit that was made is right for a call's sizes.

    Args:
        pristine: the graph before the edit.
        symbols: the symbols of its sizes.
        inputs: what these are in a call.
        edit: what recognition makes of the graph.
        proved: the sizes for which that is known.
    """

    pristine: fx.GraphModule
    symbols: list[sympy.Symbol]
    inputs: InputSizes
    edit: list[Any]
    proved: set[Sizes] = field(default_factory=set)

    def hold(self, args: Sequence[Any]) -> bool:
        """Whether the edit is right for a call with ``args``, the inputs of the graph."""
        values = self.inputs.values(args)
        sizes = tuple(values[s] for s in self.symbols)
        if sizes not in self.proved:
            try:
                edited, _ = _recognized(self.pristine, dict(zip(self.symbols, sizes, strict=True)))
                _compare(self.edit, _text(edited), sizes)
            except _Different:
                return False
            self.proved.add(sizes)
        return True


def recognize_lengths(gm: fx.GraphModule) -> tuple[list[Site], Lengths | None]:
    """Rewrite the attention in Dynamo's ``gm``, in place; where sizes are symbolic, for all that they may be.

    Returns:
        the sites, and what tells whether the edit is right for a call; None if it always is.
    """
    symbols = _symbols(gm)
    if not symbols:
        return _recognize(gm), None
    pristine, inputs = own_copy(gm), InputSizes(examples_of(gm))
    base, sites = _recognized(pristine, symbols)
    if not any(site.rewritten for site in sites):
        return sites, None
    for change in _CHANGES:
        try:
            if _may_share(gm) or not inputs.tell(symbols):
                break
            edit = _generalised(pristine, _text(base), symbols, change)
            _write(gm, base, edit, list(symbols))
        except _Different:
            continue
        return sites, Lengths(pristine, list(symbols), inputs, edit, {tuple(symbols.values())})
    return _recognize(gm), None  # on numbers, with guards: this length is compiled for itself


# --------------------------------------------------------------------------------- copies at a length


def _symbols(gm: fx.GraphModule) -> dict[sympy.Symbol, int]:
    """The symbols of the inputs' sizes, in the inputs' order, with their values at hand."""
    found: dict[sympy.Symbol, int] = {}
    for x in tree_leaves(examples_of(gm)):
        for size in (*x.shape, *x.stride()) if isinstance(x, Tensor) else (x,):
            if isinstance(size, SymInt):
                env = size.node.shape_env
                for symbol in sorted(size.node.expr.free_symbols, key=str):
                    found[symbol] = int(env.guarding_hint_or_throw(symbol))
    return found


def _may_share(gm: fx.GraphModule) -> bool:
    """Whether two inputs may be one memory."""
    tensors = [x for x in examples_of(gm) if isinstance(x, Tensor)]
    return len({x.untyped_storage()._cdata for x in tensors}) < len(tensors)


def _recognized(
    pristine: fx.GraphModule, sizes: Mapping[sympy.Symbol, int]
) -> tuple[fx.GraphModule, list[Site]]:
    """A copy with these sizes, after recognition."""
    copy = own_copy(pristine)
    values = {s: sympy.Integer(n) for s, n in sizes.items()}

    def number(size: Any) -> Any:
        return int(size.node.expr.xreplace(values)) if is_symbolic(size) else size

    def at_length(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return number(x)
        if not any(map(is_symbolic, (*x.shape, *x.stride()))):
            return x
        with x.fake_mode:
            shape, stride = (tuple(map(number, y)) for y in (x.shape, x.stride()))
            fresh = torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)
            return fresh.requires_grad_(x.requires_grad)

    for scope in _scopes(copy):
        for node in scope.graph.nodes:
            if "example_value" in node.meta:
                node.meta["example_value"] = tree_map(at_length, node.meta["example_value"])
    return copy, _recognize(copy)


def _recognize(gm: fx.GraphModule) -> list[Site]:
    with without_opt_einsum():
        return recognize(gm)


def _scopes(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [m for m in gm.modules() if isinstance(m, fx.GraphModule)]


# --------------------------------------------------------------------------------- what an edit is


@dataclass(frozen=True)
class _Affine:
    """constant + sum of coefficients times sizes."""

    constant: int
    coefficients: Sizes

    def at(self, sizes: Sequence[int]) -> int:
        """Its value."""
        return self.constant + sum(c * s for c, s in zip(self.coefficients, sizes, strict=True))


def _text(gm: fx.GraphModule) -> list[Any]:
    """All nodes of all graphs as one flat list of what they are; numbers stand by themselves."""
    flat: list[Any] = []
    for scope in _scopes(gm):
        for node in scope.graph.nodes:
            flat += [node.op, node.name, node.target]
            _flatten((node.args, node.kwargs), flat)
    return flat


def _flatten(x: Any, flat: list[Any]) -> None:
    if isinstance(x, Mapping):
        flat.append(tuple(x))
        x = tuple(x.values())
    elif isinstance(x, slice):
        x = ("slice", x.start, x.stop, x.step)
    if isinstance(x, (tuple, list)):
        flat.append(len(x))
        for y in x:
            _flatten(y, flat)
    else:
        flat.append(("node", x.name) if isinstance(x, fx.Node) else x)


def _is_number(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _compare(edit: list[Any], text: list[Any], sizes: Sizes) -> None:
    """Raise if ``text`` is not ``edit`` at these sizes."""
    if len(edit) != len(text):
        raise _Different
    for want, have in zip(edit, text, strict=True):
        want = want.at(sizes) if isinstance(want, _Affine) else want
        if type(want) is not type(have) or want != have:
            raise _Different


def _generalised(
    pristine: fx.GraphModule,
    base: list[Any],
    now: Mapping[sympy.Symbol, int],
    change: Callable[[int], int],
) -> list[Any]:
    """``base``, the edit at the sizes ``now``, with the numbers that follow sizes as expressions of them.

    Symbols that are equal now are changed together, and the first of them stands for all: those of ids and of
    labels are, and a graph in which they differ is none. Where they are not the same later, `hold` sees it.
    """
    changed: dict[int, tuple[list[Any], list[Any], int]] = {}  # by size
    for size in now.values():
        if size not in changed:
            by = change(size)
            sizes_then = ({s: n + i * by if n == size else n for s, n in now.items()} for i in (1, 2))
            once, twice = (_text(_recognized(pristine, then)[0]) for then in sizes_then)
            if not len(once) == len(twice) == len(base):
                raise _Different
            changed[size] = once, twice, by
    sizes = tuple(now.values())
    firsts = [size not in sizes[:i] for i, size in enumerate(sizes)]
    edit: list[Any] = []
    for place, x in enumerate(base):
        slope = {size: _slope(x, o[place], t[place], by) for size, (o, t, by) in changed.items()}
        slopes = [slope[size] if first else 0 for size, first in zip(sizes, firsts, strict=True)]
        if any(slopes):
            constant = x - sum(c * s for c, s in zip(slopes, sizes, strict=True))
            edit.append(_Affine(constant, tuple(slopes)))
        else:
            edit.append(x)
    return edit


def _slope(x: Any, once: Any, twice: Any, by: int) -> int:
    """By how much a number grows with a size; it must do so evenly."""
    if type(x) is not type(once) or type(x) is not type(twice):
        raise _Different
    if x == once == twice:
        return 0
    if not _is_number(x) or twice - once != once - x or (once - x) % by:
        raise _Different
    return (once - x) // by


# --------------------------------------------------------------------------------- writing it


def _write(gm: fx.GraphModule, base: fx.GraphModule, edit: list[Any], symbols: list[sympy.Symbol]) -> None:
    """Give ``gm`` the graphs of ``base`` with the expressions of ``edit`` in them."""
    rest = iter(edit)
    writers = []
    for scope, original in zip(_scopes(base), _scopes(gm), strict=True):
        writer = _Writer(scope, original, symbols)
        writer.plan(rest)
        writers.append((writer, original))
    for writer, original in writers:  # nothing is written if one of them can't be
        writer.write()
        original.graph = writer.scope.graph
        original.recompile()


class _Writer:
    """Puts expressions of sizes in the place of numbers in one graph."""

    def __init__(self, scope: fx.GraphModule, original: fx.GraphModule, symbols: list[sympy.Symbol]) -> None:
        self.scope, self.symbols = scope, symbols
        self.metas = {n.name: n.meta for n in original.graph.nodes}
        self.planned: list[tuple[fx.Node, Any]] = []
        self.nodes: dict[Any, Any] = {}

    def plan(self, edit: Any) -> None:
        """Take this graph's part of the edit."""
        for node in self.scope.graph.nodes:
            for _ in ("op", "name", "target"):
                next(edit)
            args = self._unflatten((node.args, node.kwargs), edit)
            if any(isinstance(x, _Affine) for x in _leaves(args)):
                if any(self._source(i) is None for x in _leaves(args) for i in _used(x)):
                    raise _Different
                self.planned.append((node, args))

    def _unflatten(self, x: Any, edit: Any) -> Any:
        """``x`` with what ``edit`` has in the place of its numbers; the walk of :func:`_flatten`."""
        if isinstance(x, Mapping):
            next(edit), next(edit)
            return {k: self._unflatten(y, edit) for k, y in x.items()}
        if isinstance(x, slice):
            next(edit), next(edit)
            return slice(*(self._unflatten(y, edit) for y in (x.start, x.stop, x.step)))
        if isinstance(x, (tuple, list)):
            next(edit)
            return type(x)(self._unflatten(y, edit) for y in x) if type(x) in (tuple, list) else [
                self._unflatten(y, edit) for y in x
            ]
        found = next(edit)
        return found if isinstance(found, _Affine) else x

    def _source(self, index: int) -> tuple[fx.Node, int | None] | None:
        """The input of this graph that is a symbol, or a dim of one that is."""
        for node in self.scope.graph.nodes:
            value = self.metas[node.name].get("example_value") if node.op == "placeholder" else None
            if isinstance(value, SymInt) and value.node.expr == self.symbols[index]:
                return node, None
            for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if isinstance(size, SymInt) and size.node.expr == self.symbols[index]:
                    return node, dim
        return None

    def write(self) -> None:
        """Write what was planned."""
        graph = self.scope.graph
        for node in graph.nodes:
            if node.name in self.metas:
                node.meta = self.metas[node.name]
            else:
                node.meta.pop("example_value", None)  # that of one length
        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            for node, (args, kwargs) in self.planned:
                node.args, node.kwargs = (_mapped(x, self._expression) for x in (args, kwargs))

    def _expression(self, x: Any) -> Any:
        if not isinstance(x, _Affine):
            return x
        if x not in self.nodes:
            graph = self.scope.graph
            terms: list[Any] = [x.constant] if x.constant else []
            for index in _used(x):
                size, c = self._size(index), x.coefficients[index]
                terms.append(size if c == 1 else graph.call_function(operator.mul, (size, c)))
            self.nodes[x] = reduce(lambda a, b: graph.call_function(operator.add, (b, a)), terms)
        return self.nodes[x]

    def _size(self, index: int) -> fx.Node:
        if index not in self.nodes:
            found = self._source(index)
            assert found is not None
            node, dim = found
            self.nodes[index] = node if dim is None else self.scope.graph.call_method("size", (node, dim))
        return self.nodes[index]


def _used(x: Any) -> list[int]:
    return [i for i, c in enumerate(x.coefficients) if c] if isinstance(x, _Affine) else []


def _leaves(x: Any) -> list[Any]:
    found: list[Any] = []
    _mapped(x, found.append)
    return found


def _mapped(x: Any, f: Callable[[Any], Any]) -> Any:
    if isinstance(x, Mapping):
        return {k: _mapped(y, f) for k, y in x.items()}
    if isinstance(x, slice):
        return slice(*(_mapped(y, f) for y in (x.start, x.stop, x.step)))
    if isinstance(x, (tuple, list)):
        return type(x)(_mapped(y, f) for y in x)
    return f(x)
