"""LASP-1: the state walks from rank to rank, P - 1 sends one after the other, each of one state.

The right product comes first: a rank adds what its tokens do to the state that it got, and passes it on.
Every rank does so in every step, so that one graph is all ranks' and no rank's number is in it; what
arrives is kept in the step in which it is right. Bytes received per rank and direction: (P - 1) * B * H *
K * V * 4, and no transitions.

Source: LASP, arXiv 2404.02882, algorithms 2 and 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.attention.algebra import StateAlgebra, Summary, identity
from spcompile.collectives import Group
from spcompile.strategies.exchange import Places

__all__ = ["Ring"]


class Ring:
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
        self.state = identity(algebra, summary)[-1] if initial is None else initial
        # The first rank knows what it passes on; the others' first send is not looked at.
        self.started = self._start()
        self.steps = 0

    def _start(self) -> Tensor:
        return self.places.start(self.algebra.apply(self.summary, self.state), 1)

    def carry(self) -> Tensor:
        """The state that the rank before this one passed on."""
        while self.steps < self.places.group.size - 1:
            self.steps += 1
            arrived = collectives.finish(self.started, self.state.shape)
            self.state = torch.where(self.places.before == self.steps, arrived, self.state)
            if self.steps < self.places.group.size - 1:
                self.started = self._start()
        return self.state

    def final(self) -> Tensor:
        """The last rank's, sent to all."""
        return self.places.of_the_last(self.algebra.apply(self.summary, self.carry()))
