"""Symbolic sizes as nodes of a graph: the text of an expression in the sizes that the graph is given."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor, fx

__all__ = ["Expressions"]


class Expressions:
    """Writes symbolic sizes into ``graph``, each once, right behind its inputs.

    Args:
        meta: under which key the nodes have their values: "val", or "example_value" in Dynamo's graphs.
    """

    def __init__(self, graph: fx.Graph, meta: str = "val") -> None:
        self.graph, self.meta = graph, meta
        self._nodes: dict[sympy.Expr, fx.Node] = {}
        self._last: fx.Node | None = None

    def node(self, size: SymInt) -> Any:
        """The node that computes ``size``; a number if that is all it is, or all that can be written."""
        expr = size.node.expr
        if not expr.is_Integer and not all(self._inputs().get(s) for s in expr.free_symbols):
            return int(size)  # of no input: specialised, with a guard
        return self._write(expr, size.node.shape_env, int)

    def _inputs(self) -> dict[sympy.Expr, fx.Node]:
        """Symbol -> the placeholder that is it, or that has it as a size."""
        if self._last is None:
            placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
            self._last = placeholders[-1] if placeholders else None
            for node in placeholders:
                value = node.meta.get(self.meta)
                if isinstance(value, SymInt) and value.node.expr.is_Symbol:
                    self._nodes.setdefault(value.node.expr, node)
            for node in placeholders:
                value = node.meta.get(self.meta)
                for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                    if isinstance(size, SymInt) and size.node.expr.is_Symbol:
                        if size.node.expr not in self._nodes:
                            made = self._call(torch.ops.aten.sym_size.int, (node, dim), size)
                            self._nodes[size.node.expr] = made
        return self._nodes

    def _write(self, expr: sympy.Expr, env: Any, otherwise: Callable[[SymInt], int]) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr not in self._nodes:
            target = _TARGETS.get(type(expr).__name__)
            value = env.create_symintnode(expr, hint=int(env.guarding_hint_or_throw(expr)))
            if target is None:
                return otherwise(value)
            args = [self._write(x, env, otherwise) for x in expr.args]
            made = reduce(lambda a, b: self._binary(target, a, b, env), args)
            if isinstance(made, int):
                return made
            made.meta[self.meta] = value
            self._nodes[expr] = made
        return self._nodes[expr]

    def _binary(self, target: Any, a: Any, b: Any, env: Any) -> Any:
        values = [x.meta[self.meta] if isinstance(x, fx.Node) else x for x in (a, b)]
        value = target(*values)
        return value if isinstance(value, int) else self._call(target, (a, b), value)

    def _call(self, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
        assert self._last is not None
        with self.graph.inserting_after(self._last):
            node = self.graph.call_function(target, args)
        node.meta[self.meta] = value
        self._last = node
        return node


# By the name of sympy's class, or of PyTorch's own for integers.
_TARGETS: dict[str, Any] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "Pow": operator.pow,
    "PowByNatural": operator.pow,
}
