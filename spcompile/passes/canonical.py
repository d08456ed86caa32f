"""Dynamo's graph in an order that follows from what it computes, not from how its program was walked.

A model that walks a set of strings runs its parts in another order in every process, and Dynamo writes nodes,
names and inputs down as they come. Here a node stands just before the first that needs it, operands from left
to right; an input stands in the order of its first use; names are numbered anew. So graphs that compute the
same have one text.

NOTE [What keeps its order]
    Nodes with an effect (in-place, random, higher-order; ``passes/effects.py``) follow each other as in the
    program, and whatever touches a storage that one of them touches stays on its side of it. A region under
    another mode (autocast, no_grad) moves as one. Nothing moves across a node that is not known at all.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

from torch import fx

from spcompile._torch import source_name
from spcompile.passes.effects import Effect, Unknown, effect_of, storages

__all__ = ["canonicalise", "in_their_order", "own_copy"]


@dataclass(eq=False)
class _Region:
    """What runs between a change of mode and its end, both included."""

    opening: fx.Node
    items: list[_Item] = field(default_factory=list)
    closing: fx.Node | None = None


# A value that is so often the same operand of the same operation may be what the steps of an unrolled loop
# read. (A state that a step has many uses for is not: each use is another.)
_MANY = 5

_Item: TypeAlias = "fx.Node | _Region"


def own_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph and those nested in it, over the same tensors and with Dynamo's notes on its nodes.

    Dynamo's own is left alone: it calls by the order of its graph's inputs, which it reads again once the
    backend is done; and a pass may give the module another graph, which is then not Dynamo's.
    """
    return _own_copy(gm, {})


def _own_copy(gm: fx.GraphModule, made: dict[fx.GraphModule, fx.GraphModule]) -> fx.GraphModule:
    graph, found = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in gm.graph.nodes:
        new = found[node] = graph.node_copy(node, found.__getitem__)
        notes = {k: x for k, x in vars(node).items() if k not in vars(new)}  # where an input comes from
        vars(new).update(notes)
    graph.set_codegen(gm.graph._codegen)
    copy = made[gm] = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for node in graph.nodes:
        inner = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule):
            setattr(copy, str(node.target), made.get(inner) or _own_copy(inner, made))
    return copy


def canonicalise(gm: fx.GraphModule) -> list[int]:
    """Order ``gm`` and the graphs nested in it, in place; their values stay what they are.

    Returns:
        the old positions of the inputs of ``gm``, in their new order. (Those of nested graphs stay.)
    """
    for module in gm.modules():
        if isinstance(module, fx.GraphModule) and module is not gm:
            _arrange(module, inputs=False)
    return _arrange(gm, inputs=True)


def in_their_order(compiled: Callable[..., Any], places: Sequence[int]) -> Callable[..., Any]:
    """``compiled``, which takes the inputs of a canonical graph, as a function of them in Dynamo's order.

    Some callables take all inputs as one list, which they empty, and say so: the wrapper does as they do. (It
    takes over nothing else: Dynamo would unwrap it.)
    """

    def call(*args: Any) -> Any:
        if len(args) != 1 or not isinstance(args[0], list):
            return compiled(*(args[i] for i in places))
        inputs = [args[0][i] for i in places]
        args[0].clear()
        return compiled(inputs)

    if hasattr(compiled, "_boxed_call"):
        call._boxed_call = compiled._boxed_call  # type: ignore[attr-defined]
    return call


def _arrange(module: fx.GraphModule, inputs: bool) -> list[int]:
    old = [n for n in module.graph.nodes if n.op == "placeholder"]
    order = _order(module.graph)
    new = _inputs(n for n in order if n.op == "placeholder") if inputs else old
    _rewrite(module.graph, [*new, *(n for n in order if n.op != "placeholder")])
    module.recompile()
    place = {n: i for i, n in enumerate(old)}
    return [place[n] for n in new]


def _inputs(first_use: Iterable[fx.Node]) -> list[fx.Node]:
    """Sizes before what has them, then the rest in the order of use; what nothing uses comes last."""
    nodes = list(first_use)

    def rank(node: fx.Node) -> tuple[int, str]:
        size = not hasattr(node.meta.get("example_value"), "shape")
        return (0, source_name(node)) if size else (1, "") if node.users else (2, source_name(node))

    return sorted(nodes, key=rank)


def _rewrite(graph: fx.Graph, order: Sequence[fx.Node]) -> None:
    """Put the nodes into ``order`` and number their names anew."""
    _place(order)
    names = type(graph._graph_namespace)()
    graph._graph_namespace = names
    for node in order:
        if node.op in ("placeholder", "output"):
            node.name = names.create_name(node.name, node)
    for node in order:
        if node.op not in ("placeholder", "output"):
            node.name = names.create_name(re.sub(r"(_\d+)+$", "", node.name), node)


def _place(order: Sequence[fx.Node]) -> None:
    for before, node in pairwise(order):
        before.append(node)


def _order(graph: fx.Graph) -> list[fx.Node]:
    """All nodes in canonical order; as they are where an effect is not understood."""
    try:
        later: list[fx.Node] = []
        for segment in reversed(list(_segments(list(graph.nodes)))):
            later = _flat(_sorted(_regions(segment), later)) + later
        return later
    except Unknown:
        return list(graph.nodes)


