"""The passes on the joint graph; when each of them runs is in ``spcompile.passes``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves

from spcompile import _torch
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.costs import Sizes
from spcompile.emit import Emitter
from spcompile.passes.shard import copies
from spcompile.passes.shard.context import GraphContext
from spcompile.passes.shard.gradients import gradients_of
from spcompile.passes.shard.localize import GatherNote, Localizer
from spcompile.passes.shard.lower import lower_attention
from spcompile.passes.shard.nothing import make_empty
from spcompile.passes.shard.ports import lend_nothing, lent_as, open_ports
from spcompile.passes.shard.propagate import Plan
from spcompile.passes.shard.regather import gather_again
from spcompile.passes.shard.sequences import plan_sequences
from spcompile.passes.shard.specialise import specialise
from spcompile.passes.shard.verify import check_outputs, verify
from spcompile.passes.shard.windows import move_windows
from spcompile.placement import Shard

__all__ = ["Sharded", "shard_joint_graph"]


@dataclass
class Sharded:
    """What the passes did to a graph: its plan (None at one rank), the gathers that missing rules forced,
    how the outputs lie that are returned as this rank's part, by the number of their port, which kernels take
    the attention, and of what sizes it crosses ranks (``passes/shard/context.py``)."""

    plan: Plan | None
    gathers: list[GatherNote]
    lent: dict[int, Shard] = field(default_factory=dict)
    kernels: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    sizes: Counter[tuple[str, str, Sizes]] = field(default_factory=Counter)


def shard_joint_graph(
    graph: fx.Graph,
    group: Group,
    config: Config,
    hints: Mapping[str, int] | None = None,
    parameters: Collection[str] = (),
) -> Sharded:
    """Rewrite a joint forward and backward graph, of global shapes, into the one that each rank runs.

    Args:
        hints: placeholder -> the dim that is the sequence.
        parameters: the placeholders whose gradients the option ``gradients`` is about.
    """
    specialise(graph, sizes=config.lengths == "each")
    open_ports(graph)
    before = [(_as_eager(x), lent_as(x)) if isinstance(x, fx.Node) else (x, None) for x in _returned(graph)]
    sharded, fake_mode = Sharded(None, []), _fake_mode(graph)
    if fake_mode is None:  # what a graph break may leave: not one tensor
        return sharded
    emitter = Emitter(graph, fake_mode, _torch.select_decomp_table())
    context = GraphContext(group, emitter, config)
    if group.size == 1:
        lend_nothing(graph)
        lower_attention(graph, emitter, context)
        _erase_dead(graph, emitter.emitted)
    else:
        make_empty(graph)
        move_windows(graph, emitter.fake_mode)
        sharded.plan = plan_sequences(graph, group.size, hints or {})
        done = copies.effects(graph)
        partial = gradients_of(graph, parameters) if config.gradients == "partial" else set()
        localizer = Localizer(graph, sharded.plan, context, config.nan_padding, partial)
        localizer.run()
        gather_again(graph, context, config.regather)
        _erase_dead(graph, emitter.emitted)
        verify(graph, localizer, done)
        sharded.gathers, sharded.lent = localizer.gathers, localizer.lent
    sharded.kernels, sharded.sizes = context.kernels, context.sizes
    # A part that is returned has a placement, so verify has checked its shape.
    check_outputs([None if number in sharded.lent else x for x, number in before], graph)
    return sharded


def _as_eager(returned: fx.Node) -> Any:
    """The value that eager returns: of a port what is lent, as it lies there (a copy may lie closer)."""
    return (returned if lent_as(returned) is None else returned.args[0]).meta["val"]


def _fake_mode(graph: fx.Graph) -> Any:
    leaves = (x for n in graph.nodes for x in tree_leaves(n.meta.get("val")))
    return next((x.fake_mode for x in leaves if hasattr(x, "fake_mode")), None)


def _returned(graph: fx.Graph) -> list[Any]:
    return tree_leaves(next(n for n in reversed(graph.nodes) if n.op == "output").args)


def _erase_dead(graph: fx.Graph, emitted: list[fx.Node]) -> None:
    """Erase what was emitted and is not used; a wait too, which without users keeps its collective alive."""
    for node in reversed(emitted):
        ours = getattr(node.target, "namespace", "") in ("_c10d_functional", "spcompile")
        if not node.users and (ours or not node.is_impure()):
            graph.erase_node(node)
