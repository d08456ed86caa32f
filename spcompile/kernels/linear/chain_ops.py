"""The chain of chunks as operators: what all of them do together, and the states before each.

``transitions`` are A of ``chunk_states``: ``[0]``, which is 1; sums of log decays ``[N, n, 1 or K]``; or, if
``matrix``, ``[N, n, K, K]``. ``reverse`` is the chain from the last chunk to the first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.kernels.scan import own_dtypes, scan

__all__ = ["chunk_chain", "chunk_total"]


@torch.library.custom_op("spcompile::chunk_total", mutates_args=())
def chunk_total(states: Tensor, transitions: Tensor, matrix: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """(A, S) of all chunks together, S_after = A S_before + S.

    Args:
        states: S of each chunk, ``[N, n, K, V]``.
    Returns:
        A ``[0]``, sums of log decays ``[N, 1 or K, 1]``, or a matrix ``[N, K, K]``; S ``[N, K, V]``.
    """
    with own_dtypes(states):
        if transitions.dim() == 1:
            return transitions.new_empty(0), states.sum(1)
        if matrix:
            k, v = states.shape[-2:]
            start = states.new_zeros(states.shape[0], k, v + k)
            start[..., v:].diagonal(dim1=1, dim2=2).fill_(1)
            _, both = scan(transitions, F.pad(states, (0, k)), start, True, reverse)
            return both[..., v:].contiguous(), both[..., :v].contiguous()
        logs = transitions.unsqueeze(-1)
        order = logs if reverse else logs.flip(1)
        # Of each chunk the decays of those that it goes through afterwards, and not its own.
        beyond = F.pad(order.cumsum(1)[:, :-1], (0, 0, 0, 0, 1, 0))
        beyond = (beyond if reverse else beyond.flip(1)).exp()
        return logs.sum(1), (beyond * states).sum(1)


@chunk_total.register_fake
def _(states: Tensor, transitions: Tensor, matrix: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    n, _, k, v = states.shape
    shape = (0,) if transitions.dim() == 1 else (n, k, k) if matrix else (n, transitions.shape[2], 1)
    return states.new_empty(shape), states.new_empty(n, k, v)


@torch.library.custom_op("spcompile::chunk_chain", mutates_args=())
def chunk_chain(
    states: Tensor, transitions: Tensor, start: Tensor | None, matrix: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The states ``[N, n, K, V]`` before each chunk, and the one ``[N, K, V]`` after the last.

    Args:
        states: S of each chunk, ``[N, n, K, V]``.
        start: the state before the first chunk, ``[N, K, V]``; None: zero.
    """
    with own_dtypes(states):
        if matrix:
            return scan(transitions, states, start, True, reverse)
        a = None if transitions.dim() == 1 else transitions.unsqueeze(-1).exp()
        return scan(a, states, start, False, reverse)


@chunk_chain.register_fake
def _(
    states: Tensor, transitions: Tensor, start: Tensor | None, matrix: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    n, _, k, v = states.shape
    return states.new_empty(states.shape), states.new_empty(n, k, v)
