"""Operators that are more than functions of tensors are copied, once and in order, on whole operands.

They write to memory (``copy_`` into an input of the graph, which is how AOTAutograd ends a graph that changes
a buffer), have an effect (``with_effects``), run a body of their own (``cond``), or give or take numbers that
are known at run time only. None is split over the ranks: each runs it whole, as eager does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from spcompile._torch import HigherOrderOperator, OpOverload
from spcompile.errors import SpcompileError
from spcompile.passes.numbers import SYMBOLIC
from spcompile.passes.shard.propagate import value_of
from spcompile.placement import Replicate
from spcompile.sizes import is_symbolic
from spcompile.source import source_of

if TYPE_CHECKING:
    from spcompile.passes.shard.localize import Localizer

__all__ = ["Effect", "copy", "effects", "last_writes", "written"]


class Effect(NamedTuple):
    """What a graph does besides computing: the operator, and the inputs of the graph that it writes."""

    target: str
    inputs: tuple[str, ...]


def written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory ``node`` writes to."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return []
    schema = node.target._schema
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in tree_leaves([given.get(n) for n in names]) if isinstance(x, fx.Node)]


def effects(graph: fx.Graph) -> list[Effect]:
    """All that ``graph`` does besides computing, in order."""
    return [_effect(n) for n in graph.nodes if n.op == "call_function" and _has_effect(n)]


def _has_effect(node: fx.Node) -> bool:
    if isinstance(node.target, OpOverload):
        ours = node.target.namespace in ("_c10d_functional", "spcompile")
        return not ours and (node.target._schema.is_mutable or node.is_impure(False))
    # A mutating custom operator is functional here; Inductor lets it write again where nothing reads the old.
    functionalized = isinstance(node.target, HigherOrderOperator) and "functional" in node.target.name()
    return node.is_impure(False) or (functionalized and bool(node.users))


def _effect(node: fx.Node) -> Effect:
    wrapped = [str(x) for x in node.args if isinstance(x, (OpOverload, HigherOrderOperator))]
    inputs = tuple(x.name if x.op == "placeholder" else "" for x in written(node))
    return Effect(" of ".join([str(node.target), *wrapped]), inputs)


def last_writes(nodes: list[fx.Node]) -> list[fx.Node]:
    """The writes with which a graph ends: nothing of it, and no output, reads what they write."""
    last: list[fx.Node] = []
    for node in reversed(nodes):
        if node.op == "output":
            continue
        if not written(node) or node.users:
            break
        last.append(node)
    return last[::-1]


def copy(localizer: Localizer, node: fx.Node) -> None:
    """Write ``node`` into the local graph as it was, on whole operands in their own strides.

    Raises:
        SpcompileError: it draws random numbers, and the ranks would draw others.
    """
    if _draws(node) or any(_draws(n) for n in _inside(node)):
        where = source_of(node) or "no source line"
        raise SpcompileError(
            f"{node.target} (node {node.name}) draws random numbers, and no rule says how ranks draw "
            f"alike.\n{where}\nRemedy: switch the dropout of this operator off, or write it "
            "with torch.nn.functional.dropout, outside of any body of torch.cond or the like: it has a rule."
        )
    localizer.note_gathers(node, localizer.plan.steps[node])
    args, kwargs = arguments(localizer, node)
    olds = {w: _old(localizer, node, w) for w in written(node) if not _is_last(localizer, node)}
    made = localizer.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
    made.meta = dict(node.meta)
    localizer.emitter.emitted.append(made)
    node.meta["spcompile_copy"] = made
    for w, old in olds.items():
        localizer.versions[(value_of(w), Replicate(), None)] = old
    _bind(localizer, node, made)


def arguments(localizer: Localizer, node: fx.Node) -> Any:
    """The arguments of the copy of ``node``: whole values of the local graph."""
    return fx.map_arg((node.args, node.kwargs), lambda x: _whole(localizer, x))


def _whole(localizer: Localizer, x: fx.Node) -> Any:
    if not isinstance(x.meta.get("val"), Tensor):
        return number(localizer, x)
    local = localizer.version(value_of(x), Replicate())
    return localizer.emitter.node_of(localizer.restrided(x, local))


def number(localizer: Localizer, x: fx.Node) -> Any:
    """What stands for a node that is no tensor: its copy, or a size written anew."""
    if "spcompile_copy" not in x.meta and is_symbolic(x.meta.get("val")):
        return localizer.emitter.node_of(x.meta["val"])
    return x.meta.get("spcompile_copy", x)


def _is_last(localizer: Localizer, node: fx.Node) -> bool:
    return node in localizer.last_writes


def _old(localizer: Localizer, node: fx.Node, w: fx.Node) -> Tensor:
    """What ``w`` held, for whatever is computed from it later than it stood in the graph; dead if nothing."""
    with localizer.emitter.serving(node):
        return localizer.emitter.run(torch.clone, localizer.version(value_of(w), Replicate()))


def _bind(localizer: Localizer, node: fx.Node, made: fx.Node) -> None:
    """Declare the results of ``made``, the copy of ``node``, to be whole."""
    value, emitter = node.meta.get("val"), localizer.emitter
    if isinstance(value, Tensor):
        localizer.versions[((node, 0), Replicate(), None)] = emitter.bind(emitter.fresh(value), made)
    elif isinstance(value, SYMBOLIC):
        emitter.bind_number(value, made)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            if isinstance(item, Tensor):
                local = emitter.getitem(made, index, emitter.fresh(item))
                localizer.versions[((node, index), Replicate(), None)] = local


def _inside(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes of the bodies that a higher-order operator is given, and of those inside them."""
    owner = node.graph.owning_module
    for x in node.all_input_nodes:
        body = None if x.op != "get_attr" or owner is None else _attribute(owner, str(x.target))
        for module in body.modules() if isinstance(body, fx.GraphModule) else ():
            if isinstance(module, fx.GraphModule):
                yield from module.graph.nodes


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _draws(node: fx.Node) -> bool:
    """Whether a node without a rule draws other numbers on each rank; attention without dropout doesn't."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [a.name for a in node.target._schema.arguments]
    if "dropout_p" not in names:
        return True
    at = names.index("dropout_p")
    return (node.args[at] if len(node.args) > at else node.kwargs.get("dropout_p", 0.0)) != 0.0
