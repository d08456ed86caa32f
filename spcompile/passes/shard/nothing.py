"""Tensors without entries: they are made where they are, and no rank holds a part of them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from spcompile._torch import OpOverload

__all__ = ["make_empty"]

_FULL = torch.ops.aten.full.default


def make_empty(graph: fx.Graph) -> None:
    """Replace what computes a tensor of no entries by one that reads no tensor.

    A slice of the sequence that is empty would otherwise be a shard of length 0, of which no position is the
    nearest valid one. Sizes that a graph leaves open are not 0.
    """
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(node.target, OpOverload) or node.target is _FULL:
            continue
        if not isinstance(value, Tensor) or not any(type(n) is int and n == 0 for n in value.shape):
            continue
        if node.target._schema.is_mutable or not all(type(n) is int for n in value.shape):
            continue
        with graph.inserting_before(node):
            how = {"dtype": value.dtype, "device": value.device}
            made = graph.call_function(_FULL, (list(value.shape), 0), how)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
