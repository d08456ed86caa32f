"""What chunks of tokens do (``chunk_math.py``) as operators, with their fake results.

Operands are ``[B, H, T, *]`` of any strides and dtype, as in ``spcompile::linear_attention``; log decays
broadcast to them. What is between the operators is in chunks ``[N, n, ...]``, N = B*H and n chunks of C
tokens in the order of time, in the state dtype; ``[0]`` for what there is not.

Inductor calls an operator as it is, so a layer compiles in the time that it takes to call it. Inside, a few
chunks at a time go through all of the formulas: what is between these stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spcompile.kernels.linear import chunk_math
from spcompile.kernels.linear.chunked import cut, uncut
from spcompile.kernels.scan import own_dtypes, state_dtype

__all__ = [
    "chunk_outputs",
    "chunk_sources",
    "chunk_states",
    "chunk_states_backward",
    "chunk_within",
    "chunk_within_backward",
]

# Numbers of an operand that go through the formulas together: 64 chunks of 64 tokens with keys of 64. CPU
# milliseconds of the scores of a decay per key and their gradients, T = 4096 and H*K = 512, for 512 such
# chunks at once, 64 and 16: 49, 31, 37.
_TOGETHER = 2**18

Maybe: TypeAlias = Tensor | None


def _given(x: Tensor) -> Maybe:
    """A result that another operator gave, None if it is ``[0]``."""
    return x if x.dim() > 1 else None


def _flat(x: Maybe, chunk: int, reverse: bool) -> Maybe:
    """Tokens ``[B, H, T, D]`` as chunks ``[M, C, D]``, M = N n."""
    return None if x is None else cut(x, chunk, reverse).flatten(0, 1).contiguous()


def _decay(log_decay: Maybe, k: Tensor, chunk: int, reverse: bool) -> Maybe:
    if log_decay is None:
        return None
    return _flat(log_decay.expand(*k.shape[:3], log_decay.shape[3]), chunk, reverse)


def _merged(x: Maybe) -> Maybe:
    """``[N, n, ...]`` as ``[M, ...]``."""
    return None if x is None else x.flatten(0, 1)


def _count(x: Tensor, chunk: int) -> tuple[Any, Any]:
    """N and n."""
    return x.shape[0] * x.shape[1], (x.shape[2] + chunk - 1) // chunk


def _run(function: Callable[..., tuple[Maybe, ...]], *operands: Maybe) -> list[Maybe]:
    """``function`` of some chunks at a time, its results put together; operands are ``[M, ...]`` or None."""
    count, chunk, size = next(x for x in operands if x is not None).shape
    step = max(1, _TOGETHER // (chunk * size))
    whole: list[Maybe] = []
    for start in range(0, count, step):
        part = slice(start, start + step)
        results = function(*(None if x is None else x[part] for x in operands))
        whole = whole or [None if x is None else x.new_empty(count, *x.shape[1:]) for x in results]
        for to, x in zip(whole, results, strict=True):
            if to is not None and x is not None:
                to[part] = x
    return whole


def _apart(x: Maybe, like: Tensor, chunk: int) -> Tensor:
    """``[M, ...]`` as ``[N, n, ...]``; None as ``[0]``."""
    if x is None:
        return like.new_empty(0, dtype=state_dtype(like.dtype))
    return x.reshape(*_count(like, chunk), *x.shape[1:])


@torch.library.custom_op("spcompile::chunk_states", mutates_args=())
def chunk_states(
    k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, chunk: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What each chunk does to the state, S_after = A S_before + B.

    Args:
        chunk: C, a power of two.
        reverse: time runs from the last token to the first.
    Returns:
        B ``[N, n, K, V]``; A as sums of log decays ``[N, n, 1 or K]``, as a matrix ``[N, n, K, K]`` with
        ``beta``, or ``[0]``, which is 1; and with ``beta`` what each token writes, ``[N, n, C, V + K]``, u
        beside w, else ``[0]``.
    """
    with own_dtypes(k):
        tokens = _flat(k, chunk, reverse), _flat(v, chunk, reverse)
        rest = _decay(log_decay, k, chunk, reverse), _flat(beta, chunk, reverse)
        states, transitions, written = (_apart(x, k, chunk) for x in _run(chunk_math.states, *tokens, *rest))
        return states, transitions, written


