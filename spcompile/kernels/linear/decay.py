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

# Tokens per block of a diagonal decay: the same number of tokens in a block as of blocks in a chunk.
_BLOCK = 8


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
    if g.shape[-1] != 1:
        return _diagonal(q, k, g, exclusive)
    return ((q @ k.mT) * _pairwise(g, exclusive).squeeze(-1).mT).tril(-1 if exclusive else 0)


def _segments(g: Tensor) -> Tensor:
    """``[..., C, D]`` to ``[..., C (j), C (i), D]``: the sum of g over exactly the tokens j < l <= i."""
    c = g.shape[-2]
    between = g.unsqueeze(-3).expand(*g.shape[:-2], c, c, g.shape[-1])
    later = torch.ones(c, c, dtype=torch.bool, device=g.device).triu(1).unsqueeze(-1)
    return torch.where(later, between, 0.0).cumsum(-2)


def _pairwise(g: Tensor, exclusive: bool) -> Tensor:
    """Decay from token j to token i, exp of :func:`_segments` (without i if ``exclusive``); 1 where j is
    not before i."""
    sums = _segments(g)
    return (_shifted(sums) if exclusive else sums).exp()


def _diagonal(q: Tensor, k: Tensor, g: Tensor, exclusive: bool) -> Tensor:
    """Diagonal decay, in blocks of a few tokens.

    Inside a block, for each pair of tokens by itself. From block J to a later block I the decay is split at
    the end of J and the start of I, so that the products are matmuls:

        s_ij = (q_i D(start of I .. i)) . (k_j D(j .. end of J) D(blocks between)).

    No tensor is larger than 8 times the keys; one ``[C, C, K]`` would be 64 times.
    """
    *lead, c, size = k.shape
    block = min(_BLOCK, c)
    n = c // block
    q, k, g = (x.reshape(*lead, n, block, size) for x in (q, k, g))

    inside = k.unsqueeze(-2) * _pairwise(g, exclusive) * q.unsqueeze(-3)  # [n, j, i, K]
    own = inside.sum(-1).mT.tril(-1 if exclusive else 0)
    blocks = torch.eye(n, dtype=k.dtype, device=k.device).reshape(n, 1, n, 1)
    scores = own.unsqueeze(-2) * blocks  # [I, i, J, j]
    if n > 1:
        between = _pairwise(g.sum(-2), True).transpose(-2, -3)  # [I, J, K]
        earlier = torch.ones(n, n, dtype=k.dtype, device=k.device).tril(-1).reshape(n, n, 1)
        keys = (k * to_end(g)).unsqueeze(-4) * (between * earlier).unsqueeze(-2)  # [I, J, j, K]
        across = (q * from_start(g, exclusive)) @ keys.flatten(-3, -2).mT
        scores = scores + across.reshape(scores.shape)
    return scores.reshape(*lead, c, c)
