"""LASP-2: one all-gather of memory states in place of a chain of sends.

Each rank gathers all ranks' summaries, in the forward those of ``k^T v`` and in the backward those of
``q^T do``, and composes the ones before (after) it. Bytes received per rank and direction:
(P-1) * B * H * K * V * 4, whatever the length of the sequence.

Source: LASP-2, arXiv 2502.07563, algorithms 1-4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.attention.algebra import StateAlgebra, Summary, fold, pack, summary_shapes, unpack
from spcompile.collectives import Group
from spcompile.kernels.choice import opaque

__all__ = ["AllGather"]


class AllGather:
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
        self.algebra, self.group, self.initial, self.known, self.later = algebra, group, initial, known, later
        self.sent = summary if known is None else summary[1:]
        packed = pack(self.sent)
        self.device, self.size = packed.device, packed.shape
        self.started = collectives.start_all_gather(packed, group)
        self.summaries: Summary | None = None

    def _arrived(self) -> Summary:
        if self.summaries is None:
            packed = collectives.finish(self.started, (self.group.size, *self.size))
            states = unpack(packed, summary_shapes(self.sent))
            self.summaries = states if self.known is None else (self.known, *states)
        return self.summaries

    def _folded(self, keep: Tensor) -> Tensor:
        if opaque(self.device):
            summaries = self._arrived()
            transitions = summaries[0] if len(summaries) == 2 else None
            given = transitions, summaries[-1], keep, self.initial
            return torch.ops.spcompile.folded(*given, self.algebra.name, self.later)
        whole = fold(self.algebra, self._arrived(), keep, reverse=self.later)
        return whole[-1] if self.initial is None else self.algebra.apply(whole, self.initial)

    def carry(self) -> Tensor:
        """The summaries of the ranks before this one (after it, if ``later``), composed."""
        ranks = torch.arange(self.group.size, device=self.device)
        mine = collectives.rank(self.group, self.device)
        return self._folded(ranks > mine if self.later else ranks < mine)

    def final(self) -> Tensor:
        """The summaries of all ranks, composed."""
        return self._folded(torch.ones(self.group.size, dtype=torch.bool, device=self.device))
