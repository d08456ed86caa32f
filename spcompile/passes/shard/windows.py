"""Windows and shifts along a dim, moved to where they are views of what has been computed anyway.

Five rewrites of the joint graph, none of which changes a value:

    split(x, [a, b])[1]                   ->  x[a:a+b]
    x[:, [2, 3, 4, 0, 1]]                 ->  cat([x[:, 2:5], x[:, 0:2]])      known numbers: a roll
    f(x, y)[a:b]                          ->  f(x[a:b], y[a:b])                f pointwise, used but there
    pad(x * w)                            ->  pad(x) * w                       w the same all along the dim
    flip(cumsum(flip(x)))                 ->  spcompile::reverse_cumsum(x)     and flip(flip(x)) -> x

By the first two, a part of a sequence is a window like any other. By the third, what sticks out of a sequence
(the tail of a padded convolution) is cut off at its source. By the fourth, the terms of a sum of shifted
products are shifts of one tensor, which share one halo. The fifth is the backward of a cumulative sum; a
flipped sequence would lie on other ranks.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map, tree_map_only

from spcompile._torch import disable_current_modes
from spcompile.expressions import Expressions
from spcompile.passes.numbers import unsized
from spcompile.passes.shard.propagate import call_of
from spcompile.rules.pointwise import is_pointwise
from spcompile.rules.scans import reverse_cumsum
from spcompile.sizes import bounds_of

__all__ = ["move_windows"]

aten, prims = torch.ops.aten, torch.ops.prims

# What makes a tensor longer than the sequence, or reads one that is.
_WIDENS = {aten.convolution.default, aten.slice_scatter.default, aten.constant_pad_nd.default}
_INDEXES = {aten.index.Tensor, aten._unsafe_index.Tensor}
# Runs of neighbours that an index by known numbers may have: each is a slice.
_RUNS = 4
_FLIPS = {aten.flip.default, prims.rev.default}


class _Crop(NamedTuple):
    """The entries [start, stop) of a dim."""

    dim: int
    start: int
    stop: int


def move_windows(graph: fx.Graph, fake_mode: Any) -> None:
    """Rewrite ``graph``, a functional joint graph, in place; see this module."""
    writer = _Writer(graph, fake_mode)
    todo = list(graph.nodes)
    while todo:  # from the last node backwards, so that a window travels through all of a chain
        node = todo.pop()
        if node.op == "call_function" and not node._erased and _is_sized(node):
            found = (rewrite(writer, node) for rewrite in _REWRITES)
            todo += next(filter(None, found), [])
    graph.lint()


class _Writer:
    """Adds nodes before one that is being replaced, and takes that away."""

    def __init__(self, graph: fx.Graph, fake_mode: Any) -> None:
        self.graph, self.fake_mode, self.sizes = graph, fake_mode, Expressions(graph)

    def call(self, before: fx.Node, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call placed at ``before`` that stems from ``like``: from its source line, under its tags."""
        written = tree_map_only(torch.SymInt, self.sizes.node, (args, kwargs))
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, *written)
        node.meta = dict(like.meta)
        with self.fake_mode, torch.no_grad():
            node.meta["val"] = target(*tree_map(_value, args), **tree_map(_value, kwargs))
        node.meta.pop("tensor_meta", None)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """``new`` takes the place of ``old``; what is no longer used goes."""
        old.replace_all_uses_with(new)
        todo = [old]
        while todo:
            node = todo.pop()
            is_size = isinstance(node.meta.get("val"), torch.SymInt)  # it may be used again
            if not (node.users or is_size or node._erased) and node.op == "call_function":
                todo += node.all_input_nodes
                self.graph.erase_node(node)


def _is_sized(node: fx.Node) -> bool:
    """Whether ``node`` takes tensors alone, and all that it takes and gives are of known size."""
    values = [x.meta.get("val") for x in node.all_input_nodes]
    return all(isinstance(v, Tensor) for v in values) and not unsized([*values, node.meta.get("val")])


def _value(x: Any) -> Any:
    return x.meta["val"] if isinstance(x, fx.Node) else x


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return _shape(a) == _shape(b) and a.meta["val"].dtype == b.meta["val"].dtype


def _used_once(node: Any) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1


# -------------------------------------------------------------------------------------- split(x, sizes)


