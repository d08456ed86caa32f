"""What chunks of tokens do, and the gradients, in eager ATen: the formulas of ``intra.py`` for M chunks.

With D the decays, and s the scores of ``halves.py``, C tokens per chunk:

    no delta rule    u = v
                     A = D(whole chunk)     B = (k D_to_end)^T u     intra = s u     queries = q D
    delta rule       [u | w] = (1 + L)^-1 [beta v | beta k D]        L = strictly lower (beta k k^T . D)
                     A = D - (k D_to_end)^T w   B = (k D_to_end)^T u   intra = s u   queries = q D - s w

``written`` is u, or [u | w]: one product serves both. The gradients are those of ``chunked.py``, written out:
there they are found by differentiating, which makes more operators and more passes over memory than there
are formulas.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from spcompile.kernels.linear.halves import decayed, gradients

__all__ = ["states", "states_backward", "within", "within_backward"]

Maybe: TypeAlias = Tensor | None


def states(k: Tensor, v: Tensor, g: Maybe, beta: Maybe) -> tuple[Tensor, Maybe, Maybe]:
    """B ``[M, K, V]``; A as sums of log decays ``[M, D]``, None (1) or a matrix ``[M, K, K]``; with a delta
    rule what is written, ``[M, C, V + K]``."""
    if beta is None:
        keys = decayed(None, k, g, False, False).keys
        return keys.mT @ v, None if g is None else g.sum(1), None
    of = decayed(k * beta, k, g, False, False)
    assert of.scores is not None and of.queries is not None
    right = torch.cat([v * beta, of.queries], -1)
    written = torch.linalg.solve_triangular(of.scores, right, upper=False, unitriangular=True)
    both = of.keys.mT @ written
    size = v.shape[2]
    matrix = both[..., size:].neg()
    matrix.diagonal(dim1=1, dim2=2).add_(1.0 if of.decay is None else of.decay.squeeze(1))
    return both[..., :size], matrix, written


def within(
    q: Tensor, k: Tensor, written: Tensor, g: Maybe, size: int, exclusive: bool
) -> tuple[Tensor, Tensor]:
    """intra ``[M, C, V]`` and queries ``[M, C, K]``; V is ``size``."""
    of = decayed(q, k, g, exclusive, not exclusive)
    assert of.scores is not None and of.queries is not None
    read = of.scores @ written
    if written.shape[2] == size:
        return read, of.queries
    return read[..., :size], of.queries - read[..., size:]


def within_backward(
    grad: Tensor, before: Tensor, q: Tensor, k: Tensor, written: Tensor, g: Maybe, exclusive: bool
) -> tuple[Tensor, Tensor, Maybe, Tensor]:
    """What is known of dq, dk, dg and of the gradient of ``written`` without the gradient of the states.

    Args:
        grad: of the outputs, ``[M, C, V]``.
        before: the states before the chunks, ``[M, K, V]``.
    """
    of = decayed(q, k, g, exclusive, not exclusive, trained=True)
    assert of.scores is not None
    of_queries = grad @ before.mT
    of_read = grad if written.shape[2] == grad.shape[2] else torch.cat([grad, -of_queries], -1)
    given = of_read @ written.mT, of_queries
    dq, dk, dg = gradients(of, q, k, g, exclusive, not exclusive, *given)
    assert dq is not None
    return dq, dk, dg, of.scores.mT @ of_read


def states_backward(
    k: Tensor,
    v: Tensor,
    g: Maybe,
    beta: Maybe,
    written: Maybe,
    before: Tensor,
    after: Tensor,
    dk: Tensor,
    dg: Maybe,
    of_written: Tensor,
) -> tuple[Tensor, Tensor, Maybe, Maybe]:
    """dk, dv, dg and dbeta, from what :func:`within_backward` knows of them and the gradients of the states.

    Args:
        before: the states before the chunks, ``[M, K, V]``.
        after: the gradients of the states after the chunks, ``[M, K, V]``.
    """
    if beta is None:
        of = decayed(None, k, g, False, False, trained=True)
        of_decay = None
        if g is not None and of.decay is not None:
            of_decay = of.decay * _of_log(after * before, g.shape[2])
        _, of_k, of_g = gradients(of, None, k, g, False, False, keys=v @ after.mT, decay=of_decay)
        return dk + of_k, of_written + of.keys @ after, _sum(dg, of_g), None
    assert written is not None
    strong = k * beta
    of = decayed(strong, k, g, False, False, trained=True)
    assert of.scores is not None
    of_matrix = after @ before.mT
    of_both = torch.cat([after, -of_matrix], -1)
    of_right = torch.linalg.solve_triangular(
        of.scores.mT, of_written + of.keys @ of_both, upper=True, unitriangular=True
    )
    of_decay = None
    if g is not None and of.decay is not None:
        own = torch.diagonal_copy(of_matrix, dim1=1, dim2=2).unsqueeze(1) * of.decay
        of_decay = own if g.shape[2] != 1 else own.sum(2, keepdim=True)
    of_v, of_seen = of_right.split([v.shape[2], k.shape[2]], -1)
    given = -(of_right @ written.mT), of_seen, written @ of_both.mT, of_decay
    of_strong, of_k, of_g = gradients(of, strong, k, g, False, False, *given)
    assert of_strong is not None
    dbeta = torch.linalg.vecdot(of_v, v) + torch.linalg.vecdot(of_strong, k)
    dk = dk + of_k.addcmul_(of_strong, beta)
    return dk, of_v * beta, _sum(dg, of_g), dbeta.unsqueeze(-1)


def _of_log(product: Tensor, size: int) -> Tensor:
    """Of states times their gradients ``[M, K, V]`` the sums that belong to a decay, ``[M, 1, D]``."""
    return product.sum((1, 2)).reshape(-1, 1, 1) if size == 1 else product.sum(2).unsqueeze(1)


def _sum(a: Maybe, b: Maybe) -> Maybe:
    return b if a is None else a if b is None else a + b
