"""Causal linear attention in chunks, as batched ATen matmuls that Inductor fuses around.

With chunks of C tokens, S_c = sum of k_j^T v_j over chunk c, and P_c = S_0 + ... + S_{c-1} (before chunk c):

    out_c = scale * ( tril(q_c k_c^T) v_c  +  q_c (P_c + carry) )                        (LASP-2, eqs. 5-8)

where ``carry`` is the memory state before the first token, nonzero on a rank that has ranks before it. With
R_c the sum of q_i^T do_i over the chunks *after* c (its ``carry`` is what later ranks add), the gradients are

    dq_c = scale * ( tril(do_c v_c^T) k_c    +  do_c (P_c + carry)^T )
    dk_c = scale * ( tril(do_c v_c^T)^T q_c  +  v_c (R_c + carry)^T )
    dv_c = scale * ( tril(q_c k_c^T)^T do_c  +  k_c (R_c + carry) )

Each direction is cut where a rank needs other ranks: ``*_start`` gives the sums that a strategy exchanges,
``*_local`` needs no communication and is what the exchange hides behind, ``*_finish`` takes what came back.

Shapes: N = B*H, n chunks per rank, C tokens per chunk; memory and work are linear in T, and no Python loop
runs over chunks, so the graph has the same size for any T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CHUNK",
    "Backward",
    "Forward",
    "backward_finish",
    "backward_start",
    "exclusive_sum",
    "forward_finish",
    "forward_local",
    "forward_start",
    "state_dtype",
]

# Tokens per chunk. Scores take T*C elements and states T*K*V/C. CPU milliseconds of forward and backward by
# Inductor on one core, T = 4096 and H*K = 512, for C = 32, 64, 128, 256:
#     K = V = 64:  94, 91, 112, 137      K = V = 128:  108, 95, 108, 142      K = V = 256:  189, 164, 163, 193
CHUNK = 64

# From this head size on, a chunk of 128 is as fast and halves the memory of the states.
_WIDE = 256

# Chunk states per group of the two-level sum (see exclusive_sum): 16 adds a quarter to the states' work.
_GROUP = 16


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of memory states and of sums over tokens: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_length(k: Tensor, v: Tensor) -> int:
    """Tokens per chunk for these keys and values, no more than there are."""
    chunk = 2 * CHUNK if k.shape[3] * v.shape[3] >= _WIDE**2 else CHUNK
    return max(1, min(chunk, k.shape[2]))


def chunked(x: Tensor, chunk: int) -> Tensor:
    """Cut ``[B, H, T, D]`` into chunks ``[B*H, ceil(T/chunk), chunk, D]`` in the state dtype.

    A last chunk that is not full is filled with zeros, which add nothing to any sum.
    """
    b, h, t, d = x.shape
    x = x.to(state_dtype(x.dtype))
    if t % chunk:
        x = F.pad(x, (0, 0, 0, -t % chunk))
    return x.reshape(b * h, -(-t // chunk), chunk, d)


def unchunked(x: Tensor, like: Tensor) -> Tensor:
    """Chunks ``[B*H, n, C, D]`` back to the batch, heads, length and dtype of ``like``, contiguous."""
    b, h, t, _ = like.shape
    return x.reshape(b, h, -1, x.shape[-1])[:, :, :t].to(like.dtype).contiguous()


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """Matmul of the last two dims, as one bmm over batch, heads and chunks."""
    out = torch.bmm(x.reshape(-1, *x.shape[2:]), y.reshape(-1, *y.shape[2:]))
    return out.reshape(*x.shape[:2], *out.shape[1:])


def exclusive_sum(states: Tensor, reverse: bool = False) -> Tensor:
    """Sum of the chunk states before each chunk (after it, if ``reverse``), ``[N, n, K, V]`` to the same.

    Two levels: inside groups of 16 chunks a matmul with a strictly triangular matrix of ones, and the
    groups' totals by the same function. A ``cumsum`` along a dim that is not the last costs three times as
    much on CPU and is not fused: with it the layer takes 1.8 times as long.
    """
    batch, n, k, v = states.shape
    if n <= 1:
        return torch.zeros_like(states)
    group = min(_GROUP, n)
    groups = -(-n // group)
    flat = states.reshape(batch, n, k * v)
    if n % group:
        flat = F.pad(flat, (0, 0, 0, groups * group - n))
    flat = flat.reshape(batch * groups, group, k * v)
    ones = torch.ones(group, group, dtype=states.dtype, device=states.device)
    before = ones.triu(1) if reverse else ones.tril(-1)
    sums = torch.bmm(before.expand(batch * groups, group, group), flat).reshape(batch, groups, group, k, v)
    if groups > 1:
        totals = flat.sum(1).reshape(batch, groups, k, v)
        sums = sums + exclusive_sum(totals, reverse).unsqueeze(2)
    return sums.reshape(batch, groups * group, k, v)[:, :n]


class Forward(NamedTuple):
    """What the forward holds between its steps: chunked operands, per-chunk states and the local results."""

    q: Tensor  # [N, n, C, K]
    k: Tensor  # [N, n, C, K]
    v: Tensor  # [N, n, C, V]
    states: Tensor  # [N, n, K, V], S_c


def forward_start(q: Tensor, k: Tensor, v: Tensor) -> tuple[Forward, Tensor]:
    """Chunk the operands and sum their states.

    Args:
        q, k: ``[B, H, T, K]``; v: ``[B, H, T, V]``, any float dtype.
    Returns:
        the forward's intermediates, and the summary ``[B, H, K, V]`` = sum of k_j^T v_j over all T tokens.
    """
    chunk = _chunk_length(k, v)
    q_c, k_c, v_c = chunked(q, chunk), chunked(k, chunk), chunked(v, chunk)
    states = _matmul(k_c.transpose(2, 3), v_c)
    summary = states.sum(1).reshape(*q.shape[:2], k.shape[3], v.shape[3])
    return Forward(q_c, k_c, v_c, states), summary


def forward_local(f: Forward, scale: float) -> tuple[Tensor, Tensor]:
    """The part that needs no other rank: intra-chunk outputs [N, n, C, V] and states before each chunk."""
    scores = (_matmul(f.q, f.k.transpose(2, 3)) * scale).tril()
    return _matmul(scores, f.v), exclusive_sum(f.states)


def forward_finish(
    f: Forward, intra: Tensor, before: Tensor, carry: Tensor | None, scale: float, like: Tensor
) -> Tensor:
    """Apply the states before each chunk, with the ``carry`` [B, H, K, V] of earlier ranks, to the queries.

    Returns ``[B, H, T, V]`` in the dtype of ``like`` (the queries as they were given).
    """
    out = intra + _matmul(f.q, _with_carry(before, carry) * scale)
    return unchunked(out, like)


def _with_carry(states: Tensor, carry: Tensor | None) -> Tensor:
    if carry is None:
        return states
    return states + carry.reshape(states.shape[0], 1, *states.shape[2:])


class Backward(NamedTuple):
    """What the backward holds between its steps."""

    grad: Tensor  # [N, n, C, V]
    q: Tensor  # [N, n, C, K]
    k: Tensor  # [N, n, C, K]
    v: Tensor  # [N, n, C, V]
    states: Tensor  # [N, n, K, V], sum of q_i^T do_i of each chunk


def backward_start(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Backward, Tensor]:
    """Chunk the operands and sum the states of the backward recurrence.

    Returns:
        the backward's intermediates, and the summary ``[B, H, K, V]`` = sum of q_i^T do_i over all T tokens.
    """
    chunk = _chunk_length(k, v)
    grad_c, q_c, k_c, v_c = (chunked(x, chunk) for x in (grad, q, k, v))
    states = _matmul(q_c.transpose(2, 3), grad_c)
    summary = states.sum(1).reshape(*q.shape[:2], q.shape[3], grad.shape[3])
    return Backward(grad_c, q_c, k_c, v_c, states), summary


def backward_local(b: Backward, carry: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The part that needs no later rank: dq whole, intra-chunk dk and dv, and the states after each chunk.

    ``carry`` is the forward's: the memory state before this rank's first token.
    """
    grad_scores = (_matmul(b.grad, b.v.transpose(2, 3)) * scale).tril()
    scores = (_matmul(b.q, b.k.transpose(2, 3)) * scale).tril()
    before = _with_carry(exclusive_sum(_matmul(b.k.transpose(2, 3), b.v)), carry) * scale
    dq = _matmul(grad_scores, b.k) + _matmul(b.grad, before.transpose(2, 3))
    dk = _matmul(grad_scores.transpose(2, 3), b.q)
    dv = _matmul(scores.transpose(2, 3), b.grad)
    return dq, dk, dv, exclusive_sum(b.states, reverse=True)


def backward_finish(
    b: Backward, dk: Tensor, dv: Tensor, after: Tensor, carry: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Add to dk and dv what the chunks after each chunk, and the later ranks (``carry``), contribute."""
    after = _with_carry(after, carry) * scale
    return dk + _matmul(b.v, after.transpose(2, 3)), dv + _matmul(b.k, after)


def causal_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal linear attention of whole tensors on one device (the steps above with nothing carried in)."""
    f, _ = forward_start(q, k, v)
    intra, before = forward_local(f, scale)
    return forward_finish(f, intra, before, None, scale, q)


def causal_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`causal_forward`."""
    b, _ = backward_start(grad, q, k, v)
    dq, dk, dv, after = backward_local(b, None, scale)
    dk, dv = backward_finish(b, dk, dv, after, None, scale)
    return unchunked(dq, q), unchunked(dk, k), unchunked(dv, v)