def _unsplit(writer: _Writer, node: fx.Node) -> list[fx.Node]:
    """split(x, sizes)[i] -> the slice that it is; the new slices."""
    if node.target not in (aten.split.Tensor, aten.split_with_sizes.default):
        return []
    dim = call_of(node).argument(2, "dim", 0)
    ends = [0, *accumulate(part.shape[dim] for part in node.meta["val"])]
    slices = []
    for part in list(node.users):
        start, stop = ends[part.args[1] :][:2]
        slices.append(writer.call(part, part, aten.slice.Tensor, node.args[0], dim, start, stop))
        writer.replace(part, slices[-1])
    return slices


# --------------------------------------------------------------------------------------- x[:, numbers]


def _cut(writer: _Writer, node: fx.Node) -> list[fx.Node]:
    """index(x, [None, numbers]) -> the slices that it is, one behind the other."""
    if node.target not in _INDEXES:
        return []
    x, picks = node.args[:2]
    dims = [d for d, i in enumerate(picks) if i is not None]
    if len(dims) != 1 or len(_shape(picks[dims[0]])) != 1 or picks[dims[0]].meta["val"].dtype == torch.bool:
        return []
    (dim,) = dims
    with disable_current_modes():
        runs = _runs(_known(picks[dim], {}), _shape(x)[dim])
    if not 0 < len(runs) <= _RUNS:
        return []
    slices = [writer.call(node, node, aten.slice.Tensor, x, dim, *run) for run in runs]
    whole = slices[0] if len(slices) == 1 else writer.call(node, node, aten.cat.default, slices, dim)
    writer.replace(node, whole)
    return slices


def _runs(numbers: Tensor | None, size: int) -> list[tuple[int, int]]:
    """(start, stop) of each run of neighbours; none if they are not known, or not all of the dim's."""
    if numbers is None or not numbers.numel():
        return []
    numbers = torch.where(numbers < 0, numbers + size, numbers)
    if int(numbers.min()) < 0 or int(numbers.max()) >= size:
        return []
    ends = [0, *((numbers.diff() != 1).nonzero().flatten() + 1).tolist(), numbers.numel()]
    return [(int(numbers[a]), int(numbers[a]) + b - a) for a, b in pairwise(ends)]


def _known(node: fx.Node, made: dict[fx.Node, Tensor | None]) -> Tensor | None:
    """The numbers that a chain of operators on counted ones gives, on the CPU; None if it is another."""
    if node not in made:
        made[node] = None
        value = node.meta.get("val")
        given = {n: _known(n, made) for n in node.all_input_nodes}
        counts = node.target is prims.iota.default or (given and is_pointwise(node.target))
        if (
            counts
            and isinstance(value, Tensor)
            and not value.is_floating_point()
            and None not in given.values()
        ):
            args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
            where = {"device": torch.device("cpu")} if "device" in kwargs else {}
            made[node] = node.target(*args, **{**kwargs, **where})
    return made[node]


# ------------------------------------------------------------------------------------------ f(x)[a:b]


