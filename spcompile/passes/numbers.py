"""Which symbolic numbers of a graph are sizes of tensors, and which are operands like any tensor.

A size is an expression that is written where it is used (``spcompile/sizes.py``). A number that no
tensor's size depends on (a step that the model is told, a count that is known at run time only) is passed on
as it is: were it written in, each of its values would be compiled for itself, and one that is known at run
time only has none to write in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from spcompile import _torch

__all__ = ["SYMBOLIC", "is_operand", "is_size", "size_symbols", "unsized"]

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def size_symbols(values: Iterable[Any]) -> frozenset[Any]:
    """The symbols on which the sizes and strides of tensors depend, and whose value is known now."""
    tensors = (x for value in values for x in tree_leaves(value) if isinstance(x, Tensor))
    symbols = {s for x in tensors for n in _geometry(x) for s in _symbols(n)}
    return frozenset(s for s in symbols if not _torch.is_unbacked(s))


def is_operand(value: Any, sizes: frozenset[Any]) -> bool:
    """Whether a value is a symbolic number that depends on more than sizes."""
    return isinstance(value, SYMBOLIC) and not _symbols(value) <= sizes


def is_size(value: Any, sizes: frozenset[Any]) -> bool:
    """Whether a value is a symbolic integer that depends on sizes alone."""
    return isinstance(value, torch.SymInt) and not is_operand(value, sizes)


def unsized(value: Any) -> bool:
    """Whether a tensor among the leaves of ``value`` has a size that is known at run time only."""
    tensors = (x for x in tree_leaves(value) if isinstance(x, Tensor))
    return any(_torch.is_unbacked(s) for x in tensors for n in _geometry(x) for s in _symbols(n))


def _geometry(x: Tensor) -> list[Any]:
    if _torch.is_wrapped(x) or x.layout is not torch.strided:
        return list(x.shape)
    return [*x.shape, *x.stride()]


def _symbols(number: Any) -> frozenset[Any]:
    return frozenset(number.node.expr.free_symbols) if isinstance(number, SYMBOLIC) else frozenset()
