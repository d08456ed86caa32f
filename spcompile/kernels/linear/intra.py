"""What one chunk of tokens does, for every variant: a map of the memory state, and outputs linear in it.

A chunk that starts from the memory state S returns

    S_after = A S + B          out = intra + queries S

and the variants differ only in the four. With decays D (``decay.py``), tril taken after the products,

    no delta rule      A = D(whole chunk)   B = (k D_to_end)^T v        intra = (q k^T . D) v   queries = q D
    delta rule         u = T (beta v)   w = T (beta k D)   T = (I + strictly lower (beta k k^T . D))^-1
                       A = D - (k D_to_end)^T w   B = (k D_to_end)^T u
                       intra = (q k^T . D) u      queries = q D - (q k^T . D) w

The delta rule S_t = (I - beta k^T k) D S_{t-1} + beta k^T v writes beta (v - k D S_{t-1}), the values that
the tokens before it in the chunk have not stored yet: a triangular system, the UT transform.

Sources: GLA (arXiv 2312.06635, section 4), DeltaNet (2406.06484, section 3), Gated DeltaNet (2412.06464).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spcompile.kernels.linear.decay import decayed_scores, from_start, to_end

__all__ = ["Tokens", "outputs", "transition", "written"]


class Tokens(NamedTuple):
    """The operands of the tokens of chunks, ``[..., C, *]`` in the state dtype."""

    q: Tensor  # [..., C, K], scaled
    k: Tensor  # [..., C, K]
    v: Tensor  # [..., C, V]
    g: Tensor | None  # [..., C, 1] or [..., C, K], log decay
    beta: Tensor | None  # [..., C, 1]


# Three functions, each of just what it reads: a rank sends its state before it computes its outputs, and the
# backward differentiates what it knows already while the rest is on its way.


def written(k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """u, what each token writes if the chunk starts empty, and w: starting from S it writes u - w S.

    Without a delta rule these are v and None (zero).
    """
    if beta is None:
        return v, None
    k_beta = k * beta
    system = decayed_scores(k_beta, k, g).tril(-1)
    seen = k_beta if g is None else k_beta * from_start(g)
    right = torch.cat([v * beta, seen], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    return u, w


def transition(k: Tensor, g: Tensor | None, u: Tensor, w: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """What a chunk does to the state: A (None is 1; ``[..., 1 or K, 1]``; a matrix ``[..., K, K]``) and B,
    ``[..., K, V]``."""
    kept = k if g is None else k * to_end(g)
    decay = None if g is None else g.sum(-2, keepdim=True).mT.exp()
    if w is None:
        return decay, kept.mT @ u
    diagonal = torch.eye(k.shape[-1], dtype=w.dtype, device=w.device)
    return (diagonal if decay is None else diagonal * decay) - kept.mT @ w, kept.mT @ u


def outputs(
    q: Tensor, k: Tensor, g: Tensor | None, u: Tensor, w: Tensor | None, exclusive: bool
) -> tuple[Tensor, Tensor]:
    """intra ``[..., C, V]`` and queries ``[..., C, K]``."""
    scores = decayed_scores(q, k, g, exclusive)
    queries = q if g is None else q * from_start(g, exclusive)
    return scores @ u, queries if w is None else queries - scores @ w
