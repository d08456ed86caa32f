"""Reading and writing at computed indices: what is indexed is needed whole, what indexes passes.

Where few entries of a sequence are read (the last token of each row) nothing is gathered: each rank has those
that it holds, and zeros for the others. So it is with entries that are added to a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spcompile.placement import Partial, Replicate, Routed, Shard, Sharding
from spcompile.rules.base import Call, Context, Dims, Factors, Rule, Side, Split

__all__ = ["gather", "index", "index_put", "scatter", "scatter_add", "searchsorted"]

aten = torch.ops.aten


def gather(call: Call) -> Rule:
    """out[i, j] = x[i, index[i, j]]: the indexed dim of x is needed whole."""
    x, index = call.operands
    dim = call.args[1] % max(x.dim(), 1)
    out = tuple(f"d{i}" for i in range(index.dim()))
    # An index may be shorter than x in another dim; then the two dims do not run together.
    same = [i != dim and x.shape[i] == index.shape[i] for i in range(x.dim())]
    source = tuple(out[i] if ok else f"x{i}" for i, ok in enumerate(same))
    whole = frozenset(n for n in source if n.startswith("x")) | frozenset(
        out[i] for i, ok in enumerate(same) if not ok and i != dim
    )
    return Picked(Factors(call, (source, out), (out,), whole), {dim: 1})


def scatter(call: Call) -> Factors:
    """x with values written at index along a dim: that dim is needed whole, the others pass."""
    x, dim = call.operands[0], call.args[1]
    names = tuple(f"d{i}" for i in range(x.dim()))
    whole = {names[dim % max(x.dim(), 1)]} if names else set()
    for other in call.operands[1:]:
        whole |= {names[i] for i in range(x.dim()) if other.shape[i] != x.shape[i]}
    return Factors(call, tuple(names for _ in call.operands), (names,), frozenset(whole))


def scatter_add(call: Call) -> Rule:
    """x plus src summed at index along a dim: x has that dim whole, index and src are summed over it."""
    dim = call.args[1] % max(call.operands[0].dim(), 1)
    rule = scatter(call)
    (names,) = rule.outputs
    summed = tuple("s" if i == dim else n for i, n in enumerate(names))
    index, src = call.operands[1:]
    if index.dim() and index.shape[dim] != src.shape[dim]:
        rule.whole |= {"s"}
    factors = Factors(call, (names, summed, summed), (names,), rule.whole, linear=(frozenset({0, 2}),))
    return Accumulate(factors, {dim: 1} if index.shape == src.shape else {}, summed)


def searchsorted(call: Call) -> Factors | None:
    """bucketize, searchsorted: a value's place among boundaries, which are needed whole."""
    if len(call.operands) > 2:
        return None  # a sorter
    first = call.op is aten.searchsorted.Tensor
    boundaries, values = call.operands if first else call.operands[::-1]
    names = tuple(f"d{i}" for i in range(values.dim()))
    batch = names[:-1] if boundaries.dim() > 1 else ()
    bounds: Dims = (*batch, "b")
    return Factors(call, (bounds, names) if first else (names, bounds), (names,), frozenset({"b"}))


def index(call: Call) -> Rule | None:
    """x[i, :, j]: indexed dims of x are needed whole; dims of the index tensors, broadcast together, pass."""
    x, tensors = call.operands[0], list(call.args[1])
    if _by_mask(tensors):
        return None
    source, picked, result = _index_dims(x, tensors)
    whole = frozenset(n for n in source if n is not None and n.startswith("x"))
    return Picked(Factors(call, (source, *picked), (result,), whole), _indexed(tensors, first=1))


def _indexed(tensors: list[Tensor | None], first: int) -> dict[int, int]:
    """Each indexed dim, and which operand indexes it; the first index tensor is operand ``first``."""
    at = [d for d, t in enumerate(tensors) if t is not None]
    return {d: first + i for i, d in enumerate(at)}


def _by_mask(tensors: list[Tensor | None]) -> bool:
    """Whether a mask takes the place of indices: it stands for as many dims as it has."""
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in tensors)


def _index_dims(x: Tensor, tensors: list[Tensor | None]) -> tuple[Dims, list[Dims], Dims]:
    """The factors of x ("x0" for an indexed dim), of each index tensor, and of the result."""
    tensors = tensors + [None] * (x.dim() - len(tensors))
    at = [d for d, t in enumerate(tensors) if t is not None]
    given = [t for t in tensors if t is not None]
    shape = torch.broadcast_shapes(*(t.shape for t in given))
    names = tuple(f"i{len(shape) - d}" for d in range(len(shape)))
    picked: list[Dims] = []
    for t in given:
        offset = len(shape) - t.dim()
        picked.append(
            tuple(None if s == 1 != shape[offset + d] else names[offset + d] for d, s in enumerate(t.shape))
        )
    source = tuple(f"x{d}" if d in at else f"d{d}" for d in range(x.dim()))
    kept = [f"d{d}" for d in range(x.dim()) if d not in at]
    adjacent = at == list(range(at[0], at[-1] + 1))
    where = at[0] if adjacent else 0
    return source, picked, (*kept[:where], *names, *kept[where:])


