"""What a call of softmax attention is made of, and the one rule of which key a row may see: by its place
(:class:`Options`), by its prefix and by its document (:class:`Operands`); and of what their distance adds to
a score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PLAIN", "Operands", "Options", "with_sinks"]


class Operands(NamedTuple):
    """The tensors of ``spcompile::softmax_attention``; Hkv divides H."""

    q: Tensor  # [B, H, T, K]
    k: Tensor  # [B, Hkv, S, K]
    v: Tensor  # [B, Hkv, S, V]
    mask: Tensor | None = None  # bool (True = may see) or additive, broadcastable to [B, H, T, S]
    sinks: Tensor | None = None  # [H]: a logit beside those of the keys, whose weight is dropped
    documents: Tensor | None = None  # [B or 1, S], integers: a row sees the keys of its own document
    relative: Tensor | None = None  # [H or 1, 2 L - 1]: entry L - 1 + p - j is added to a score, L >= T, S
    prefixes: Tensor | None = None  # [B or 1, S], integers: tokens of one number >= 0 see each other

    @property
    def ids(self) -> list[Tensor]:
        """The operands that are a number of each token, by which a row sees keys or does not."""
        return [x for x in (self.documents, self.prefixes) if x is not None]

    def own(self, ids: Tensor, options: Options, start: int, stop: int) -> Tensor:
        """Those of the rows [start, stop), [B or 1, rows]; behind the keys that of the last."""
        first, last = options.first_row + start, options.first_row + stop
        if last <= ids.shape[1]:
            return ids[:, first:last]
        return ids[:, torch.arange(first, last, device=ids.device).clamp(max=ids.shape[1] - 1)]

    def distances(self, options: Options, start: int, stop: int, first: int, end: int) -> Tensor:
        """Where the entries of ``relative`` are that a block of rows and keys reads, ``[rows + keys - 1]``,
        from the last key's distance to the first row to the first key's to the last row.

        Rows behind all keys are padding, and read the last entry.
        """
        assert self.relative is not None
        size = self.relative.shape[1]
        zero = size // 2 + options.first_row
        low, high = zero + start - (end - 1), zero + stop - first
        return torch.arange(low, high, device=self.relative.device).clamp(0, size - 1)

    def bias(self, options: Options, start: int, stop: int, first: int, end: int) -> Tensor | None:
        """What ``relative`` adds to the scores of a block, ``[1, H or 1, rows, keys]``; None: nothing."""
        if self.relative is None:
            return None
        entries = self.relative[:, self.distances(options, start, stop, first, end)]
        return entries.unfold(1, end - first, 1).flip(2).unsqueeze(0)

    def visible(self, options: Options, start: int, stop: int, first: int, end: int) -> Tensor | None:
        """Which keys of [first, end) each row of [start, stop) may see, by their places and numbers.

        Bool ``[rows, keys]`` or ``[B or 1, 1, rows, keys]``; None: all.
        """
        seen = options.visible(start, stop, first, end, self.q.device)
        if seen is not None and self.prefixes is not None:
            own = self.own(self.prefixes, options, start, stop).unsqueeze(2)
            seen = seen | ((own == self.prefixes[:, None, first:end]) & (own >= 0)).unsqueeze(1)
        if self.documents is None:
            return seen
        own = self.own(self.documents, options, start, stop).unsqueeze(2)
        same = (own == self.documents[:, None, first:end]).unsqueeze(1)
        return same if seen is None else same & seen

    def seen(self, options: Options, start: int, stop: int) -> tuple[int, int]:
        """Keys [first, end) outside of which no row of [start, stop) sees any.

        On a CPU by the tokens' numbers as well: those between the least and the largest of the rows'.
        Elsewhere the numbers would have to be read back.
        """
        keys = self.k.shape[2]
        first, end = options.seen(start, stop, keys)
        on_cpu = self.q.device.type == "cpu"
        if self.prefixes is not None and keys:
            own = self.own(self.prefixes, options, start, stop)
            low, high = _between(self.prefixes, own[own >= 0]) if on_cpu else (0, keys)
            if low < high:
                first, end = (min(first, low), max(end, high)) if first < end else (low, high)
        if self.documents is None or not on_cpu or first >= end:
            return first, end
        own = self.own(self.documents, options, start, stop)
        low, high = _between(self.documents[:, first:end], own)
        return first + low, first + high


def _between(ids: Tensor, own: Tensor) -> tuple[int, int]:
    """Tokens [first, end) outside of which no number is between the least and the largest of ``own``."""
    if own.numel() == 0:
        return 0, 0
    found = ((ids >= own.amin()) & (ids <= own.amax())).any(0).nonzero()
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)


class Options(NamedTuple):
    """The other arguments.

    Row i of q is at position p = first_row + i among the keys and sees key j only where ``j <= p`` if causal,
    and ``|p - j| < window`` if there is a window. Scores are ``scale * q_i k_j``, or
    ``soft_cap * tanh(scale * q_i k_j / soft_cap)``.
    """

    causal: bool
    scale: float
    first_row: int = 0
    window: int | None = None
    soft_cap: float | None = None

    def seen(self, start: int, stop: int, keys: int) -> tuple[int, int]:
        """Of so many keys those [first, end) that some row of [start, stop) may see."""
        first, end = 0, keys
        if self.causal:
            end = min(end, self.first_row + stop)
        if self.window is not None:
            end = min(end, self.first_row + stop + self.window - 1)
            first = max(first, self.first_row + start - self.window + 1)
        return min(first, max(end, 0)), max(end, 0)

    def visible(
        self, start: int, stop: int, first: int, end: int, device: torch.device | str = "cpu"
    ) -> Tensor | None:
        """Which keys of [first, end) each row of [start, stop) may see, bool ``[rows, keys]``; None: all."""
        top, low = self.first_row + stop - 1, self.first_row + start
        ahead = self.causal and end - 1 > low
        ahead = ahead or (self.window is not None and end - 1 >= low + self.window)
        behind = self.window is not None and first <= top - self.window
        if not ahead and not behind:
            return None
        rows = torch.arange(start, stop, device=device)[:, None] + self.first_row
        distance = rows - torch.arange(first, end, device=device)
        if self.window is None:
            return distance >= 0
        return (distance >= (0 if self.causal else 1 - self.window)) & (distance < self.window)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """One more logit in each row's softmax, with a value of 0.

    lse' = log(exp(lse) + exp(sink))      out' = exp(lse - lse') out
    """
    both = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    kept = torch.where(lse == -torch.inf, 0.0, torch.exp(lse - both))
    return (out * kept.unsqueeze(-1)).to(out.dtype), both


PLAIN = Options(True, 1.0)
"""Causal, and nothing more."""
