"""Operators with a kernel of their own: convolutions, and fused attention that was not recognized."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spcompile._torch import flash_attention_cpu, flash_attention_cpu_backward
from spcompile.placement import Shard
from spcompile.rules.base import Call, Context, Dims, Emit, Factors, Rule, Split
from spcompile.rules.convolutions import Convolution, ConvolutionBackward
from spcompile.rules.pointwise import broadcast_dims
from spcompile.rules.pooling import AveragePool, AveragePoolBackward, Unfold

__all__ = ["KERNELS"]

aten = torch.ops.aten


def flash_attention(call: Call) -> Factors | None:
    """Batch entries, heads and rows of queries are independent; keys and values are needed whole.

    Causal rows of one rank are not the first ones, so they are given a mask of their positions.
    """
    backward = call.op is flash_attention_cpu_backward
    if call.argument(6 if backward else 3, "dropout_p", 0.0) != 0.0:
        return None  # this kernel has no dropout
    grouped = len({x.shape[1] for x in call.operands[: 4 if backward else 3]}) > 1
    causal = bool(call.argument(7 if backward else 4, "is_causal", False))
    q, k, v = ("b", "h", "t", "e"), ("b", "h", "s", "e"), ("b", "h", "s", "f")
    rows, lse = ("b", "h", "t", "f"), ("b", "h", "t")
    inputs: list[Dims] = [rows, q, k, v, rows, lse] if backward else [q, k, v]
    if len(call.operands) > len(inputs):
        first = call.operands[1 if backward else 0]
        scores = (*first.shape[:3], call.operands[2 if backward else 1].shape[2])
        names = dict(d4="b", d3="h", d2="t", d1="s")
        mask = broadcast_dims(tuple(call.operands[-1].shape), scores)
        inputs.append(tuple(None if d is None else names[d] for d in mask))
    whole = frozenset({"s", "e", "f", *({"h"} if grouped else ())})
    outputs: list[Dims] = [q, k, v] if backward else [rows, lse]
    emit = (lambda split: _causal_rows(call, split, backward)) if causal else None
    return Factors(call, tuple(inputs), tuple(outputs), whole, mixed=backward, emit=emit)


def _causal_rows(call: Call, split: Split, backward: bool) -> Emit:
    shard = split.outputs[0]
    assert isinstance(shard, Shard)
    if shard.dim != 2:
        return lambda context, operands: call.run(operands)
    keys = call.operands[2 if backward else 1].shape[2]

    def emit(context: Context, operands: list[Tensor]) -> Any:
        row = context.flat_index(shard, operands[0].device)
        seen = torch.arange(keys, device=row.device) <= row.reshape(-1, 1)
        q = operands[0]
        mask = torch.where(seen, q.new_zeros(()), q.new_full((), -math.inf))
        _, kwargs = call.replaced(operands)
        options = {"attn_mask": mask, "scale": kwargs.get("scale")}
        return call.op(*operands, 0.0, False, **options)

    return emit


# attn_mask is a keyword, so of the operands it is the last.
KERNELS: dict[Any, Callable[[Call], Rule | None]] = {
    aten.convolution.default: Convolution,
    aten.convolution_backward.default: ConvolutionBackward,
    aten.avg_pool2d.default: AveragePool,
    aten.avg_pool2d_backward.default: AveragePoolBackward,
    aten.unfold.default: Unfold,
    flash_attention_cpu: flash_attention,
    flash_attention_cpu_backward: flash_attention,
}
