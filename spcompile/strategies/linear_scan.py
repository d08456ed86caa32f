"""A scan of memory states in log2 P steps: each rank doubles the run of ranks that it knows, by one
send a step.

After the first step a rank has the summary of the rank before it; then, with a run of w ranks before it
known, it gets that of the rank w places before and puts it in front. Bytes received per rank and
direction are those of 1 + ceil(log2(P - 1)) states, where an all-gather brings P - 1.

Source: Hillis and Steele, "Data parallel algorithms", CACM 29 (1986), on the algebra of memory states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.attention.algebra import (
    StateAlgebra,
    Summary,
    fold,
    identity,
    pack,
    summary_shapes,
    unpack,
)
from spcompile.collectives import Group
from spcompile.strategies.exchange import Places

__all__ = ["Scan"]


class Scan:
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
        self.algebra, self.summary, self.initial, self.known = algebra, summary, initial, known
        self.places = Places(group, later, summary[-1].device)
        self.shapes = summary_shapes(self._sent(summary))
        self.started = self.places.start(pack(self._sent(summary)), 1)
        self.before: Summary | None = None

    def _sent(self, summary: Summary) -> Summary:
        return summary if self.known is None else summary[1:]

    def _arrived(self, started: Tensor, near: int, far: int) -> Summary:
        """The summary of the ranks from ``far`` to ``near`` places before this one; of none, the identity."""
        packed = collectives.finish(started, (1, started.numel()))
        arrived = tuple(x.squeeze(0) for x in unpack(packed, self.shapes))
        if self.known is not None:
            arrived = (self._transition(self.known, near, far), *arrived)
        there = self.places.before >= near
        neutral = identity(self.algebra, arrived)
        return tuple(torch.where(there, x, zero) for x, zero in zip(arrived, neutral, strict=True))

    def _transition(self, known: Tensor, near: int, far: int) -> Tensor:
        """What is known of these ranks without being sent."""
        ahead = self.places.before - self.places.all
        keep = (ahead >= near) & (ahead <= far)
        return fold(self.algebra, (known, torch.zeros_like(known)), keep, reverse=self.places.later)[0]

    def _before(self) -> Summary:
        if self.before is None:
            self.before, width = self._arrived(self.started, 1, 1), 1
            while width < self.places.group.size - 1:
                started = self.places.start(pack(self._sent(self.before)), width)
                earlier = self._arrived(started, width + 1, 2 * width)
                self.before, width = self.algebra.combine(self.before, earlier), 2 * width
        return self.before

    def _after(self, summary: Summary) -> Tensor:
        return summary[-1] if self.initial is None else self.algebra.apply(summary, self.initial)

    def carry(self) -> Tensor:
        """The summaries of the ranks before this one (after it, if ``later``), composed."""
        return self._after(self._before())

    def final(self) -> Tensor:
        """The last rank's, sent to all."""
        return self.places.of_the_last(self._after(self.algebra.combine(self.summary, self._before())))
