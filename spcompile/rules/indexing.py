"""Reading and writing at computed indices: what is indexed is needed whole, what indexes passes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spcompile.placement import Partial, Shard
from spcompile.rules.base import Call, Dims, Factors, Side, Split

__all__ = ["gather", "index", "index_put", "scatter", "scatter_add", "searchsorted"]

aten = torch.ops.aten


def gather(call: Call) -> Factors:
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
    return Factors(call, (source, out), (out,), whole)


def scatter(call: Call) -> Factors:
    """x with values written at index along a dim: that dim is needed whole, the others pass."""
    x, dim = call.operands[0], call.args[1]
    names = tuple(f"d{i}" for i in range(x.dim()))
    whole = {names[dim % max(x.dim(), 1)]} if names else set()
    for other in call.operands[1:]:
        whole |= {names[i] for i in range(x.dim()) if other.shape[i] != x.shape[i]}
    return Factors(call, tuple(names for _ in call.operands), (names,), frozenset(whole))


def scatter_add(call: Call) -> Accumulate:
    """x plus src summed at index along a dim: x has that dim whole, index and src are summed over it."""
    dim = call.args[1] % max(call.operands[0].dim(), 1)
    rule = scatter(call)
    (names,) = rule.outputs
    summed = tuple("s" if i == dim else n for i, n in enumerate(names))
    index, src = call.operands[1:]
    if index.dim() and index.shape[dim] != src.shape[dim]:
        rule.whole |= {"s"}
    return Accumulate(
        Factors(call, (names, summed, summed), (names,), rule.whole, linear=(frozenset({0, 2}),))
    )


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


def index(call: Call) -> Factors | None:
    """x[i, :, j]: indexed dims of x are needed whole; dims of the index tensors, broadcast together, pass."""
    x, tensors = call.operands[0], list(call.args[1])
    if _by_mask(tensors):
        return None
    source, picked, result = _index_dims(x, tensors)
    whole = frozenset(n for n in source if n is not None and n.startswith("x"))
    return Factors(call, (source, *picked), (result,), whole)


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


@dataclass
class Accumulate:
    """x plus values summed at indices: shards of the indices give partial sums, to which x belongs once."""

    factors: Factors

    @property
    def linear(self) -> tuple[frozenset[int], ...]:
        """In x and the values together."""
        return (frozenset({0, len(self.factors.inputs) - 1}),)

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        split = self.factors.split(side, index, shard)
        if split is None or not isinstance(split.outputs[0], Partial):
            return split
        if not isinstance(split.inputs[-1], Shard):
            return None  # broadcast values: padding would add them once more
        fills = (*(None for _ in split.inputs[1:]), 0.0)
        return replace(split, inputs=(Partial("sum"), *split.inputs[1:]), fills=fills)


def index_put(call: Call) -> Accumulate | Factors | None:
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
    return Accumulate(factors) if accumulate else factors


def _result_shape(x: Tensor, tensors: list[Tensor | None]) -> tuple[int, ...]:
    source, _, result = _index_dims(x, tensors)
    sizes = dict(zip(source, x.shape, strict=True))
    shape = torch.broadcast_shapes(*(t.shape for t in tensors if t is not None))
    sizes |= {f"i{len(shape) - d}": s for d, s in enumerate(shape)}
    return tuple(sizes[n] for n in result)
