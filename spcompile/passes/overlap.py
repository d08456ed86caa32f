"""After Inductor's own passes: waits as late as they are needed, and none that nobody needs.

A wait counts as having side effects, so neither fx nor the partitioner drops a dead one: the backward would gather
again what the forward gathered, for nobody.
"""

from __future__ import annotations

import torch
from torch import fx

__all__ = ["order_waits"]

_c10d = torch.ops._c10d_functional
_WAIT = _c10d.wait_tensor.default


def order_waits(graph: fx.Graph) -> None:
    """Erase unused waits with their collectives; move every other wait to just before its first user."""
    for node in reversed(graph.nodes):
        unused = node.op == "call_function" and not node.users
        if unused and (node.target is _WAIT or getattr(node.target, "namespace", "") == "_c10d_functional"):
            graph.erase_node(node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is _WAIT:
            min(node.users, key=order.__getitem__).prepend(node)
