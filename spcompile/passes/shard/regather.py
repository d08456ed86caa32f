"""Which keys and values of all ranks are saved for the backward, and which are gathered again in it.

Saved they are of the whole length on every rank, whatever the number of ranks: at a million tokens with 8 key
heads of 128 numbers in bf16 4 GiB a layer, beside which what a layer of 64 ranks saves besides is little.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from spcompile import _torch
from spcompile.passes.shard.context import GraphContext
from spcompile.phases import backward_of
from spcompile.sizes import bytes_of

__all__ = ["gather_again"]

# Of what a layer saves besides, as much may be kept.
_PART = 0.1


def gather_again(graph: fx.Graph, context: GraphContext, option: bool | str) -> None:
    """Tag what the backward gathers again, by the option ``regather``."""
    if not context.held or option is False:
        return
    backward = backward_of(graph.nodes)
    if not backward:
        return
    allowed = 0.0
    if option == "auto":
        allowed = _PART * _saved_besides(backward, set(context.held)) / len(context.held)
    for node in context.held:
        if _bytes(node) > allowed:
            context.gather_again(node)


def _saved_besides(backward: set[fx.Node], held: set[fx.Node]) -> int:
    """About how many bytes the forward saves for the backward without ``held``.

    What the backward reads is saved, or what it can be made of again by operators that the partitioner would
    rather repeat: the partitioner itself, which finds a minimum, comes later and takes its time.
    """
    repeated = _torch.partitioner_operators()
    seen, saved = set(held), 0
    queue = [x for node in backward if node.op != "output" for x in node.all_input_nodes if x not in backward]
    while queue:
        node = queue.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        made = node.args[0] if node.target is operator.getitem else node
        assert isinstance(made, fx.Node)
        if "recompute" in made.meta or repeated.is_recomputable(made):
            queue += made.all_input_nodes
        else:
            saved += _bytes(node)
    return saved


def _bytes(node: fx.Node) -> int:
    tensors = (x for x in tree_leaves(node.meta.get("val")) if isinstance(x, Tensor))
    return sum(map(bytes_of, tensors))
