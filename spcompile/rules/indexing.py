"""Operators that read or write entries at computed indices: what is indexed is needed whole, what indexes passes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spcompile.placement import Partial, Shard
from spcompile.rules.base import Call, Dims, Factors, Side, Split

__all__ = ["gather", "index", "index_put", "scatter"]

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


def index(call: Call) -> Factors:
    """x[i, :, j]: indexed dims of x are needed whole; dims of the index tensors, broadcast together, pass."""
    x, tensors = call.operands[0], list(call.args[1])
    source, picked, result = _index_dims(x, tensors)
    whole = frozenset(n for n in source if n is not None and n.startswith("x"))
    return Factors(call, (source, *picked), (result,), whole)


def _index_dims(x: Tensor, tensors: list[Tensor | None]) -> tuple[Dims, list[Dims], Dims]:
    """The factors of the indexed tensor ("x0" for an indexed dim), of each index tensor, and of the result."""
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
    linear: tuple[frozenset[int], ...] = ()

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        split = self.factors.split(side, index, shard)
        if split is None or not isinstance(split.outputs[0], Partial):
            return split
        values = len(split.inputs) - 1
        fills = tuple(0.0 if i == values and isinstance(p, Shard) else None for i, p in enumerate(split.inputs))
        return replace(split, inputs=(Partial("sum"), *split.inputs[1:]), fills=fills)


def index_put(call: Call) -> Accumulate | Factors:
    """index_put, and the masked form that an embedding's backward is; the accumulating form is a sum."""
    masked = call.op is aten._unsafe_masked_index_put_accumulate.default
    x, values = call.operands[0], call.operands[-1]
    tensors = list(call.args[2] if masked else call.args[1])
    source, picked, result = _index_dims(x, tensors)
    shape = _result_shape(x, tensors)

    def aligned(given: Tensor) -> Dims:  # values, and the mask on them, are broadcast to what x[indices] would be
        offset = len(shape) - given.dim()
        return tuple(None if s == 1 != shape[offset + d] else result[offset + d] for d, s in enumerate(given.shape))

    mask = (aligned(call.operands[1]),) if masked else ()
    whole = frozenset(n for n in source if n is not None and n.startswith("x"))
    accumulate = masked or bool(call.argument(3, "accumulate", False))
    factors = Factors(
        call, (source, *mask, *picked, aligned(values)), (source,), whole, reduce="sum" if accumulate else None
    )
    return Accumulate(factors) if accumulate else factors


def _result_shape(x: Tensor, tensors: list[Tensor | None]) -> tuple[int, ...]:
    source, picked, result = _index_dims(x, tensors)
    sizes = {n: s for n, s in zip(source, x.shape, strict=True)}
    shape = torch.broadcast_shapes(*(t.shape for t in tensors if t is not None))
    sizes |= {f"i{len(shape) - d}": s for d, s in enumerate(shape)}
    return tuple(sizes[n] for n in result)