@chunk_states.register_fake
def _(
    k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, chunk: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, size, values = _count(k, chunk), k.shape[3], v.shape[3]
    wide = state_dtype(k.dtype)
    a = (0,) if log_decay is None else (*n, log_decay.shape[3])
    shapes = (*n, size, values), (*n, size, size) if beta is not None else a
    written = (0,) if beta is None else (*n, chunk, values + size)
    states, transitions, writes = (k.new_empty(x, dtype=wide) for x in (*shapes, written))
    return states, transitions, writes


@torch.library.custom_op("spcompile::chunk_within", mutates_args=())
def chunk_within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    written: Tensor,
    scale: float,
    chunk: int,
    exclusive: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """What tokens read, intra + queries S_before.

    Args:
        written: of :func:`chunk_states`.
    Returns:
        intra ``[N, n, C, V]`` and queries ``[N, n, C, K]``.
    """
    with own_dtypes(k):
        size = v.shape[3]

        def function(q: Tensor, k: Tensor, u: Tensor, g: Maybe) -> tuple[Tensor, Tensor]:
            return chunk_math.within(q * scale, k, u, g, size, exclusive)

        given = _tokens(q, k, v, written, chunk, reverse)
        results = _run(function, *given, _decay(log_decay, k, chunk, reverse))
        intra, queries = (_apart(x, k, chunk) for x in results)
        return intra, queries


def _tokens(
    q: Tensor, k: Tensor, v: Tensor, written: Tensor, chunk: int, reverse: bool
) -> tuple[Maybe, Maybe, Maybe]:
    """Queries, keys and what is written, ``[M, C, *]``."""
    u = _merged(_given(written))
    return _flat(q, chunk, reverse), _flat(k, chunk, reverse), _flat(v, chunk, reverse) if u is None else u


@chunk_within.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    written: Tensor,
    scale: float,
    chunk: int,
    exclusive: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    n, wide = _count(k, chunk), state_dtype(k.dtype)
    sizes = v.shape[3], k.shape[3]
    intra, queries = (k.new_empty(*n, chunk, x, dtype=wide) for x in sizes)
    return intra, queries


@torch.library.custom_op("spcompile::chunk_outputs", mutates_args=())
def chunk_outputs(intra: Tensor, queries: Tensor, before: Tensor, like: Tensor, reverse: bool) -> Tensor:
    """intra + queries S_before, ``[B, H, T, V]`` in the dtype and with the B, H and T of ``like``."""
    with own_dtypes(intra):
        flat = (x.flatten(0, 1) for x in (intra, queries, before))
        out = torch.baddbmm(*flat).reshape(intra.shape)
        return _tokens_of(out, like, reverse)


def _tokens_of(x: Tensor, like: Tensor, reverse: bool) -> Tensor:
    """Chunks as tokens in the dtype of ``like``, in memory of their own."""
    x = uncut(x, like, reverse)
    out = torch.empty(x.shape, dtype=like.dtype, device=x.device)
    return out.copy_(x)


@chunk_outputs.register_fake
def _(intra: Tensor, queries: Tensor, before: Tensor, like: Tensor, reverse: bool) -> Tensor:
    return like.new_empty(*like.shape[:3], intra.shape[3])


@torch.library.custom_op("spcompile::chunk_sources", mutates_args=())
def chunk_sources(queries: Tensor, grad: Tensor, reverse: bool) -> Tensor:
    """What each chunk adds to the gradient of the state, ``queries^T grad`` ``[N, n, K, V]``.

    Args:
        queries: of :func:`chunk_within`.
        grad: of the outputs, ``[B, H, T, V]``.
    """
    with own_dtypes(queries):
        grads = cut(grad, queries.shape[2], reverse)
        return (queries.mT @ grads.to(queries.dtype)).contiguous()


@chunk_sources.register_fake
def _(queries: Tensor, grad: Tensor, reverse: bool) -> Tensor:
    return queries.new_empty(*queries.shape[:2], queries.shape[3], grad.shape[3])


@torch.library.custom_op("spcompile::chunk_within_backward", mutates_args=())
def chunk_within_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    written: Tensor,
    before: Tensor,
    scale: float,
    chunk: int,
    exclusive: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients that need no gradient of the state.

    Args:
        grad: of the outputs, ``[B, H, T, V]``.
        before: the states before the chunks, ``[N, n, K, V]``.
    Returns:
        dq, like q; what is known of dk and of the gradient of ``log_decay``, ``[N, n, C, *]`` or ``[0]``;
        that of what is written, of v if that is ``[0]``.
    """
    with own_dtypes(k):

        def function(
            grad: Tensor, before: Tensor, q: Tensor, k: Tensor, u: Tensor, g: Maybe
        ) -> tuple[Maybe, ...]:
            given = grad, before, q * scale, k, u, g
            dq, *others = chunk_math.within_backward(*given, exclusive)
            return dq.mul_(scale), *others

        given = _flat(grad, chunk, reverse), _merged(before.to(state_dtype(k.dtype)))
        tokens = _tokens(q, k, v, written, chunk, reverse)
        dq, *others = _run(function, *given, *tokens, _decay(log_decay, k, chunk, reverse))
        assert dq is not None
        dk, dg, of_written = (_apart(x, k, chunk) for x in others)
        return _tokens_of(dq, q, reverse), dk, dg, of_written


@chunk_within_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    written: Tensor,
    before: Tensor,
    scale: float,
    chunk: int,
    exclusive: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, wide = _count(k, chunk), state_dtype(k.dtype)
    gate = (0,) if log_decay is None else (*n, chunk, log_decay.shape[3])
    size = (written if written.dim() > 1 else v).shape[3]
    shapes = (*n, chunk, k.shape[3]), gate, (*n, chunk, size)
    dk, dg, of_written = (k.new_empty(x, dtype=wide) for x in shapes)
    return q.new_empty(q.shape), dk, dg, of_written


@torch.library.custom_op("spcompile::chunk_states_backward", mutates_args=())
def chunk_states_backward(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    written: Tensor,
    before: Tensor,
    after: Tensor,
    dk: Tensor,
    dg: Tensor,
    of_written: Tensor,
    chunk: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of k, v, ``log_decay`` and beta, like these, or ``[0]``.

    Args:
        before: the states before the chunks, ``[N, n, K, V]``.
        after: the gradients of the states after the chunks, ``[N, n, K, V]``.
        dk, dg, of_written: of :func:`chunk_within_backward`.
    """
    with own_dtypes(k):
        pairs = _flat(k, chunk, reverse), _flat(v, chunk, reverse)
        tokens = *pairs, _decay(log_decay, k, chunk, reverse), _flat(beta, chunk, reverse)
        known = (_merged(_given(x)) for x in (written, before, after, dk, dg, of_written))
        grads = _run(chunk_math.states_backward, *tokens, *known)
        found = []
        for operand, grad in zip((k, v, log_decay, beta), grads, strict=True):
            if operand is None or grad is None:
                found.append(k.new_empty(0))
                continue
            grad = uncut(grad, k, reverse).sum_to_size(operand.shape)
            found.append(torch.empty(operand.shape, dtype=operand.dtype, device=k.device).copy_(grad))
        return found[0], found[1], found[2], found[3]


@chunk_states_backward.register_fake
def _(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    written: Tensor,
    before: Tensor,
    after: Tensor,
    dk: Tensor,
    dg: Tensor,
    of_written: Tensor,
    chunk: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [k.new_empty(0) if x is None else x.new_empty(x.shape) for x in (k, v, log_decay, beta)]
    return grads[0], grads[1], grads[2], grads[3]
