"""Orders of sorts in a rank's graph: when it sorts its own slots, and how a tensor gets into another order.

To and from the order of a sort a tensor goes by way of the slots, whole, since only the sort of all ranks'
slots tells where a rank's own are among them. What is local to a token never asks for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spcompile.passes.shard.communicate import redistribute
from spcompile.placement import Placement, Replicate, Routed
from spcompile.rules.base import Context, Split, split_of

if TYPE_CHECKING:
    from spcompile.passes.shard.localize import Localizer
    from spcompile.passes.shard.propagate import Step, Value

__all__ = ["know", "know_all", "reordered"]


def know(localizer: Localizer, routed: Routed) -> None:
    """Let this rank have sorted its own slots."""
    if localizer.context.knows_route(routed):
        return
    sort = localizer.plan.sorts[routed.order]
    step = localizer.plan.steps[sort]
    split = split_of(step.rule, "out", 1, routed.at(0))
    assert split is not None, routed
    operands = localizer.operands(step, split)
    localizer.store(sort, localizer.run_at(sort, split.emit, localizer.context, operands), split.outputs)


def know_all(localizer: Localizer, step: Step, split: Split) -> None:
    """:func:`know` every order that a split is about; the sort itself makes it."""
    for placement in (*split.inputs, *split.outputs):
        if isinstance(placement, Routed):
            if step is not localizer.plan.steps[localizer.plan.sorts[placement.order]]:
                know(localizer, placement)


def reordered(localizer: Localizer, value: Value, have: Placement, want: Placement) -> Tensor:
    """The local tensor of ``value`` under ``want``, where that, or what is at hand, is in a sort's order."""
    node, whole, context = value[0], Replicate(), localizer.context
    x = node.meta["val"]
    shape = tuple((x[value[1]] if isinstance(x, (tuple, list)) else x).shape)
    if want != whole:
        local = localizer.version(value, whole)
        if not isinstance(want, Routed):
            return localizer.run_at(node, redistribute, context, local, whole, want, shape)
        slots = localizer.version((localizer.plan.sorts[want.order], 1), whole)
        return localizer.run_at(node, _of_own, context, local, want, slots)
    assert isinstance(have, Routed)
    slots = localizer.version((localizer.plan.sorts[have.order], 1), whole)
    local = localizer.run_at(node, _by_slot, context, localizer.version(value, have), have)
    local = localizer.run_at(node, redistribute, context, local, have.slots, whole, shape)
    return localizer.run_at(node, local.index_select, have.dim, slots)


def _by_slot(context: Context, x: Tensor, have: Routed) -> Tensor:
    """This rank's part of a tensor in the order of a sort, in that of its slots."""
    return x.index_select(have.dim, context.route(have, "places"))


def _of_own(context: Context, x: Tensor, want: Routed, slots: Tensor) -> Tensor:
    """Of ``x``, whole and in the order of a sort (``slots``), what this rank has in that of its own slots."""
    places = torch.scatter(torch.zeros_like(slots), 0, slots, torch.arange(len(slots), device=slots.device))
    own = context.flat_index(want.slots, x.device)[context.route(want)]
    return x.index_select(want.dim, places[own])
