"""What was traced for a loop, made smaller: nothing is computed twice, memories with the same keys are one.

A normaliser is the memory of k alone. Read by the same queries as the memory of k and v it is the same call,
on `[v, 1]`: one exchange between ranks and not two. All nodes here only compute, so any of this is safe.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

__all__ = ["merge"]


def merge(graph: fx.Graph) -> None:
    """Tidy a traced graph in place; new nodes have `val`, as traced ones."""
    _drop_views(graph)
    _share(graph)
    op = torch.ops.spcompile.linear_attention.default
    kept: list[fx.Node] = []
    for node in graph.find_nodes(op="call_function", target=op):
        mate = next((m for m in kept if _alike(m, node) and _hoist(m, node)), None)
        if mate is None:
            kept.append(node)
        else:
            kept[kept.index(mate)] = _join(graph, mate, node)
    graph.eliminate_dead_code()
    graph.lint()


def _drop_views(graph: fx.Graph) -> None:
    """Views that change nothing."""
    aten = torch.ops.aten
    for n in graph.nodes:
        if n.target in (aten.view.default, aten.expand.default, aten.permute.default):
            shape = list(n.args[0].meta["val"].shape)
            same = list(range(len(shape))) if n.target is aten.permute.default else shape
            if list(n.args[1]) == same:
                n.replace_all_uses_with(n.args[0])


def _share(graph: fx.Graph) -> None:
    """One node for equal calls."""
    seen: dict[Any, fx.Node] = {}
    for n in list(graph.nodes):
        if n.op != "call_function":
            continue
        key = (n.target, repr(n.args), repr(n.kwargs))  # nodes by name, 0.0 and -0.0 apart
        if (first := seen.setdefault(key, n)) is not n:
            n.replace_all_uses_with(first)
            graph.erase_node(n)


def _arguments(node: fx.Node) -> tuple[list[Any], list[Any]]:
    """What two memories must have alike, and what is theirs: the values and the initial state."""
    given: list[Any] = list(node.args) + [False] * (10 - len(node.args))
    q, k, v, log_decay, beta, initial, *options = given
    return [q, k, log_decay, beta, *options], [v, initial]


def _alike(a: fx.Node, b: fx.Node) -> bool:
    (shared, (_, start)), (shared_b, (_, start_b)) = _arguments(a), _arguments(b)
    return not a.kwargs and not b.kwargs and shared == shared_b and (start is None) == (start_b is None)


def _hoist(first: fx.Node, second: fx.Node) -> bool:
    """Move what the second needs before the first; False if it needs the first."""
    order = {n: i for i, n in enumerate(first.graph.nodes)}
    needed = [n for n in _ancestors(second) if order[n] > order[first]]
    if any(first in n.all_input_nodes for n in [*needed, second]):
        return False
    for n in sorted(needed, key=order.__getitem__):
        first.prepend(n)
    return True


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    todo, seen = list(node.all_input_nodes), set[fx.Node]()
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            yield n
            todo += n.all_input_nodes


def _join(graph: fx.Graph, first: fx.Node, second: fx.Node) -> fx.Node:
    """One call for both, on their values side by side."""
    args = list(first.args)
    with graph.inserting_before(first):
        for place in (2, 5):
            if first.args[place] is not None:
                parts = [first.args[place], second.args[place]]
                args[place] = _call(graph, torch.ops.aten.cat.default, parts, -1)
        both = _call(graph, first.target, *args)
        for index in (0, 1):
            whole = _call(graph, operator.getitem, both, index)
            start = 0
            for old in (first, second):
                width = old.args[2].meta["val"].shape[-1]
                part = _call(graph, torch.ops.aten.slice.Tensor, whole, -1, start, start + width)
                start += width
                for user in [u for u in old.users if u.args[1] == index]:
                    user.replace_all_uses_with(part)
                    graph.erase_node(user)
    for old in (second, first):
        graph.erase_node(old)
    return both


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return node
