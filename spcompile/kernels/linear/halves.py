"""Scores, queries and keys of chunks under decays, by halves: in eager ATen little more than a product.

A pair of tokens j < i of a chunk is apart for the first time in one block of 2h tokens, j in its first half
and i in its second. There the decay between them is split at the middle,

    s_ij = (q_i D(middle .. i)) . (k_j D(j .. middle)),

so a level of the halving, h = 1, 2, 4 ..., is a product of its queries and its keys. The next level's are
these times the decay of the half that they have left behind, in place:

    q of second halves *= D(first half)      k of first halves *= D(second half)
    D(both halves) = D(first half) D(second half)

and what is left after the last level are the queries from the chunk's start and the keys to its end. There is
one exponential per log decay, every factor is at most 1, nothing is divided by a decay, and a decay over 64
tokens is a product of 6 factors: a gate of 0 is exact and no digits are lost. The backward goes through the
levels the other way, with the gradients of the logarithms of the decays.

One decay of all keys is halved without them, and multiplies the one product of all queries and keys.

Shapes: M chunks of C tokens, a power of two; log decays ``[M, C, D]``, D = 1 (scalar) or K (diagonal).
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Decayed", "decayed", "gradients"]


class _Level(NamedTuple):
    """The factors of one level's scores, ``[M * C / 2h, h, K]``, and D ``[M, C / h, D]`` of its halves."""

    queries: Tensor | None
    keys: Tensor
    decay: Tensor


class Decayed(NamedTuple):
    """What :func:`decayed` finds."""

    scores: Tensor | None  # [M, C, C], zero where the decay is of no pair
    queries: Tensor | None  # [M, C, K], with the decay from the chunk's start
    keys: Tensor  # [M, C, K], with the decay to the chunk's end
    decay: Tensor | None  # [M, 1, D], of the whole chunk; None is 1
    levels: list[_Level]  # what the gradients need, and so for one decay of all keys:
    pairs: Decayed | None = None  # the decays themselves, as scores of ones
    product: Tensor | None = None  # q k^T without them


def decayed(
    q: Tensor | None, k: Tensor, g: Tensor | None, exclusive: bool, diagonal: bool, trained: bool = False
) -> Decayed:
    """``s_ij = q_i . k_j D_ij`` for j < i, and j = i if ``diagonal``, else 0.

    Args:
        q: ``[M, C, K]``; None: only keys and decay are asked for.
        k: ``[M, C, K]``.
        g: log decays ``[M, C, D]``, <= 0; None is no decay.
        exclusive: the decay of token i itself is left out, as in the queries.
        trained: gradients will be asked for.
    """
    if g is None:
        return Decayed(None if q is None else _lower(q @ k.mT, diagonal), q, k, None, [])
    if g.shape[2] == 1 != k.shape[2]:
        return _scalar(q, k, g, exclusive, diagonal, trained)
    decay, levels, scores = g.contiguous().exp(), [], None
    if q is not None:
        scores = k.new_zeros(*k.shape[:2], k.shape[1])
        if diagonal:
            scores.diagonal(dim1=1, dim2=2).copy_(torch.linalg.vecdot(q, k))
        q = _copy(q) if exclusive else _copy(q).mul_(decay)
    k = _copy(k)
    half = 1
    while half < k.shape[1]:
        first, second = _halves(decay, 1)
        keys, queries = _halves(k, half)[0], None if q is None else _halves(q, half)[1]
        if trained:
            levels.append(_Level(None if queries is None else queries.clone(), keys.clone(), decay))
        if queries is not None and scores is not None:
            product = queries @ keys.mT if k.shape[2] > 1 else queries * keys.mT
            _blocks(scores, half).copy_(product.view(scores.shape[0], -1, half, half))
            queries.mul_(first)
        keys.mul_(second)
        decay = (first * second).view(k.shape[0], -1, g.shape[2])
        half *= 2
    return Decayed(scores, q, k, decay, levels)


def _scalar(
    q: Tensor | None, k: Tensor, g: Tensor, exclusive: bool, diagonal: bool, trained: bool
) -> Decayed:
    """One decay of all keys: of each pair by itself, times one product for all pairs."""
    ones = torch.ones_like(g)
    of = decayed(None if q is None else ones, ones, g, exclusive, diagonal, trained)
    keys = k * of.keys
    if q is None or of.scores is None:
        return Decayed(None, None, keys, of.decay, [], of)
    product = q @ k.mT
    return Decayed(product * of.scores, q * of.queries, keys, of.decay, [], of, product)


Gradients: TypeAlias = tuple[Tensor | None, Tensor, Tensor | None]


