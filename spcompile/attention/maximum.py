"""``spcompile::max_scan``, S_t = max(S_{t-1} + a_t, b_t): schema, kernel, fake and autograd.

A running maximum keeps the exponents of a recurrence small (RWKV-4, mLSTM). It is an affine scan over
(max, +) in place of (+, *), and what it stabilises is affine once it is known.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spcompile.kernels.scan import own_dtypes, state_dtype

__all__ = ["max_scan"]


def _check(a: Tensor | None, b: Tensor, initial: Tensor | None) -> None:
    if b.dim() < 3 or not b.dtype.is_floating_point:
        raise ValueError(f"max_scan: b {list(b.shape)} of {b.dtype}, expected floats [..., steps, K, V]")
    if a is not None and (a.dim() != b.dim() or any(x not in (1, y) for x, y in zip(a.shape, b.shape))):
        raise ValueError(f"max_scan: a {list(a.shape)} does not broadcast to b {list(b.shape)}")
    state = (*b.shape[:-3], *b.shape[-2:])
    if initial is not None and initial.shape != state:
        raise ValueError(f"max_scan: initial_state is {list(initial.shape)}, not {list(state)}")


def _doubled(a: Tensor | None, b: Tensor, reverse: bool) -> Tensor:
    """The states after each step: each round composes every run of steps with the one before it, as long."""
    steps, width = b.shape[-3], 1
    while width < steps:
        late, early = (0, width) if reverse else (width, 0)
        size = steps - width
        before, own = b.narrow(-3, early, size), b.narrow(-3, late, size)
        constant = a is None or a.shape[-3] == 1
        if a is not None:
            before = before + (a if constant else a.narrow(-3, late, size))
        met, kept = torch.maximum(before, own), b.narrow(-3, size if reverse else 0, width)
        b = torch.cat([met, kept] if reverse else [kept, met], -3)
        if a is not None and constant:
            a = a + a
        elif a is not None:
            met = a.narrow(-3, 0, size) + a.narrow(-3, width, size)
            kept = a.narrow(-3, size if reverse else 0, width)
            a = torch.cat([met, kept] if reverse else [kept, met], -3)
        width *= 2
    return b


@torch.library.custom_op("spcompile::max_scan", mutates_args=())
def max_scan(
    a: Tensor | None, b: Tensor, initial_state: Tensor | None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The states of S_t = max(S_{t-1} + a_t, b_t), along dim -3, in log2(T) rounds over all steps.

    Args:
        a: None (0), or broadcastable to b, with as many dims; below inf.
        b: ``[*L, T, K, V]``, any float dtype.
        initial_state: S_0, ``[*L, K, V]``; None: -inf.
        reverse: the last step comes first.
    Returns:
        before ``[*L, T, K, V]``, the state before each step, and final ``[*L, K, V]``, in b's dtype; computed
        in float32 if that is narrower. Of equals each gets half of the gradient, as of ``torch.maximum``.
    Raises:
        ValueError: shapes that disagree.
    Source: Hillis and Steele, "Data parallel algorithms", CACM 29 (1986).
    """
    _check(a, b, initial_state)
    with own_dtypes(b):
        wide = state_dtype(b.dtype)
        x, added = b.to(wide), None if a is None else a.to(wide)
        start = x.new_full((*b.shape[:-3], 1, *b.shape[-2:]), -math.inf)
        if initial_state is not None:
            start.copy_(initial_state.unsqueeze(-3))
        # The state before the first step is one more, which nothing comes before.
        x = torch.cat([x, start] if reverse else [start, x], -3)
        if added is not None and added.shape[-3] > 1:
            nothing = torch.zeros_like(added.narrow(-3, 0, 1))
            added = torch.cat([added, nothing] if reverse else [nothing, added], -3)
        after = _doubled(added, x, reverse).to(b.dtype)
        steps = b.shape[-3]
        before, final = after.narrow(-3, int(reverse), steps), after.select(-3, 0 if reverse else steps)
        return before.clone(memory_format=torch.contiguous_format), final.clone(
            memory_format=torch.contiguous_format
        )


@max_scan.register_fake
def _(
    a: Tensor | None, b: Tensor, initial_state: Tensor | None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    _check(a, b, initial_state)
    return b.new_empty(b.shape), b.new_empty(*b.shape[:-3], *b.shape[-2:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, initial_state, ctx.reverse = inputs
    ctx.set_materialize_grads(False)
    ctx.with_initial = initial_state is not None
    ctx.save_for_backward(a, b, output[0])


def _gradients(ctx: Any, grad: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
    """With R_t the gradient of the state after step t and p_t = [S_{t-1} + a_t > b_t] (a half if equal),
    R_{t-1} = p_t R_t + grad_t, da_t = p_t R_t and db_t = (1 - p_t) R_t."""
    a, b, before = ctx.saved_tensors
    if grad is None and grad_final is None:
        return None, None, None, None
    passed = before if a is None else before + a
    share = torch.where(passed > b, 1.0, torch.where(passed == b, 0.5, 0.0)).to(b.dtype)
    grad = torch.zeros_like(before) if grad is None else grad
    grad_final = None if grad_final is None else grad_final.contiguous()
    after, initial = torch.ops.spcompile.affine_scan(share, grad, grad_final, False, not ctx.reverse)
    kept = after * share
    grad_a = None if a is None else kept.sum_to_size(a.shape).to(a.dtype)
    return grad_a, after - kept, initial if ctx.with_initial else None, None


max_scan.register_autograd(_gradients, setup_context=_save)
