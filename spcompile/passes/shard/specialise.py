"""Symbolic sizes become numbers: each length is compiled for itself (the guard makes Dynamo do so).

Under ``lengths="symbolic"`` they stay (``spcompile/sizes.py``), and only floats and bools that follow them
become numbers. Numbers that are operands stay in any case (``spcompile/passes/numbers.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from spcompile.passes.numbers import SYMBOLIC, is_operand, size_symbols, unsized
from spcompile.sizes import is_symbolic

__all__ = ["specialise"]


def specialise(graph: fx.Graph, sizes: bool) -> None:
    """Replace symbolic numbers in ``graph`` by their values, with guards, and erase what computed them.

    Args:
        sizes: whether sizes become numbers too, or only what follows them and is no size.
    """
    symbols = size_symbols(n.meta.get("val") for n in graph.nodes)
    kept: tuple[type, ...] = () if sizes else (torch.SymInt,)
    if sizes:
        for node in graph.nodes:
            if any(_sized_by_symbols(x) for x in tree_leaves(node.meta.get("val"))):
                node.meta["val"] = tree_map_only(Tensor, _concrete, node.meta["val"])
    numbers = [n for n in graph.nodes if isinstance(n.meta.get("val"), (*SYMBOLIC, int, float, bool))]
    for node in reversed(numbers):
        if isinstance(node.meta["val"], kept) or is_operand(node.meta["val"], symbols):
            continue
        number = _number(node.meta["val"])
        for user in list(node.users):
            if user.op != "output":
                _write_in(user, node, number)
        if not node.users and node.op == "call_function" and not node.is_impure():
            graph.erase_node(node)


def _write_in(user: fx.Node, node: fx.Node, number: object) -> None:
    """Put ``number`` in the place of ``node`` among the arguments of ``user``."""
    user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: number if n is node else n)


def _number(value: Any) -> object:
    if isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, torch.SymFloat):
        return float(value)
    return bool(value) if isinstance(value, torch.SymBool) else value


def _sized_by_symbols(value: object) -> bool:
    return isinstance(value, Tensor) and any(map(is_symbolic, (*value.shape, *value.stride())))


def _concrete(value: Tensor) -> Tensor:
    if not _sized_by_symbols(value) or unsized(value):
        return value
    with value.fake_mode:
        shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
