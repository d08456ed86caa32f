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

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spcompile.kernels.linear.decay import decayed_scores, from_start, to_end

__all__ = ["Tokens", "chunk_map", "intra"]


class Tokens(NamedTuple):
    """The operands of the tokens of chunks, ``[..., C, *]`` in the state dtype."""

    q: Tensor  # [..., C, K], scaled
    k: Tensor  # [..., C, K]
    v: Tensor  # [..., C, V]
    g: Tensor | None  # [..., C, 1] or [..., C, K], log decay
    beta: Tensor | None  # [..., C, 1]


Outputs = Callable[[], tuple[Tensor, Tensor]]


def intra(x: Tokens, exclusive: bool) -> tuple[Tensor | None, Tensor, Outputs]:
    """What a chunk does to the state, and a function that computes its outputs: a rank sends its state first.

    Returns:
        A (None is 1; ``[..., 1 or K, 1]``; a matrix ``[..., K, K]``), B ``[..., K, V]``, and a function
        without arguments that returns (intra ``[..., C, V]``, queries ``[..., C, K]``).
    """
    kept = x.k if x.g is None else x.k * to_end(x.g)
    decay = None if x.g is None else x.g.sum(-2, keepdim=True).mT.exp()

    def queries() -> Tensor:
        return x.q if x.g is None else x.q * from_start(x.g, exclusive)

    if x.beta is None:
        return decay, kept.mT @ x.v, lambda: (decayed_scores(x.q, x.k, x.g, exclusive) @ x.v, queries())

    u, w = _delta(x)
    removed = kept.mT @ w
    diagonal = torch.eye(x.k.shape[-1], dtype=w.dtype, device=w.device)
    a = (diagonal if decay is None else diagonal * decay) - removed

    def outputs() -> tuple[Tensor, Tensor]:
        scores = decayed_scores(x.q, x.k, x.g, exclusive)
        return scores @ u, queries() - scores @ w

    return a, kept.mT @ u, outputs


def _delta(x: Tokens) -> tuple[Tensor, Tensor]:
    """u, what each token writes if the chunk starts empty, and w: starting from S it writes u - w S."""
    assert x.beta is not None
    k_beta = x.k * x.beta
    system = decayed_scores(k_beta, x.k, x.g).tril(-1)
    seen = k_beta if x.g is None else k_beta * from_start(x.g)
    right = torch.cat([x.v * x.beta, seen], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solved.split([x.v.shape[-1], x.k.shape[-1]], -1)
    return u, w


def chunk_map(x: Tokens, exclusive: bool) -> tuple[Tensor, ...]:
    """All four at once, (A if it is not 1,) B, intra, queries: what the backward differentiates."""
    a, b, outputs = intra(x, exclusive)
    return (b, *outputs()) if a is None else (a, b, *outputs())
