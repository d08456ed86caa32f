"""Which part of a joint graph is the backward."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

__all__ = ["backward_of", "is_tangent"]


def is_tangent(node: fx.Node) -> bool:
    """Whether a node is the gradient of an output, with which a backward begins."""
    return node.op == "placeholder" and node.name.startswith("tangents")


def backward_of(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes of a joint graph, in order, that depend on the gradients of its outputs."""
    found: set[fx.Node] = set()
    for node in nodes:
        if is_tangent(node) or any(x in found for x in node.all_input_nodes):
            found.add(node)
    return found