def gradients(
    of: Decayed,
    q: Tensor | None,
    k: Tensor,
    g: Tensor | None,
    exclusive: bool,
    diagonal: bool,
    scores: Tensor | None = None,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    decay: Tensor | None = None,
) -> Gradients:
    """The gradients of q, k and g from those of what :func:`decayed` has found, made with ``trained``.

    Args:
        scores, queries: ``[M, C, C]`` and ``[M, C, K]``, None if q is; above the diagonal scores may be
            anything.
        keys: ``[M, C, K]``; None: zero.
        decay: ``[M, 1, D]``, of the *logarithm* of the chunk's decay; None: zero.
    """
    if g is None:
        return _without_decay(q, k, diagonal, scores, queries, keys)
    if of.pairs is not None:
        return _of_scalar(of, of.pairs, q, k, g, exclusive, diagonal, scores, queries, keys, decay)
    dk = k.new_zeros(k.shape) if keys is None else _copy(keys)  # contiguous, for views of halves
    dq = None if queries is None else _copy(queries)
    dg = g.new_zeros(g.shape[0], 1, g.shape[2]) if decay is None else decay
    half = k.shape[1]
    for level in reversed(of.levels):
        half //= 2
        first, second = _halves(level.decay, 1)
        of_both, dg = dg.reshape(-1, 1, g.shape[2]), torch.empty_like(level.decay)
        of_first, of_second = _halves(dg, 1)
        of_keys = _halves(dk, half)[0]
        of_second.copy_(of_both + second * _summed(of_keys * level.keys, g.shape[2]))
        of_keys.mul_(second)
        if dq is None or level.queries is None or scores is None:
            of_first.copy_(of_both)
            continue
        of_queries = _halves(dq, half)[1]
        of_first.copy_(of_both + first * _summed(of_queries * level.queries, g.shape[2]))
        of_queries.mul_(first)
        blocks = _blocks(scores, half).reshape(-1, half, half)
        _add_product(of_queries, blocks, level.keys)
        _add_product(of_keys, blocks.mT, level.queries)
    if q is None or dq is None or scores is None:
        return None, dk, dg
    if not exclusive:
        dq *= g.exp() if not of.levels else of.levels[0].decay
        dg = dg + (dq * q if g.shape[2] != 1 else torch.linalg.vecdot(dq, q).unsqueeze(-1))
    if diagonal:
        own = scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        dq.addcmul_(own, k)
        dk.addcmul_(own, q)
    return dq, dk, dg


def _of_scalar(
    of: Decayed,
    pairs: Decayed,
    q: Tensor | None,
    k: Tensor,
    g: Tensor,
    exclusive: bool,
    diagonal: bool,
    scores: Tensor | None,
    queries: Tensor | None,
    keys: Tensor | None,
    decay: Tensor | None,
) -> Gradients:
    ones = torch.ones_like(g)
    dk = None if keys is None else keys * pairs.keys
    of_keys = None if keys is None else torch.linalg.vecdot(keys, k).unsqueeze(-1)
    how = exclusive, diagonal
    if q is None or scores is None or queries is None or of.product is None or pairs.scores is None:
        _, _, dg = gradients(pairs, None, ones, g, *how, keys=of_keys, decay=decay)
        return None, torch.zeros_like(k) if dk is None else dk, dg
    of_queries = torch.linalg.vecdot(queries, q).unsqueeze(-1)
    _, _, dg = gradients(pairs, ones, ones, g, *how, scores * of.product, of_queries, of_keys, decay)
    scores = scores * pairs.scores
    dq, of_k = torch.baddbmm(queries * pairs.queries, scores, k), scores.mT @ q
    return dq, of_k if dk is None else of_k.add_(dk), dg


def _without_decay(
    q: Tensor | None,
    k: Tensor,
    diagonal: bool,
    scores: Tensor | None,
    queries: Tensor | None,
    keys: Tensor | None,
) -> Gradients:
    if q is None or scores is None or queries is None:
        return None, torch.zeros_like(k) if keys is None else keys, None
    scores = _lower(scores.clone(), diagonal)
    dk = scores.mT @ q
    return torch.baddbmm(queries, scores, k), dk if keys is None else dk.add_(keys), None


def _lower(scores: Tensor, diagonal: bool) -> Tensor:
    """``scores`` with zeros above the diagonal, or also on it, in place."""
    return scores.tril_(0 if diagonal else -1)


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """First and second halves of ``[M, C, D]`` in blocks of 2h tokens, views ``[M * C / 2h, h, D]``."""
    pairs = x.view(-1, 2, half, x.shape[2])
    return pairs[:, 0], pairs[:, 1]


def _blocks(scores: Tensor, half: int) -> Tensor:
    """A view ``[M, C / 2h, h, h]`` of the scores of second halves with the first halves of their blocks."""
    chunks, size, _ = scores.shape
    count = size // (2 * half)
    apart = scores.view(chunks, count, 2, half, count, 2, half)[:, :, 1, :, :, 0]
    return apart.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _summed(x: Tensor, size: int) -> Tensor:
    """The sum over tokens, and over keys if they have one decay."""
    return x.sum((1, 2), keepdim=True) if size == 1 else x.sum(1, keepdim=True)


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """``to += a @ b`` for many small ones: a library's product is slow for matrices of two."""
    if a.shape[-1] > 2:
        to.add_(a @ b)
        return
    for i in range(a.shape[-1]):
        to.addcmul_(a[..., i : i + 1], b[..., i : i + 1, :])


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