def _crop_of(node: fx.Node) -> _Crop | None:
    """The crop that ``node`` is: a slice without steps, or a pad by a negative number."""
    if node.target is aten.slice.Tensor:
        call, size = call_of(node), _shape(node.args[0])
        dim = call.argument(1, "dim", 0)
        first, last, by = (call.argument(i, name) for i, name in ((2, "start"), (3, "end"), (4, "step")))
        start, stop, step = bounds_of(first, last, by, size[dim])
        return _Crop(dim % len(size), start, stop) if step == 1 else None
    if node.target is aten.constant_pad_nd.default:
        size, pads = _shape(node.args[0]), list(node.args[1])
        moved = [i // 2 for i, p in enumerate(pads) if p]
        if moved and len(set(moved)) == 1 and max(pads) <= 0:
            dim, (left, right) = len(size) - 1 - moved[0], pads[2 * moved[0] :][:2]
            return _Crop(dim, -left, size[dim] + right)
    return None


def _hoist_crop(writer: _Writer, node: fx.Node) -> list[fx.Node]:
    """f(x, y)[a:b] -> f(x[a:b], y[a:b]); the new crops, which may travel on."""
    crop = _crop_of(node)
    source = node.args[0] if crop is not None else None
    if crop is None or not _used_once(source) or not _stems_from_padding(source):
        return []
    crops: list[fx.Node] = []

    def cropped(x: Any, dim: int) -> Any:
        found = writer.call(node, node, aten.slice.Tensor, x, dim, crop.start, crop.stop)
        crops.append(found)
        return found

    if source.target is aten.permute.default:
        x, order = source.args
        inner = cropped(x, order[crop.dim] % len(order))
        writer.replace(node, writer.call(node, source, source.target, inner, order))
        return crops
    shape = _shape(source)

    def operand(x: Any) -> Any:
        if not isinstance(x, fx.Node) or not isinstance(x.meta["val"], Tensor):
            return x
        dim = crop.dim - len(shape) + x.meta["val"].dim()
        broadcast = dim < 0 or _shape(x)[dim] == 1 != shape[crop.dim]
        return x if broadcast else cropped(x, dim)

    args, kwargs = fx.map_arg((source.args, source.kwargs), operand)
    writer.replace(node, writer.call(node, source, source.target, *args, **kwargs))
    return crops


def _moves_through(node: Any) -> bool:
    return _used_once(node) and (
        node.target is aten.permute.default
        or (is_pointwise(node.target) and isinstance(node.meta.get("val"), Tensor))
    )


def _stems_from_padding(node: Any) -> bool:
    """Whether ``node`` is a chain of pointwise operators on something that was made longer."""
    if not _moves_through(node):
        return False
    return any(x.target in _WIDENS or _stems_from_padding(x) for x in node.all_input_nodes)


# ---------------------------------------------------------------------------------------- pad(x * w)


def _hoist_factor(writer: _Writer, node: fx.Node) -> list[fx.Node]:
    """pad(x * w) -> pad(x) * w where x is used elsewhere too: then it is x whose halo is exchanged.

    Returns what uses the product, which may now move up.
    """
    source, dim = _widened(node)
    if not _used_once(source) or source.target is not aten.mul.Tensor or source.kwargs:
        return []
    for x, w in (source.args, source.args[::-1]):
        if not all(isinstance(t, fx.Node) for t in (x, w)) or not _alike(x, source):
            continue
        along = dim - len(_shape(source)) + len(_shape(w))
        if len(x.users) > 1 and (along < 0 or _shape(w)[along] == 1 != _shape(x)[dim]):
            moved = writer.call(node, node, node.target, *[x if a is source else a for a in node.args])
            product = writer.call(node, source, aten.mul.Tensor, moved, w)
            writer.replace(node, product)
            return list(product.users)
    return []


def _widened(node: fx.Node) -> tuple[Any, int]:
    """What ``node`` puts between zeros along one dim, and the dim."""
    rank = len(_shape(node)) if isinstance(node.meta.get("val"), Tensor) else 0
    if node.target is aten.slice_scatter.default and not node.kwargs:
        base, source, dim = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else 0
        if isinstance(base, fx.Node) and base.target is aten.full.default and base.args[1] == 0:
            return source, dim % rank
    if node.target is aten.constant_pad_nd.default and (len(node.args) < 3 or node.args[2] == 0):
        moved = {i // 2 for i, p in enumerate(node.args[1]) if p}
        if len(moved) == 1:
            return node.args[0], rank - 1 - moved.pop()
    return None, 0


# ----------------------------------------------------------------------------- flip(cumsum(flip(x)))


def _reverse(writer: _Writer, node: fx.Node) -> list[fx.Node]:
    """flip(cumsum(flip(x, d), d), d) -> reverse_cumsum(x, d), and flip(flip(x, d), d) -> x."""
    inner = node.args[0] if node.target in _FLIPS else None
    if not isinstance(inner, fx.Node):
        return []
    rank = len(_shape(node))
    if inner.target in _FLIPS and _flipped(inner, rank) == _flipped(node, rank):
        writer.replace(node, inner.args[0])
    if not _used_once(inner) or inner.target is not aten.cumsum.default or inner.kwargs:
        return []
    first, dim = inner.args[0], inner.args[1] % rank
    if first.target not in _FLIPS or not [dim] == _flipped(first, rank) == _flipped(node, rank):
        return []
    (x, *_) = first.args
    if x.meta["val"].dtype == node.meta["val"].dtype:  # else integers, summed as int64
        writer.replace(node, writer.call(node, inner, reverse_cumsum, x, dim))
    return []


_REWRITES = (_unsplit, _cut, _hoist_crop, _hoist_factor, _reverse)


def _flipped(node: fx.Node, rank: int) -> list[int]:
    return sorted(d % rank for d in call_of(node).args[1])