def _segments(nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """The nodes between barriers, and each barrier by itself."""
    segment: list[fx.Node] = []
    for node in nodes:
        if effect_of(node) is Effect.BARRIER or node.op == "output":
            yield segment
            yield [node]
            segment = []
        else:
            segment.append(node)
    if segment:
        yield segment


def _regions(nodes: Sequence[fx.Node]) -> list[_Item]:
    """The nodes with what is between a change of mode and its end taken as one item."""
    items: list[_Item] = []
    open_: list[_Region] = []
    for node in nodes:
        here = open_[-1].items if open_ else items
        effect = effect_of(node)
        if effect is Effect.CLOSES or (open_ and _restores(open_[-1].opening, node)):
            if not open_ or (effect is Effect.CLOSES and node.args[0] is not open_[-1].opening):
                raise Unknown
            open_.pop().closing = node
        elif effect in (Effect.OPENS, Effect.SETS):
            open_.append(_Region(node))
            here.append(open_[-1])
        else:
            here.append(node)
    if open_:
        raise Unknown
    return items


def _restores(opening: fx.Node, node: fx.Node) -> bool:
    """Whether ``node`` sets the mode back that ``opening`` has set."""
    both = effect_of(opening) is effect_of(node) is Effect.SETS
    return both and opening.args != node.args


def _nodes(item: _Item) -> Iterator[fx.Node]:
    """The nodes of an item, in their order."""
    if isinstance(item, fx.Node):
        yield item
        return
    assert item.closing is not None
    yield item.opening
    for inner in item.items:
        yield from _nodes(inner)
    yield item.closing


def _flat(items: Iterable[_Item]) -> list[fx.Node]:
    return [n for item in items for n in _nodes(item)]


def _sorted(items: list[_Item], later: Sequence[fx.Node]) -> list[_Item]:
    """``items`` in the order in which effects, and then ``later``, need them."""
    if len(items) < 2 and all(isinstance(item, fx.Node) for item in items):
        return items
    after, effects = _constraints(items)
    regions = [item for item in items if isinstance(item, _Region)]
    # What a region needs first depends on the order in it, and that on who needs its results first.
    for _ in range(2 if regions else 0):
        order = _depth_first(items, after, effects, later)
        for i, item in enumerate(order):
            if isinstance(item, _Region):
                item.items = _sorted(item.items, [*_flat(order[i + 1 :]), *later])
    return _depth_first(items, after, effects, later)


def _constraints(items: Sequence[_Item]) -> tuple[dict[_Item, list[_Item]], list[_Item]]:
    """What must come before each item besides its operands, and the items with an effect."""
    after: dict[_Item, list[_Item]] = defaultdict(list)
    touched: dict[int, list[_Item]] = defaultdict(list)
    written: dict[int, _Item] = {}
    effects: list[_Item] = []
    for item in items:
        nodes = list(_nodes(item))
        acts = any(effect_of(n) is Effect.ACTS for n in nodes)
        for storage in dict.fromkeys(s for n in nodes for s in storages(n)):
            if acts:
                after[item] += touched.pop(storage, [])
                written[storage] = item
            elif storage in written:
                after[item].append(written[storage])
            touched[storage].append(item)
        if acts:
            after[item] += effects[-1:]
            effects.append(item)
    return after, effects


def _depth_first(
    items: Sequence[_Item],
    after: dict[_Item, list[_Item]],
    effects: Sequence[_Item],
    later: Sequence[fx.Node],
) -> list[_Item]:
    """The items, each as soon as the first that needs it has asked for it, and what nobody needs last."""
    home = {n: item for item in items for n in _nodes(item)}

    def needs(item: _Item) -> Iterator[_Item]:
        for node in _nodes(item):
            for operand in node.all_input_nodes:
                if operand in home and home[operand] is not item:
                    yield home[operand]
        yield from after.get(item, ())

    leaves = any(user not in home for node in home for user in node.users)
    wanted = [home[o] for n in later if leaves for o in n.all_input_nodes if o in home]
    roots = [*effects, *wanted, *items]
    # What each step of an unrolled loop reads, and the state that it begins with, would otherwise stand in
    # the first step, which then would be no step like the others.
    before = [x for x in _from_roots(roots, needs) if any(map(_precedes_loops, _nodes(x)))]
    return _from_roots([*before, *roots], needs)


def _precedes_loops(node: fx.Node) -> bool:
    if node.op == "call_function" and not node.all_input_nodes:
        return True
    if len(node.users) < _MANY:
        return False
    uses = Counter((u.target, u.all_input_nodes.index(node)) for u in node.users)
    return max(uses.values()) >= _MANY


def _from_roots(roots: Sequence[_Item], needs: Callable[[_Item], Iterator[_Item]]) -> list[_Item]:
    """The roots, each behind what it needs."""
    order: dict[_Item, None] = {}
    for root in roots:
        stack = [(root, needs(root))]
        while stack:
            item, rest = stack[-1]
            following = next((x for x in rest if x not in order), None) if item not in order else None
            if following is not None:
                stack.append((following, needs(following)))
                continue
            order.setdefault(item)
            stack.pop()
    return list(order)
