"""Which outputs of a joint graph are gradients of parameters, for the option ``gradients="partial"``."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from spcompile.errors import SpcompileError
from spcompile.passes.shard.propagate import Value, value_of

__all__ = ["gradients_of"]


def gradients_of(graph: fx.Graph, parameters: Collection[str]) -> set[Value]:
    """The values that are returned as gradients of parameters, and as nothing else.

    A joint graph returns what the forward does, and then one entry for each of its primals: the gradient, or
    None. A value that is also returned as something else (the gradient of an input, say) is left out: it must
    be whole there.

    Raises:
        SpcompileError: the entries do not fit the primals.
    """
    nodes = list(graph.nodes)
    primals = [n for n in nodes if n.op == "placeholder" and n.name.startswith("primals")]
    outputs = tree_leaves(nodes[-1].args, is_leaf=lambda x: x is None)
    count = len(primals) if any(n.name.startswith("tangents") for n in nodes) else 0
    gradients = outputs[len(outputs) - count :]
    found, others = set(), {value_of(x) for x in outputs[: len(outputs) - count] if isinstance(x, fx.Node)}
    for primal, gradient in zip(primals[:count], gradients, strict=True):
        if not isinstance(gradient, fx.Node):
            continue
        if primal.name in parameters:
            _check(primal, gradient)
            found.add(value_of(gradient))
        else:
            others.add(value_of(gradient))
    return found - others


def _check(primal: fx.Node, gradient: fx.Node) -> None:
    x, g = primal.meta.get("val"), gradient.meta.get("val")
    if not (isinstance(x, Tensor) and isinstance(g, Tensor) and x.shape == g.shape):
        raise SpcompileError(
            f"option gradients='partial': {gradient.name} is not the gradient of {primal.name}; the graph "
            "has inputs that this option does not understand. Remedy: gradients='whole'."
        )
