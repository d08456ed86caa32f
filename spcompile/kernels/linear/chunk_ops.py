"""What chunks of tokens do (``chunk_math.py``) as operators, with their fake results.

Operands are ``[B, H, T, *]`` of any strides and dtype, as in ``spcompile::linear_attention``; log decays
broadcast to them. What is between the operators is in chunks ``[N, n, ...]``, N = B*H and n chunks of C
tokens in the order of time, in the state dtype; ``[0]`` for what there is not.

Inductor calls an operator as it is, so a layer compiles in the time that it takes to call it. Inside, a few
chunks at a time go through all of the formulas: what is between these stays in the processor's cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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


def _parts(x: Maybe, chunk: int, reverse: bool) -> Maybe:
    """Tokens ``[B, H, T, D]`` as chunks ``[B, H, n, C, D]`` in the order of time: a view, if that can be."""
    if x is None:
        return None
    if not reverse and x.shape[2] % chunk == 0:
        return x.unflatten(2, (-1, chunk))
    return cut(x, chunk, reverse).unflatten(0, x.shape[:2])


def _decay(log_decay: Maybe, k: Tensor, chunk: int, reverse: bool) -> Maybe:
    if log_decay is None:
        return None
    return _parts(log_decay.expand(*k.shape[:3], log_decay.shape[3]), chunk, reverse)


def _apart(x: Maybe, like: Tensor) -> Maybe:
    """``[N, n, ...]`` as ``[B, H, n, ...]``; None and ``[0]`` as None."""
    return None if x is None or x.dim() == 1 else x.unflatten(0, like.shape[:2])


def _count(x: Tensor, chunk: int) -> tuple[Any, Any]:
    """N and n."""
    return x.shape[0] * x.shape[1], (x.shape[2] + chunk - 1) // chunk


def _run(function: Callable[..., tuple[Maybe, ...]], operands: Sequence[Maybe], to: Sequence[Maybe]) -> None:
    """``function`` of some chunks at a time; operands and what its results go to are ``[B, H, n, ...]``."""
    first = next(x for x in operands if x is not None)
    (b, h, n, chunk, size), wide = first.shape, state_dtype(first.dtype)
    step = max(1, _TOGETHER // (chunk * size))
    steps = max(1, step // max(1, n * h)), max(1, step // max(1, n)), step
    starts = (range(0, count, few) for count, few in zip((b, h, n), steps, strict=True))
    for start in itertools.product(*starts):
        at = tuple(slice(x, x + few) for x, few in zip(start, steps, strict=True))
        results = function(*(None if x is None else x[at].flatten(0, 2).to(wide) for x in operands))
        for out, x in zip(to, results, strict=True):
            if out is not None and x is not None:
                out[at] = x.unflatten(0, out[at].shape[:3])


class _Tokens:
    """A result in tokens, which comes in chunks.

    Args:
        whole: what it goes to, ``[B, H, T, D]``, or what it is to be summed up to; None: there is none.
        k: says what B, H and T are.
    """

    def __init__(self, whole: Maybe, k: Tensor, chunk: int, reverse: bool) -> None:
        self.whole, self.k, self.reverse = whole, k, reverse
        self.chunks = self.direct = None
        if whole is None:
            return
        shape = *k.shape[:2], _count(k, chunk)[1], chunk, whole.shape[3]
        if not reverse and k.shape[2] % chunk == 0 and whole.shape[:3] == k.shape[:3]:
            self.chunks = self.direct = whole.view(shape)
        else:
            self.chunks = whole.new_empty(shape, dtype=state_dtype(k.dtype))

    def get(self) -> Tensor:
        """The result, when all chunks have been written."""
        if self.whole is None or self.chunks is None:
            return self.k.new_empty(0)
        if self.direct is None:
            tokens = uncut(self.chunks.flatten(0, 1), self.k, self.reverse)
            self.whole.copy_(tokens.sum_to_size(self.whole.shape))
        return self.whole


def _gradient(operand: Maybe, k: Tensor, chunk: int, reverse: bool) -> _Tokens:
    """Where the gradient of an operand goes."""
    whole = None if operand is None else k.new_empty(operand.shape, dtype=operand.dtype)
    return _Tokens(whole, k, chunk, reverse)


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
        results = _states(k, v, log_decay, beta, chunk)
        tokens = _parts(k, chunk, reverse), _parts(v, chunk, reverse)
        operands = *tokens, _decay(log_decay, k, chunk, reverse), _parts(beta, chunk, reverse)
        _run(chunk_math.states, operands, [_apart(x, k) for x in results])
        return results


@chunk_states.register_fake
def _(
    k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, chunk: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _states(k, v, log_decay, beta, chunk)


def _states(k: Tensor, v: Tensor, log_decay: Maybe, beta: Maybe, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
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

        results = _reads(k, v, chunk)
        operands = *_tokens(q, k, v, written, chunk, reverse), _decay(log_decay, k, chunk, reverse)
        _run(function, operands, [_apart(x, k) for x in results])
        return results


def _tokens(
    q: Tensor, k: Tensor, v: Tensor, written: Tensor, chunk: int, reverse: bool
) -> tuple[Maybe, Maybe, Maybe]:
    """Queries, keys and what is written, in chunks."""
    u = _parts(v, chunk, reverse) if written.dim() == 1 else _apart(written, k)
    return _parts(q, chunk, reverse), _parts(k, chunk, reverse), u


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
    return _reads(k, v, chunk)


def _reads(k: Tensor, v: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    n, wide = _count(k, chunk), state_dtype(k.dtype)
    sizes = v.shape[3], k.shape[3]
    intra, queries = (k.new_empty(*n, chunk, x, dtype=wide) for x in sizes)
    return intra, queries


@torch.library.custom_op("spcompile::chunk_outputs", mutates_args=())
def chunk_outputs(intra: Tensor, queries: Tensor, before: Tensor, like: Tensor, reverse: bool) -> Tensor:
    """intra + queries S_before, ``[B, H, T, V]`` in the dtype and with the B, H and T of ``like``."""
    with own_dtypes(intra):
        to = _Tokens(_outputs(intra, like), like, intra.shape[2], reverse)
        operands = [_apart(x, like) for x in (intra, queries, before)]
        _run(lambda *x: (torch.baddbmm(*x),), operands, [to.chunks])
        return to.get()


def _outputs(intra: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(*like.shape[:3], intra.shape[3])


@chunk_outputs.register_fake
def _(intra: Tensor, queries: Tensor, before: Tensor, like: Tensor, reverse: bool) -> Tensor:
    return _outputs(intra, like)


@torch.library.custom_op("spcompile::chunk_sources", mutates_args=())
def chunk_sources(queries: Tensor, grad: Tensor, reverse: bool) -> Tensor:
    """What each chunk adds to the gradient of the state, ``queries^T grad`` ``[N, n, K, V]``.

    Args:
        queries: of :func:`chunk_within`.
        grad: of the outputs, ``[B, H, T, V]``.
    """
    with own_dtypes(queries):
        sources = _sources(queries, grad)
        operands = _apart(queries, grad), _parts(grad, queries.shape[2], reverse)
        _run(lambda q, x: (q.mT @ x,), operands, [_apart(sources, grad)])
        return sources


def _sources(queries: Tensor, grad: Tensor) -> Tensor:
    return queries.new_empty(*queries.shape[:2], queries.shape[3], grad.shape[3])


@chunk_sources.register_fake
def _(queries: Tensor, grad: Tensor, reverse: bool) -> Tensor:
    return _sources(queries, grad)


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

        dq, results = _gradient(q, k, chunk, reverse), _known(k, v, log_decay, written, chunk)
        tokens = *_tokens(q, k, v, written, chunk, reverse), _decay(log_decay, k, chunk, reverse)
        operands = _parts(grad, chunk, reverse), _apart(before, k), *tokens
        _run(function, operands, [dq.chunks, *(_apart(x, k) for x in results)])
        return dq.get(), *results


def _known(
    k: Tensor, v: Tensor, log_decay: Maybe, written: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    n, wide = _count(k, chunk), state_dtype(k.dtype)
    gate = (0,) if log_decay is None else (*n, chunk, log_decay.shape[3])
    size = (written if written.dim() > 1 else v).shape[3]
    shapes = (*n, chunk, k.shape[3]), gate, (*n, chunk, size)
    dk, dg, of_written = (k.new_empty(x, dtype=wide) for x in shapes)
    return dk, dg, of_written


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
    return q.new_empty(q.shape), *_known(k, v, log_decay, written, chunk)


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
        tokens = _parts(k, chunk, reverse), _parts(v, chunk, reverse), _decay(log_decay, k, chunk, reverse)
        known = (_apart(x, k) for x in (written, before, after, dk, dg, of_written))
        to = [_gradient(x, k, chunk, reverse) for x in (k, v, log_decay, beta)]
        operands = *tokens, _parts(beta, chunk, reverse), *known
        _run(chunk_math.states_backward, operands, [x.chunks for x in to])
        return to[0].get(), to[1].get(), to[2].get(), to[3].get()


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
