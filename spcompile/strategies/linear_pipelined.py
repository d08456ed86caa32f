"""ZeCO's All-Scan: the state walks from rank to rank in slices, one passed on while the next comes.

Columns of a state do not depend on each other, so a state is cut into n slices of its columns. In step t the
rank with r ranks before it has slice t - r: it adds what its tokens do to the slice that came, and passes it
on. That takes P + n - 2 steps of a slice each, where the ring takes P - 1 of a state. Every rank sends in
every step, so that one graph is all ranks'; what is no slice is left out. Bytes received per rank and
direction: (P + n - 2) / n * B * H * K * V * 4, and no transitions.

Source: ZeCO, arXiv 2507.01004, All-Scan.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.attention.algebra import StateAlgebra, Summary, identity
from spcompile.collectives import Group
from spcompile.strategies.exchange import Places

__all__ = ["SLICES", "Pipelined", "slices_of"]

SLICES = 8
"""At most: with more a rank waits less for the first, and each send is smaller."""


def slices_of(columns: int) -> int:
    """Into how many slices of one size so many columns are cut."""
    return max(n for n in range(1, SLICES + 1) if columns % n == 0)


class Pipelined:
    """See :data:`spcompile.strategies.exchange.StartExchange`."""

    def __init__(
        self,
        algebra: StateAlgebra,
        summary: Summary,
        group: Group,
        initial: Tensor | None,
        known: Tensor | None,
        later: bool,
    ) -> None:
        self.algebra, self.summary = algebra, summary
        self.places = Places(group, later, summary[-1].device)
        self.count = slices_of(summary[-1].shape[-1])
        *transition, added = summary
        self.cut = (*(self._cut(x, not algebra.mixes) for x in transition), self._cut(added))
        start = identity(algebra, summary)[-1] if initial is None else initial
        self.states = self._cut(start)  # the first rank's; those of others are replaced as they come
        self.started = self._pass_on(0)
        self.steps = 0

    def _cut(self, x: Tensor, columns: bool = True) -> Tensor:
        """``[n, ..., columns / n]``; what has no columns of the state's is the same for all slices."""
        if not columns or x.shape[-1] == 1:
            return x.expand(self.count, *x.shape)
        return x.unflatten(-1, (self.count, -1)).movedim(-2, 0)

    def _pass_on(self, step: int) -> Tensor:
        """Start sending the slice of this step."""
        turn = (step - self.places.before).clamp(0, self.count - 1).reshape(1)
        *summary, state = (x.index_select(0, turn).squeeze(0) for x in (*self.cut, self.states))
        return self.places.start(self.algebra.apply(tuple(summary), state), 1)

    def carry(self) -> Tensor:
        """The state that the rank before this one passed on."""
        number = torch.arange(self.count, device=self.states.device)
        number = number.reshape(-1, *[1] * (self.states.dim() - 1))
        last = self.places.group.size + self.count - 3
        while self.steps <= last:
            arrived = collectives.finish(self.started, self.states.shape[1:])
            self.steps += 1
            here = (self.places.before > 0) & (number == self.steps - self.places.before)
            self.states = torch.where(here, arrived, self.states)
            if self.steps <= last:
                self.started = self._pass_on(self.steps)
        return self.states.movedim(0, -2).flatten(-2)

    def final(self) -> Tensor:
        """The last rank's, sent to all."""
        return self.places.of_the_last(self.algebra.apply(self.summary, self.carry()))
