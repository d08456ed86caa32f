"""The states before the segments of a walk, with all that needs no carry computed before the carry is there.

U_after = A U_before + S of each segment. While an exchange is under way the chain runs from zero, and what
the carry adds afterwards is one product: no segment waits for another then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Size, Tensor

import spcompile.attention.scan  # noqa: F401  (registers the operator)

__all__ = ["Chain"]

ops = torch.ops.spcompile


class Chain:
    """What the segments of a walk do to the state.

    Args:
        batch: B and H, whose product is N.
        states: S ``[N, segments, K, V]``, float32.
        logs: A as logarithms of factors, ``[N, segments]`` or, one per key, ``[N, segments, K]``; None: 1.
        matrices: A as matrices, ``[N, segments, K, K]``, in place of ``logs``.
    """

    def __init__(
        self, batch: Size, states: Tensor, logs: Tensor | None = None, matrices: Tensor | None = None
    ) -> None:
        self.batch, self.states, self.matrices = batch, states, matrices
        self.logs = None if logs is None else logs.reshape(*states.shape[:2], -1, 1)
        self.exchanged = False
        """Whether the total is exchanged. A backward repeats its forward's chain in the same way, so that in
        one graph both are the same operators."""

    def heads(self, state: Tensor) -> Tensor:
        """``[N, ...]`` as ``[B, H, ...]``."""
        return state.reshape(*self.batch, *state.shape[1:])

    def total(self) -> tuple[Tensor, ...]:
        """What all segments together do: (S), (sum of logs, S) or (A, S), each ``[B, H, ...]``."""
        return tuple(map(self.heads, self._total()))

    def _total(self) -> tuple[Tensor, ...]:
        self.exchanged = True
        if self.matrices is not None:
            self.local()
            return self._through[1], self._alone[1]
        if self.logs is None:
            return (self.states.sum(1),)
        later = F.pad(self.logs.narrow(1, 1, self.logs.shape[1] - 1), (0, 0, 0, 0, 0, 1))
        later = later.flip(1).cumsum(1).flip(1).exp()
        return self.logs.sum(1), (later * self.states).sum(1)

    def local(self) -> None:
        """Run from zero; where nothing is exchanged the carry is known, and nothing is to be done before."""
        if not self.exchanged or hasattr(self, "_alone"):
            return
        if self.matrices is None:
            self._alone = self._scan(self.states, None)
            return
        k, v = self.states.shape[-2:]
        index = torch.arange(k, device=self.states.device)
        eye = (index.unsqueeze(1) == index).to(self.states.dtype).expand(self.states.shape[0], k, k)
        both = self._scan(F.pad(self.states, (0, k)), F.pad(eye, (v, 0)))
        self._alone = both[0].narrow(-1, 0, v), both[1].narrow(-1, 0, v)
        self._through = both[0].narrow(-1, v, k), both[1].narrow(-1, v, k)

    def before(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """States ``[N, segments, K, V]`` before each segment, and the one ``[B, H, K, V]`` after the last.

        Args:
            carry: the state before the first, ``[B, H, K, V]``; None: zero.
        """
        before, final = self._before(None if carry is None else carry.flatten(0, 1).float())
        return before, self.heads(final)

    def _before(self, start: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.exchanged:
            return self._scan(self.states, start)
        self.local()
        before, final = self._alone
        if start is None:
            return before, final
        if self.matrices is not None:
            through, whole = self._through
            return before + through @ start.unsqueeze(1), final + whole @ start
        if self.logs is None:
            return before + start.unsqueeze(1), final + start
        sums = F.pad(self.logs.cumsum(1), (0, 0, 0, 0, 1, 0)).exp()
        count = self.logs.shape[1]
        through = sums.narrow(1, 0, count)
        return before + through * start.unsqueeze(1), final + sums.select(1, count) * start

    def _scan(self, states: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.matrices is not None:
            return ops.affine_scan(self.matrices, states, start, True)
        return ops.affine_scan(None if self.logs is None else self.logs.exp(), states, start, False)
