"""Symbolic floats and bools that follow sizes become numbers: each is compiled for itself (the guard makes
Dynamo do so). Sizes stay symbolic (``spcompile/sizes.py``), and so do numbers that are operands
(``spcompile/passes/numbers.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from spcompile.passes.numbers import is_operand, size_symbols

__all__ = ["specialise"]

_NUMBERS = (torch.SymFloat, torch.SymBool, int, float, bool)


def specialise(graph: fx.Graph) -> None:
    """Replace every symbolic float and bool of sizes in ``graph`` by its value, with a guard, and erase what
    computed it."""
    sizes = size_symbols(n.meta.get("val") for n in graph.nodes)
    numbers = [n for n in graph.nodes if isinstance(n.meta.get("val"), _NUMBERS)]
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


def _number(value: Any) -> object:
    if isinstance(value, torch.SymFloat):
        return float(value)
    return bool(value) if isinstance(value, torch.SymBool) else value
