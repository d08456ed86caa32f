"""Decays between the tokens of a chunk, from sums of logs alone.

The decay from token j to token i is exp(g_{j+1} + ... + g_i), g <= 0 the log decay per token. Every sum here
runs over exactly those tokens: nothing is a difference of two sums, so nothing is divided by a decay, no
exponent is positive, a gate of 0 (g = -inf) is exact, and a strong decay early in a chunk does not cost the
later ones their digits.

Shapes: ``[..., C, D]`` with C tokens of a chunk, a power of two; log decays ``[..., C, 1]`` (scalar) or
``[..., C, K]`` (diagonal).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["decayed_scores", "from_start", "to_end"]

# Blocks this small are summed elementwise; a batched matmul of them costs more than it computes.
_TINY = 4


def from_start(g: Tensor, exclusive: bool = False) -> Tensor:
    """exp of the sum of the log decays from the chunk's first token to each token, which itself is left out
    if ``exclusive``."""
    return (_shifted(g.cumsum(-2)) if exclusive else g.cumsum(-2)).exp()


def to_end(g: Tensor) -> Tensor:
    """exp of the sum of the log decays of the tokens after each token, to the end of the chunk."""
    return _shifted(g.flip(-2).cumsum(-2)).flip(-2).exp()


def _shifted(x: Tensor) -> Tensor:
    """Each entry moved one token later, a zero at the first."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0))


def decayed_scores(q: Tensor, k: Tensor, g: Tensor | None, exclusive: bool = False) -> Tensor:
    """``s_ij = sum_d q_id k_jd exp(sum_{j < l <= i} g_ld)`` for j <= i, else 0.

    Args:
        q, k: ``[..., C, K]``.
        g: log decays ``[..., C, 1]`` or ``[..., C, K]``; None is no decay.
        exclusive: the decay of token i itself is left out and so is j = i: ``j < l < i``, ``j < i``.
    Returns:
        ``[..., C, C]``.
    """
    if g is None:
        return (q @ k.mT).tril(-1 if exclusive else 0)
    if g.shape[-1] == 1:
        return (q @ k.mT) * _pairwise(g, exclusive)
    return _tree(q, k, g, exclusive)


def _pairwise(g: Tensor, exclusive: bool) -> Tensor:
    """Decay from token j to token i of ``[..., C, 1]``, ``[..., C, C]``; 0 above the diagonal."""
    c = g.shape[-2]
    # [j, l]: g_l where l > j, so that the running sum over l is the sum of exactly the tokens between.
    between = g.mT.expand(*g.shape[:-2], c, c)
    later = torch.ones(c, c, dtype=torch.bool, device=g.device).triu(1)
    sums = torch.where(later, between, 0.0).cumsum(-1).mT
    decay = (_shifted(sums) if exclusive else sums).exp()
    return decay.tril(-1 if exclusive else 0)


def _tree(q: Tensor, k: Tensor, g: Tensor, exclusive: bool) -> Tensor:
    """Diagonal decay, by halves: between the halves of a block the decay is split at the middle,

        s_ij = (q_i exp(sum from the middle to i)) . (k_j exp(sum from j to the middle)),

    and inside each half the same again, down to single tokens. log2(C) levels of two scaled copies take the
    place of a tensor [C, C, K].
    """
    *lead, c, size = k.shape
    diagonal = (q * k).sum(-1)
    scores = torch.zeros_like(diagonal)[..., None, None] if exclusive else diagonal[..., None, None]
    half = 1
    while half < c:
        q2, k2, g2 = (x.reshape(*lead, c // (2 * half), 2, half, size) for x in (q, k, g))
        later = q2[..., 1, :, :] * from_start(g2[..., 1, :, :], exclusive)
        earlier = k2[..., 0, :, :] * to_end(g2[..., 0, :, :])
        cross = _products(later, earlier)
        pairs = scores.reshape(*lead, c // (2 * half), 2, half, half)
        upper = F.pad(pairs[..., 0, :, :], (0, half))
        scores = torch.cat([upper, torch.cat([cross, pairs[..., 1, :, :]], -1)], -2)
        half *= 2
    return scores.reshape(*lead, c, c)


def _products(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[-2] <= _TINY:
        return (x.unsqueeze(-2) * y.unsqueeze(-3)).sum(-1)
    return x @ y.mT
