"""The operators at which a tensor enters or leaves a graph as one rank's part (``spcompile.ports``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spcompile import ports
from spcompile.placement import Placement, Replicate, Shard, local_shape
from spcompile.rules.base import Call, Context, Dims, Emit, Factors, Rule, Side, Split
from spcompile.rules.pointwise import pointwise

__all__ = ["COMMITS", "LEND", "PORTS"]

LEND = ports.ops.lend.default


def _where(placement: Placement, context: Context) -> list[int]:
    ranks = context.group.size
    if not isinstance(placement, Shard):
        return [ranks]
    p = placement
    return [p.dim, p.length, p.block, p.start, p.outer, ranks]


class _Late(Factors):
    """A gradient from the mailbox, of which a rank takes its part; added to an operand, if there is one."""

    def whole_emit(self) -> Emit:
        """All of it, on every rank."""
        return self.taking(Replicate())

    def taking(self, placement: Placement) -> Emit:
        shape = list(local_shape(tuple(self.call.outputs[0].shape), placement))

        def emit(context: Context, operands: list[Tensor]) -> Tensor:
            where, group = _where(placement, context), context.group.name
            if len(operands) == 2:
                return ports.add_late(operands[0], operands[1], where, group)
            return ports.late(operands[0], shape, where, group, *self.call.args[4:])

        return emit


def late(call: Call) -> _Late:
    """``late`` and ``add_late``: any dim may be sharded, the token is whole."""
    dims: Dims = tuple(f"d{i}" for i in range(call.outputs[0].dim()))
    inputs: tuple[Dims, ...] = (*((dims,) if len(call.operands) == 2 else ()), ())
    rule = _Late(call, inputs, (dims,))
    rule.emit = lambda split: rule.taking(split.outputs[0])
    return rule


@dataclass
class Border:
    """``arrive`` and ``depart``: the global tensor on one side, on the other what this rank has of it."""

    call: Call
    linear: tuple[frozenset[int], ...] = ()

    @property
    def layout(self) -> ports.Layout:
        """How the global tensor lies on the ranks."""
        return ports.layout_of(*self.call.args[1:5])

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`. A part is, seen from this rank, a tensor that is whole."""
        enters = self.call.op is ports.ops.arrive.default
        if shard != self.layout.shard or (side == "in") == enters:
            return None
        placements: tuple[Placement, Placement] = (Replicate(), shard) if enters else (shard, Replicate())
        return Split(placements[:1], placements[1:], (None,), lambda context, operands: operands[0])

    @property
    def offers(self) -> tuple[Split | None, ...]:
        """The only way to run, marked or not."""
        side: Side = "out" if self.call.op is ports.ops.arrive.default else "in"
        return (self.split(side, 0, self.layout.shard),)


PORTS: dict[Any, Callable[[Call], Rule | None]] = {
    LEND: pointwise,
    ports.ops.late.default: late,
    ports.ops.add_late.default: late,
    ports.ops.arrive.default: Border,
    ports.ops.depart.default: Border,
}

COMMITS = frozenset(PORTS) - {LEND}
