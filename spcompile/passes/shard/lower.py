"""One rank: nothing is sharded, and attention is still lowered to linear work and memory."""

from __future__ import annotations

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from spcompile.emit import Emitter
from spcompile.passes.shard.context import GraphContext
from spcompile.passes.shard.propagate import call_of
from spcompile.rules import attention

__all__ = ["lower_attention"]


def lower_attention(graph: fx.Graph, emitter: Emitter, context: GraphContext) -> None:
    """Write every attention operator of ``graph`` out as what it does on this one rank; the rest stays."""
    values: dict[fx.Node, Tensor] = {}

    def value(node: fx.Node) -> Tensor:
        if node not in values:
            values[node] = emitter.bind(emitter.fresh(node.meta["val"]), node)
        return values[node]

    found = [n for n in graph.nodes if n.op == "call_function" and n.target in attention.RULES]
    # All of them first: a backward is known by its forward, which is gone when its turn comes.
    for node, rule in [(n, attention.RULES[n.target](call_of(n))) for n in found]:
        operands = [value(x) for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)]
        with graph.inserting_before(node), emitter.serving(node):
            outs = emitter.run(rule.whole_emit(), context, operands)
        _replace(node, [emitter.node_of(x) for x in (outs if isinstance(outs, (tuple, list)) else [outs])])


def _replace(node: fx.Node, outs: list[fx.Node]) -> None:
    if isinstance(node.meta["val"], Tensor):
        node.replace_all_uses_with(outs[0])
    for getitem in list(node.users):
        getitem.replace_all_uses_with(outs[getitem.args[1]])
        node.graph.erase_node(getitem)
    node.graph.erase_node(node)
