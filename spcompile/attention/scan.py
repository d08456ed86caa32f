"""``spcompile::affine_scan``, S_t = a_t S_{t-1} + b_t: schema, kernel, fake and autograd.

A recurrence of a user's own that is affine in its state becomes this operator; linear attention chains its
chunks with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spcompile.kernels import scan

__all__ = ["affine_scan"]


def _check(a: Tensor | None, b: Tensor, initial: Tensor | None, matrix: bool) -> None:
    if b.dim() < 3:
        raise ValueError(f"affine_scan: b {list(b.shape)}, expected [..., steps, K, V]")
    if matrix and (a is None or a.shape != (*b.shape[:-1], b.shape[-2])):
        raise ValueError(f"affine_scan: a is {a if a is None else list(a.shape)}, b {list(b.shape)}")
    sizes = zip(a.shape, b.shape) if a is not None and a.dim() == b.dim() else [(0, 1)]
    if a is not None and not matrix and any(x not in (1, y) for x, y in sizes):
        raise ValueError(f"affine_scan: a {list(a.shape)} does not broadcast to b {list(b.shape)}")
    state = (*b.shape[:-3], *b.shape[-2:])
    if initial is not None and initial.shape != state:
        raise ValueError(f"affine_scan: initial_state is {list(initial.shape)}, not {list(state)}")


@torch.library.custom_op("spcompile::affine_scan", mutates_args=())
def affine_scan(
    a: Tensor | None, b: Tensor, initial_state: Tensor | None, matrix: bool, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The states of S_t = a_t S_{t-1} + b_t, along dim -3.

    Args:
        a: None (1); or broadcastable to b, with as many dims, multiplied elementwise; or, if ``matrix``,
            ``[*L, T, K, K]``, multiplied from the left.
        b: ``[*L, T, K, V]``, any float or complex dtype.
        initial_state: S_0, ``[*L, K, V]``; None: zero.
        reverse: the last step comes first.
    Returns:
        before ``[*L, T, K, V]``, the state before each step, and final ``[*L, K, V]``, in b's dtype; the
        state is kept in float32 if that is narrower.
    Raises:
        ValueError: shapes that disagree.
    """
    _check(a, b, initial_state, matrix)
    with scan.own_dtypes(b):
        return scan.scan(a, b, initial_state, matrix, reverse)


@affine_scan.register_fake
def _(
    a: Tensor | None, b: Tensor, initial_state: Tensor | None, matrix: bool, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    _check(a, b, initial_state, matrix)
    return b.new_empty(b.shape), b.new_empty(*b.shape[:-3], *b.shape[-2:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, _, initial_state, ctx.matrix, ctx.reverse = inputs
    ctx.set_materialize_grads(False)
    ctx.with_initial = initial_state is not None
    ctx.save_for_backward(a, output[0])


def _gradients(ctx: Any, grad: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
    """With R_t the gradient of the state after step t, R_{t-1} = a_t^H R_t + grad_t: db_t = R_t and
    da_t = R_t S_{t-1}^H, summed over the dims that a is broadcast over."""
    a, before = ctx.saved_tensors
    if grad is None and grad_final is None:
        return None, None, None, None, None
    grad = torch.zeros_like(before) if grad is None else grad
    back = None if a is None else (a.mT if ctx.matrix else a).conj()
    grad_final = None if grad_final is None else grad_final.contiguous()
    after, initial = torch.ops.spcompile.affine_scan(back, grad, grad_final, ctx.matrix, not ctx.reverse)
    grad_a = None
    if a is not None:
        grad_a = after @ before.mH if ctx.matrix else (after * before.conj()).sum_to_size(a.shape)
        grad_a = grad_a.to(a.dtype)
    return grad_a, after, initial if ctx.with_initial else None, None, None


affine_scan.register_autograd(_gradients, setup_context=_save)
