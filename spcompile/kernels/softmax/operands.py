"""What a call of softmax attention is made of, and the one rule of which key a row may see: by its place
(:class:`Options`) and by its document (:class:`Operands`); and of what their distance adds to a score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PLAIN", "Operands", "Options"]


class Operands(NamedTuple):
    """The tensors of ``spcompile::softmax_attention``; Hkv divides H."""

    q: Tensor  # [B, H, T, K]
    k: Tensor  # [B, Hkv, S, K]
    v: Tensor  # [B, Hkv, S, V]
    mask: Tensor | None = None  # bool (True = may see) or additive, broadcastable to [B, H, T, S]
    sinks: Tensor | None = None  # [H]: a logit beside those of the keys, whose weight is dropped
    documents: Tensor | None = None  # [B or 1, S], integers: a row sees the keys of its own document
    relative: Tensor | None = None  # [H or 1, 2 L - 1]: entry L - 1 + p - j is added to a score, L >= T, S

    def own_documents(self, options: Options, start: int, stop: int) -> Tensor:
        """The documents of the rows [start, stop), [B or 1, rows]; behind the keys that of the last."""
        ids = self.documents
        assert ids is not None
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
        """Which keys of [first, end) each row of [start, stop) may see, by their places and documents.

        Bool ``[rows, keys]`` or ``[B or 1, 1, rows, keys]``; None: all.
        """
        band = options.visible(start, stop, first, end, self.q.device)
        if self.documents is None:
            return band
        own = self.own_documents(options, start, stop)
        same = (own.unsqueeze(2) == self.documents[:, None, first:end]).unsqueeze(1)
        return same if band is None else same & band

    def seen(self, options: Options, start: int, stop: int) -> tuple[int, int]:
        """Keys [first, end) outside of which no row of [start, stop) sees any.

        On a CPU by the documents as well: those between the least and the largest of the rows'. Elsewhere
        the numbers would have to be read back.
        """
        first, end = options.seen(start, stop, self.k.shape[2])
        if self.documents is None or self.documents.device.type != "cpu" or first >= end:
            return first, end
        own, ids = self.own_documents(options, start, stop), self.documents[:, first:end]
        found = ((ids >= own.amin()) & (ids <= own.amax())).any(0).nonzero()
        return (first + int(found[0]), first + int(found[-1]) + 1) if len(found) else (first, first)


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


PLAIN = Options(True, 1.0)
"""Causal, and nothing more."""
