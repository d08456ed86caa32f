"""Symbolic sizes become numbers: each length is compiled for itself (the guard makes Dynamo do so)."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from spcompile.passes.numbers import SYMBOLIC, is_operand, size_symbols, unsized

__all__ = ["specialise"]


def specialise(graph: fx.Graph) -> None:
    """Replace every symbolic size in ``graph`` by its value, with a guard, and erase what computed it.

    Other symbolic numbers stay (spcompile/passes/numbers.py).
    """
    sizes = size_symbols(n.meta.get("val") for n in graph.nodes)
    for node in graph.nodes:
        if any(_is_symbolic(x) for x in tree_leaves(node.meta.get("val"))):
            node.meta["val"] = tree_map_only(Tensor, _concrete, node.meta["val"])
    numbers = [n for n in graph.nodes if isinstance(n.meta.get("val"), (*SYMBOLIC, int, float, bool))]
    for node in reversed([n for n in numbers if not is_operand(n.meta["val"], sizes)]):
        number = _number(node.meta["val"])
        for user in list(node.users):
            if user.op != "output":
                _write_in(user, node, number)
        if not node.users and node.op == "call_function" and not node.is_impure():
            graph.erase_node(node)


def _write_in(user: fx.Node, node: fx.Node, number: object) -> None:
    """Put ``number`` in the place of ``node`` among the arguments of ``user``."""
    user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: number if n is node else n)


def _number(value: object) -> object:
    if isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, torch.SymFloat):
        return float(value)
    return bool(value) if isinstance(value, torch.SymBool) else value


def _is_symbolic(value: object) -> bool:
    if not isinstance(value, Tensor):
        return False
    return any(isinstance(s, torch.SymInt) for s in (*value.shape, *value.stride()))


def _concrete(value: Tensor) -> Tensor:
    if not _is_symbolic(value) or unsized(value):
        return value
    with value.fake_mode:
        shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
