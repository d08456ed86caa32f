"""The states before the segments of a walk, with all that needs no carry computed before the carry is there.

U_after = A U_before + S of each segment. Where the carry is known the kernels fold these themselves, each
program those before its segment. While an exchange is under way the chain runs from zero instead, as an
operator, and what the carry adds afterwards is one product: no segment waits for another then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor

import spcompile.attention.scan  # noqa: F401  (registers the operator)
from spcompile._torch import statically_known_true

__all__ = ["Before", "Chain", "Made"]

ops = torch.ops.spcompile


class Made(NamedTuple):
    """What each segment does to the state."""

    states: Tensor  # S, [N, segments, K, V], float32
    logs: Tensor | None = None  # A as logarithms of factors, [N, segments] or, one per key, [N, segments, K]
    matrices: Tensor | None = None  # A as matrices, [N, segments, K, K], in place of logs
    turned: bool = False  # these are those of the walk the other way, from the last segment on, transposed


class Before(NamedTuple):
    """The states before segments, as a kernel takes them."""

    states: Tensor | None  # [N, segments, K, V]: they themselves; or if fold what each segment does, None: 0
    made: Tensor | None  # logs or matrices of the segments, to be folded; None: 1
    carry: Tensor | None  # [N, K, V], before the first, to be folded; None: 0
    fold: bool

    @property
    def mT(self) -> Before:
        """Transposed: the decays of keys are then decays of columns."""
        states, carry = (None if x is None else x.mT for x in (self.states, self.carry))
        return self._replace(states=states, carry=carry)


class Chain:
    """What the segments of a walk do to the state.

    Args:
        batch: B and H, whose product is N.
        segments: how many.
        made: makes what they do, when that is first needed.
    """

    def __init__(self, batch: Size, segments: int, made: Callable[[], Made]) -> None:
        self.batch, self.segments, self._make = batch, segments, made
        self.exchanged = False
        """Whether the total is exchanged. A backward repeats its forward's chain in the same way, so that in
        one graph both are the same operators."""

    @functools.cached_property
    def made(self) -> Made:
        """What each segment does."""
        return self._make()

    @property
    def alone(self) -> bool:
        """Whether nothing needs to be known of any segment: there is one, and no rank but this."""
        return not self.exchanged and statically_known_true(self.segments == 1)

    def heads(self, state: Tensor) -> Tensor:
        """``[N, ...]`` as ``[B, H, ...]``."""
        return state.reshape(*self.batch, *state.shape[1:])

    def total(self) -> tuple[Tensor, ...]:
        """What all segments together do: (S), (sum of logs, S) or (A, S), each ``[B, H, ...]``."""
        return tuple(map(self.heads, self._total()))

    def _total(self) -> tuple[Tensor, ...]:
        self.exchanged = True
        states, logs, matrices, _ = self.made
        if matrices is not None:
            self.local()
            return self._through[1], self._alone[1]
        if logs is None:
            return (states.sum(1),)
        logs = logs.reshape(*states.shape[:2], -1, 1)
        later = F.pad(logs.narrow(1, 1, logs.shape[1] - 1), (0, 0, 0, 0, 0, 1))
        later = later.flip(1).cumsum(1).flip(1).exp()
        return logs.sum(1), (later * states).sum(1)

    def local(self) -> None:
        """Run from zero; where nothing is exchanged the carry is known, and nothing is to be done before."""
        if not self.exchanged or hasattr(self, "_alone"):
            return
        states, _, matrices, _ = self.made
        if matrices is None:
            self._alone = self._scan(states, None)
            return
        k, v = states.shape[-2:]
        index = torch.arange(k, device=states.device)
        eye = (index.unsqueeze(1) == index).to(states.dtype).expand(states.shape[0], k, k)
        both = self._scan(F.pad(states, (0, k)), F.pad(eye, (v, 0)))
        self._alone = both[0].narrow(-1, 0, v), both[1].narrow(-1, 0, v)
        self._through = both[0].narrow(-1, v, k), both[1].narrow(-1, v, k)

    def before(self, carry: Tensor | None) -> Before:
        """The state before each segment.

        Args:
            carry: the state before the first, ``[B, H, K, V]``; None: zero.
        """
        start = None if carry is None else carry.flatten(0, 1).float().contiguous()
        if self.alone:
            return Before(None, None, start, True)
        if not self.exchanged:
            states, logs, matrices, _ = self.made
            return Before(states, logs if matrices is None else matrices, start, True)
        return Before(self._before(start), None, None, False)

    def _before(self, start: Tensor | None) -> Tensor:
        self.local()
        before = self._alone[0]
        if start is None:
            return before
        states, logs, matrices, _ = self.made
        if matrices is not None:
            return before + self._through[0] @ start.unsqueeze(1)
        if logs is None:
            return before + start.unsqueeze(1)
        logs = logs.reshape(*states.shape[:2], -1, 1)
        earlier = F.pad(logs.narrow(1, 0, logs.shape[1] - 1), (0, 0, 0, 0, 1, 0))
        return before + earlier.cumsum(1).exp() * start.unsqueeze(1)

    def _scan(self, states: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        _, logs, matrices, turned = self.made
        if matrices is not None:
            matrices = matrices.flip(1).mT if turned else matrices
            return ops.affine_scan(matrices, states, start, True)
        factors = None if logs is None else logs.reshape(*states.shape[:2], -1, 1).exp()
        return ops.affine_scan(factors, states, start, False)
