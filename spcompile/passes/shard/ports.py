"""What AOTAutograd made of the ports of ``spcompile.ports``, written as the other passes want it."""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from spcompile import chunked, ports
from spcompile.passes.shard.propagate import Value
from spcompile.placement import Shard

__all__ = ["arrivals", "close_ports", "lend_nothing", "lent_as", "open_ports"]

aten = torch.ops.aten
_LEND, _LATE = ports.ops.lend.default, ports.ops.late.default


def open_ports(graph: fx.Graph) -> None:
    """Tokens are constants; a gradient from the mailbox is added to the gradient of the graph's own."""
    for node in list(graph.nodes):
        if node.target is ports.ops.open_port.default:
            with graph.inserting_before(node):
                made = graph.call_function(
                    aten.full.default,
                    ([], 0.0),
                    {"dtype": torch.float64, "device": torch.device("cpu"), "pin_memory": False},
                )
            _replace(node, made)
        elif node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
            operands = [x for x in node.args if isinstance(x, fx.Node)]
            found = [x for x in operands if x.target is _LATE and len(x.users) == 1]
            if found and node.args[0] is not node.args[1]:
                _add_late(graph, node, found[0])


def _add_late(graph: fx.Graph, node: fx.Node, late: fx.Node) -> None:
    (other,) = (x for x in node.args if x is not late)
    if not isinstance(other, fx.Node) or other.meta["val"].shape != node.meta["val"].shape:
        return
    with graph.inserting_before(node):
        made = graph.call_function(ports.ops.add_late.default, (other, late.args[0], [1], ""))
    _replace(node, made)
    graph.erase_node(late)


def _dense(x: torch.Tensor) -> bool:
    """Whether each entry has memory of its own, so that one may add in place."""
    return all(stride > 0 for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)


def _replace(node: fx.Node, made: fx.Node) -> None:
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def arrivals(graph: fx.Graph) -> dict[Value, Shard]:
    """The global tensors of which the graph is given this rank's part, and how they lie."""
    found = (n for n in graph.nodes if n.target is ports.ops.arrive.default)
    numbers = {node: fx.map_arg(node.args[1:5], lambda n: n.meta["val"]) for node in found}
    return {(node, 0): ports.layout_of(*given).shard for node, given in numbers.items()}


def lent_as(node: fx.Node) -> int | None:
    """The number of the port by which ``node`` is returned; None if it has none."""
    return node.args[1] if node.target is _LEND else None


def lend_nothing(graph: fx.Graph) -> None:
    """At one rank an output is the tensor itself."""
    for node in list(graph.nodes):
        if node.target is _LEND:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


_IN_PLACE = {
    ports.ops.add_late.default: ports.add_late_,
    ports.ops.add_product.default: chunked.add_product_,
}


def close_ports(graph: fx.Graph) -> None:
    """What adds as the operator that runs, which adds in place (a copy is made where one is needed)."""
    functional = torch.ops.higher_order.auto_functionalized
    for node in list(graph.nodes):
        writes = _IN_PLACE.get(node.target)
        if writes is None or not _dense(node.args[0].meta["val"]):
            continue
        operator = writes._opoverload
        names = [a.name for a in operator._schema.arguments]
        given = [*node.args, *(a.default_value for a in operator._schema.arguments[len(node.args) :])]
        with graph.inserting_before(node):
            call = graph.call_function(functional, (operator,), dict(zip(names, given, strict=True)))
            call.meta["val"] = (None, node.meta["val"])
            made = graph.call_function(getitem, (call, 1))
        _replace(node, made)
