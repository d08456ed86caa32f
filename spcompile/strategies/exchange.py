"""What an exchange is: the summaries of all ranks' tokens on their way, and the state that follows.

Linear attention is sharded once, for every variant (``linear.py``); strategies differ in the exchange alone.
An exchange knows the algebra of memory states and nothing else of the variant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.attention.algebra import StateAlgebra, Summary
from spcompile.collectives import Group

__all__ = ["Alone", "Exchange", "Places", "StartExchange", "Summed"]


class Exchange(Protocol):
    """Started when it is made; what is asked of it is computed when it is asked."""

    def carry(self) -> Tensor | None:
        """The state before this rank's first step: that of the ranks before it (after it, if ``later``).

        None is zero.
        """
        ...

    def final(self) -> Tensor | None:
        """The state after the last step of all ranks, alike on each; None where only this rank knows it."""
        ...


StartExchange = Callable[[StateAlgebra, Summary, Group, Tensor | None, Tensor | None, bool], Exchange]
"""``start(algebra, summary, group, initial, known, later)``.

summary: what this rank's tokens do to the state; padding does nothing.
initial: the state before the first step of all ranks, alike on each; None is zero.
known: the stack ``[P, ...]`` of the ranks' transitions A where each rank can compute it by itself (a constant
    decay over as many tokens as a rank has): then only states travel.
later: time runs from the last rank to the first.
"""


class Places:
    """Where this rank stands in the order of time, and sends along it.

    Attributes:
        before: how many ranks come before this one, a tensor: the rank is read when the graph runs.
        all: the same of each rank, ``[P]``.
    """

    def __init__(self, group: Group, later: bool, device: torch.device) -> None:
        self.group, self.later = group, later
        rank, ranks = collectives.rank(group, device), torch.arange(group.size, device=device)
        self.before = group.size - 1 - rank if later else rank
        self.all = group.size - 1 - ranks if later else ranks

    def start(self, x: Tensor, by: int) -> Tensor:
        """Start sending ``x`` to the rank ``by`` places on; what arrives is finished as a collective is.

        The first ``by`` ranks get what the last ones send, to be left out.
        """
        return collectives.start_shift(x, -by if self.later else by, self.group)

    def of_the_last(self, x: Tensor) -> Tensor:
        """The last rank's ``x``, on all."""
        last = self.before == self.group.size - 1
        return collectives.all_reduce(torch.where(last, x, 0.0), self.group)


class Alone:
    """No other rank has tokens of this sequence."""

    def __init__(self, initial: Tensor | None) -> None:
        self.initial = initial

    def carry(self) -> Tensor | None:
        """The initial state."""
        return self.initial

    def final(self) -> Tensor | None:
        """Known when this rank has done its steps."""
        return None


class Summed:
    """Without order: every rank gets the one state of all tokens, by whatever strategy."""

    def __init__(self, summary: Summary, group: Group | None, initial: Tensor | None = None) -> None:
        (state,) = summary
        state = state if group is None else collectives.all_reduce(state, group)
        self.state = state if initial is None else state + initial

    def carry(self) -> Tensor:
        """The state of all tokens."""
        return self.state

    def final(self) -> Tensor:
        """The state of all tokens."""
        return self.state
