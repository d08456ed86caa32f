"""Operators that compute each entry from the entries at the same place."""

from __future__ import annotations

from typing import Any

import torch

from spcompile import _torch
from spcompile.rules.base import Call, Dims, Factors

aten, prims = torch.ops.aten, torch.ops.prims

# Pointwise operators without the tag.
UNTAGGED = {
    prims.convert_element_type.default,
    aten.clone.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.where.self,
    aten.copy.default,
    aten.complex.default,
    aten.polar.default,
    *_torch.UNTAGGED_POINTWISE,
}

# The sets of tensor operands in which each is jointly linear: f(sum of x) = sum of f(x).
_LINEAR: dict[Any, tuple[set[int], ...]] = {
    aten.add.Tensor: ({0, 1},),
    aten.sub.Tensor: ({0, 1},),
    aten.neg.default: ({0},),
    aten.mul.Tensor: ({0}, {1}),
    aten.mul.Scalar: ({0},),
    aten.div.Tensor: ({0},),
    aten.div.Scalar: ({0},),
    aten.where.self: ({1, 2},),
    aten.clone.default: ({0},),
    aten.alias.default: ({0},),
    prims.convert_element_type.default: ({0},),
}


def is_pointwise(op: Any) -> bool:
    """Whether each output entry depends only on the operands' entries at its place, and not on chance."""
    tags = getattr(op, "tags", ())
    writes = getattr(getattr(op, "_schema", None), "is_mutable", False)
    if writes or torch.Tag.nondeterministic_seeded in tags:
        return False
    return torch.Tag.pointwise in tags or op in UNTAGGED


def broadcast_dims(shape: tuple[int, ...], out_shape: tuple[int, ...]) -> Dims:
    """The factor of each dim of an operand that is broadcast to ``out_shape``, counted from the right."""
    offset = len(out_shape) - len(shape)
    return tuple(
        None if size == 1 != out_shape[offset + d] else f"d{len(shape) - d}" for d, size in enumerate(shape)
    )


def pointwise(call: Call) -> Factors:
    """Every dim passes; operands are broadcast from the right."""
    shape = tuple(call.outputs[0].shape)
    inputs = tuple(broadcast_dims(tuple(x.shape), shape) for x in call.operands)
    outputs = tuple(broadcast_dims(tuple(x.shape), shape) for x in call.outputs)
    return Factors(call, inputs, outputs, linear=_linear(call))


def _linear(call: Call) -> tuple[frozenset[int], ...]:
    sets = _LINEAR.get(call.op, ())
    if call.op is prims.convert_element_type.default and not _widens(call):
        return ()  # rounding each term and then the sum differ
    # With a number in place of a tensor the operator is affine, not linear, unless one tensor alone is a set.
    return tuple(frozenset(s) for s in sets if max(s) < len(call.operands))


def _widens(call: Call) -> bool:
    source, target = call.operands[0].dtype, call.outputs[0].dtype
    floats = source.is_floating_point and target.is_floating_point
    return floats and (source == target or target.itemsize > source.itemsize)
