"""The sharded forward and backward of linear attention, and of scans, for every strategy and kernel.

Linear, causal: summary -> exchange -> apply. The intra-chunk work needs no other rank and stands between the
start of the exchange and what it brings. Not causal: one all-reduce each way.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.attention.algebra import AFFINE, BASIC, MATRIX, MAXIMUM, StateAlgebra, Summary, algebra_of
from spcompile.collectives import Sequence, local_valid
from spcompile.kernels.linear.kernel import Backward, Forward, kernel_of
from spcompile.kernels.linear.operands import Operands, Options
from spcompile.kernels.scan import state_dtype
from spcompile.strategies.exchange import Alone, Exchange, StartExchange, Summed
from spcompile.strategies.masking import masked, others

__all__ = ["backward", "forward", "scan"]


def forward(
    x: Operands, options: Options, sequence: Sequence | None, start: StartExchange
) -> tuple[Tensor, Tensor, Tensor | None]:
    """This rank's rows of the output, the state after the last token, and ``carry`` for the backward.

    Args:
        x: operands of this rank's ``block`` tokens; the initial state is the whole sequence's.
        start: the strategy.
    Returns:
        out ``[B, H, block, V]`` in q's dtype; final ``[B, H, K, V]`` in float32 (float64), alike on all
        ranks; carry, the state before this rank's first token, or of the whole sequence if not causal. None
        is zero.
    """
    given, x = x, _tokens_only(x, sequence)
    run = kernel_of(x, options).forward(x, options)
    exchange = _started(run, given, x.initial_state, options, sequence, start, later=options.reverse)
    run.local()
    carry = exchange.carry()
    out, own = run.finish(carry)
    final = exchange.final()
    return out, own if final is None else final, carry


def backward(
    grad: Tensor,
    grad_final: Tensor | None,
    x: Operands,
    options: Options,
    carry: Tensor | None,
    sequence: Sequence | None,
    start: StartExchange,
) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, None for those that are None.

    Those of this rank's tokens; of a constant decay this rank's *term*; of the initial state the whole.
    """
    given, x = x, _tokens_only(x, sequence)
    (grad,) = masked(sequence, 2, grad)
    run = kernel_of(x, options).backward(x, options, grad, carry)
    exchange = _started(run, given, grad_final, options, sequence, start, later=not options.reverse)
    run.local()
    *tokens, decay, beta, initial = run.finish(exchange.carry())
    if decay is not None:
        assert given.log_decay is not None
        (decay,) = masked(sequence, 2, decay)  # a gate that padding does not have gets no gradient
        decay = decay.sum_to_size(given.log_decay.shape).to(given.log_decay.dtype)
    if initial is not None:
        final = exchange.final()
        initial = initial if final is None else final.to(initial.dtype)
    return *tokens, decay, beta, initial


def _started(
    run: Forward | Backward,
    given: Operands,
    initial: Tensor | None,
    options: Options,
    sequence: Sequence | None,
    start: StartExchange,
    later: bool,
) -> Exchange:
    """The exchange of what ``run`` does, from the state (or gradient) ``initial`` outside of all tokens."""
    group = others(sequence)
    if not options.causal:
        return Summed(run.total(), group, initial)
    if group is None:
        return Alone(initial)
    assert sequence is not None
    wide = None if initial is None else initial.to(state_dtype(given.k.dtype))
    return start(algebra_of(given), run.total(), group, wide, _known_decay(given, sequence), later)


def _known_decay(x: Operands, sequence: Sequence) -> Tensor | None:
    """Sums of a constant log decay over each rank's tokens, ``[P, B, H, 1 or K, 1]``; None if it is none."""
    log_decay = x.log_decay
    if log_decay is None or log_decay.shape[2] != 1 or sequence.block == 1 or x.beta is not None:
        return None  # (with one token per rank, a decay per token has the shape of a constant one)
    block, ranks = sequence.block, torch.arange(sequence.group.size, device=log_decay.device)
    tokens = (sequence.length - ranks * block).clamp(0, block).reshape(-1, 1, 1, 1, 1)
    log_decay = log_decay.expand(*x.k.shape[:2], 1, -1).mT.to(state_dtype(x.k.dtype))
    return torch.where(tokens > 0, tokens * log_decay, 0.0)  # 0 * -inf is no decay


def _tokens_only(x: Operands, sequence: Sequence | None) -> Operands:
    """The operands with padding that does nothing to the state: no key, no value, no decay."""
    if x.log_decay is not None:
        decay = x.log_decay.to(state_dtype(x.k.dtype))
        x = x._replace(log_decay=decay.expand(*x.k.shape[:3], decay.shape[3]))
    given = [y for y in x[:5] if y is not None]
    fresh = iter(masked(sequence, 2, *given))
    fields = ("q", "k", "v", "log_decay", "beta")
    return x._replace(**{name: next(fresh) for name, y in zip(fields, x, strict=False) if y is not None})


def scan(
    a: Tensor | None,
    b: Tensor,
    initial: Tensor | None,
    *,
    matrix: bool | None,
    reverse: bool,
    sequence: Sequence | None,
    start: StartExchange,
) -> tuple[Tensor, Tensor]:
    """``affine_scan`` of this rank's steps, or ``max_scan`` (matrix is None), with one exchange; the final
    state is alike on all ranks."""
    group = others(sequence)
    if group is not None:
        assert sequence is not None
        a, b = _steps_only(a, b, matrix, sequence)
        exchange = start(*_scanned(a, b, matrix, reverse), group, initial, None, reverse)
        initial = exchange.carry()
    before, final = _run(a, b, initial, matrix, reverse)
    if group is not None:
        whole = exchange.final()
        assert whole is not None
        final = whole
    return before, final


def _run(
    a: Tensor | None, b: Tensor, initial: Tensor | None, matrix: bool | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    if matrix is None:
        return torch.ops.spcompile.max_scan(a, b, initial, reverse)
    return torch.ops.spcompile.affine_scan(a, b, initial, matrix, reverse)


def _scanned(a: Tensor | None, b: Tensor, matrix: bool | None, reverse: bool) -> tuple[StateAlgebra, Summary]:
    """What all steps together do to the state."""
    if a is None:
        return BASIC, (b.sum(-3),)
    if not matrix:
        algebra, factor = (MAXIMUM, a.sum(-3)) if matrix is None else (AFFINE, a.prod(-3))
        return algebra, (factor, _run(a, b, None, matrix, reverse)[1])
    size, width = b.shape[-2:]
    eye = torch.eye(size, dtype=b.dtype, device=b.device).expand(*b.shape[:-3], size, size)
    begin = torch.cat([torch.zeros_like(b[..., 0, :, :]), eye], -1)
    total = _run(a, F.pad(b, (0, size)), begin, True, reverse)[1]
    return MATRIX, (total[..., width:], total[..., :width])


def _steps_only(
    a: Tensor | None, b: Tensor, matrix: bool | None, sequence: Sequence
) -> tuple[Tensor | None, Tensor]:
    """The operands of a scan with padding that leaves the state as it is; a with its own step each."""
    if a is None and matrix is None:
        a = b.new_zeros([1] * b.dim())
    if a is not None and a.shape[-3] == 1:
        a = a.expand(*a.shape[:-3], b.shape[-3], *a.shape[-2:])
    if not sequence.padded:
        return a, b
    valid = local_valid(sequence, b.device).reshape(-1, 1, 1)
    b = torch.where(valid, b, -math.inf if matrix is None else 0.0)
    if a is not None:
        one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) if matrix else a.new_ones(())
        a = torch.where(valid, a, torch.zeros_like(one) if matrix is None else one)
    return a, b