def _in_block(context: Context, index: Tensor, shard: Shard, wraps: bool) -> tuple[Tensor, Tensor]:
    """Where in this rank's block each index points, and which of them point there.

    An index that the sequence does not have becomes one that no block has: it stays an error. ``wraps``:
    negative ones count from the end.
    """
    index = torch.where(index < 0, index + shard.length, index) if wraps else index
    position = index + (shard.start - context.rank(index.device) * shard.block)
    held = (position >= 0) & (position < shard.block)
    exists = (index >= 0) & (index < shard.length)
    return torch.where(exists, position.clamp(0, shard.block - 1), shard.block), held


@dataclass
class Picked:
    """Entries of a sequence at computed indices: a rank's term has those that it holds, and zeros elsewhere.

    Only where they are so few that their sum sends less than a gather of the sequence. ``indexed``: each
    indexed dim of operand 0, and the operand with its indices.
    """

    factors: Factors
    indexed: dict[int, int]
    linear: tuple[frozenset[int], ...] = ()
    orders = True

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        (x, *_), (out,) = self.factors.call.operands, self.factors.call.outputs
        if (side, index) != ("in", 0) or shard.dim not in self.indexed or isinstance(shard, Routed):
            return self.factors.split(side, index, shard)
        if shard.outer != 1 or 2 * out.numel() > x.numel():
            return None
        others = [Replicate() for _ in self.factors.inputs[1:]]

        def emit(context: Context, operands: list[Tensor]) -> Any:
            at = self.indexed[shard.dim]
            wraps = self.factors.call.op is not aten.gather.default
            local, held = _in_block(context, operands[at], shard, wraps)
            entries = self.factors.call.run([*operands[:at], local, *operands[at + 1 :]])
            held = _aligned(held, self.factors.inputs[at], self.factors.outputs[0])
            return torch.where(held, entries, entries.new_zeros(()))

        return Split((shard, *others), (Partial("sum"),), (None,) * (1 + len(others)), emit)


def _aligned(flags: Tensor, names: Dims, entries: Dims) -> Tensor:
    """``flags``, whose dims are ``names``, for broadcasting to a tensor whose dims are ``entries``."""
    sizes = dict(zip(names, flags.shape, strict=True))
    return flags.reshape([1 if n is None else sizes.get(n, 1) for n in entries])


@dataclass
class Accumulate:
    """x plus values summed at indices: shards of the indices give partial sums, to which x belongs once.

    Where x is a sequence, a rank adds what falls into its block. ``indexed`` is that of :class:`Picked`,
    ``entries`` are the dims of what is added.
    """

    factors: Factors
    indexed: dict[int, int]
    entries: Dims
    orders = True

    @property
    def linear(self) -> tuple[frozenset[int], ...]:
        """In x and the values together."""
        return (frozenset({0, len(self.factors.inputs) - 1}),)

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        if (side == "out" or index == 0) and shard.dim in self.indexed:
            return self._of_block(shard) if isinstance(shard, Shard) and shard.outer == 1 else None
        split = self.factors.split(side, index, shard)
        if split is None or not isinstance(split.outputs[0], Partial):
            return split
        if not isinstance(split.inputs[-1], Sharding):
            return None  # broadcast values: padding would add them once more
        fills = (*(None for _ in split.inputs[1:]), 0.0)
        return replace(split, inputs=(Partial("sum"), *split.inputs[1:]), fills=fills)

    def _of_block(self, shard: Shard) -> Split:
        others = [Replicate() for _ in self.factors.inputs[1:]]

        def emit(context: Context, operands: list[Tensor]) -> Any:
            at, values = self.indexed[shard.dim], operands[-1]
            wraps = self.factors.call.op is not aten.scatter_add.default
            local, held = _in_block(context, operands[at], shard, wraps)
            held = _aligned(held, self.factors.inputs[at], self.entries)
            added = torch.where(held, values, values.new_zeros(()))
            return self.factors.call.run([*operands[:at], local, *operands[at + 1 : -1], added])

        return Split((shard, *others), (shard,), (None,) * (1 + len(others)), emit)


def index_put(call: Call) -> Rule | None:
    """index_put, and the masked form that an embedding's backward is; the accumulating form is a sum."""
    masked = call.op is aten._unsafe_masked_index_put_accumulate.default
    x, values = call.operands[0], call.operands[-1]
    tensors = list(call.args[2] if masked else call.args[1])
    if _by_mask(tensors):
        return None
    source, picked, result = _index_dims(x, tensors)
    shape = _result_shape(x, tensors)

    def aligned(
        given: Tensor,
    ) -> Dims:  # values, and the mask on them, are broadcast to what x[indices] would be
        offset = len(shape) - given.dim()
        return tuple(
            None if s == 1 != shape[offset + d] else result[offset + d] for d, s in enumerate(given.shape)
        )

    mask = (aligned(call.operands[1]),) if masked else ()
    whole = frozenset(n for n in source if n is not None and n.startswith("x"))
    accumulate = masked or bool(call.argument(3, "accumulate", False))
    factors = Factors(
        call,
        (source, *mask, *picked, aligned(values)),
        (source,),
        whole,
        reduce="sum" if accumulate else None,
    )
    if not accumulate:
        return factors
    return Accumulate(factors, {} if masked else _indexed(tensors, first=1), result)


def _result_shape(x: Tensor, tensors: list[Tensor | None]) -> tuple[int, ...]:
    source, _, result = _index_dims(x, tensors)
    sizes = dict(zip(source, x.shape, strict=True))
    shape = torch.broadcast_shapes(*(t.shape for t in tensors if t is not None))
    sizes |= {f"i{len(shape) - d}": s for d, s in enumerate(shape)}
    return tuple(sizes[n] for n in result)
