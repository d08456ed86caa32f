"""The sequence from its end: each rank's tokens go to the rank that is as far from the other end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spcompile import collectives
from spcompile.placement import Shard
from spcompile.rules.base import Call, Context, Side, Split, along
from spcompile.rules.halo import halo

__all__ = ["Flip"]


@dataclass
class Flip:
    """flip; y[t] = x[T - 1 - t]: ranks swap their blocks in pairs; where P does not divide T a halo follows.

    The padding behind the last token comes first in the swapped blocks, so they are shifted by it. Bytes
    received: a rank's block, and the halo of that many tokens.
    """

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        (x,) = self.call.operands
        dims = {d % x.dim() for d in self.call.argument(1, "dims")}
        if shard.dim not in dims:
            return along(self.call, dims).split(side, index, shard)
        if shard.outer != 1 or not all(isinstance(n, int) for n in (shard.length, shard.block, shard.start)):
            return None  # of a symbolic length, whether there is a halo is not known
        if side == "in" and shard.start:
            return None  # what no rank holds would be asked for
        before, after = shard.unshifted(), shard

        def emit(context: Context, operands: list[Tensor]) -> Any:
            (x,) = operands
            swapped = collectives.mirror(self.call.op(x, *self.call.args[1:]), context.group)
            ahead = context.group.size * before.block - before.length - after.start
            around = halo(context, swapped, shard.dim, max(-ahead, 0), max(ahead, 0))
            return around.narrow(shard.dim, max(ahead, 0), before.block)

        return Split((before,), (after,), (None,), emit)
