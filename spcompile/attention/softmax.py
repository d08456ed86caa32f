"""The softmax attention operators of the ``spcompile`` namespace: schema, kernel, fake and autograd of each.

They mean the whole sequence and are right wherever they run (eager, any backend). Inside the spcompile
backend the strategies replace each call, forward and backward, by its sharded lowering.

A strategy also emits ``local_softmax_attention``: this rank's rows against all keys, with the rank read at
run time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spcompile.collectives import current_rank
from spcompile.errors import SpcompileError
from spcompile.kernels.scan import state_dtype
from spcompile.kernels.softmax import rows
from spcompile.kernels.softmax.operands import Operands, Options

__all__ = [
    "check_shapes",
    "local_softmax_attention",
    "local_softmax_attention_backward",
    "softmax_attention",
    "softmax_attention_backward",
]


def check_shapes(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse shapes that no attention has, by the operator's name and the shapes."""
    shapes = f"{name}: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(f"{shapes}: expected [batch, heads, tokens, head size]")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{shapes}: batch, key size or tokens of keys and values disagree")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: the key heads must divide the query heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{name}: q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")


# ---- softmax ----


@torch.library.custom_op("spcompile::softmax_attention", mutates_args=())
def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention, ``out_i = sum_j softmax_j(scale * q_i k_j + mask_ij) v_j``.

    Args:
        q: queries ``[B, H, T, K]``, any float dtype.
        k: keys ``[B, Hkv, S, K]``; Hkv divides H and query head h uses key head ``h // (H // Hkv)``.
        v: values ``[B, Hkv, S, V]``.
        mask: None, bool (True = may see) or additive, broadcastable to ``[B, H, T, S]``; it gets no gradient.
        causal: key j is visible to query i only if ``j <= i``.
        scale: factor of the scores.
    Returns:
        out ``[B, H, T, V]`` in q's dtype, and lse ``[B, H, T]``, natural log, float32 (float64 for
        float64), which is not differentiable. Both contiguous. A query that may see no key (False or -inf
        everywhere) gets out 0, lse -inf and no gradient, as in ``scaled_dot_product_attention``;
        ``torch.softmax`` would make it NaN.
    Raises:
        ValueError: shapes or dtypes that disagree.
        SpcompileError: the mask requires a gradient.
    """
    check_shapes("softmax_attention", q, k, v)
    return rows.forward(Operands(q, k, v, mask), Options(causal, scale))


def _fake_softmax(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide = state_dtype(q.dtype)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


@softmax_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    check_shapes("softmax_attention", q, k, v)
    return _fake_softmax(q, v)


@torch.library.custom_op("spcompile::softmax_attention_backward", mutates_args=())
def softmax_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of ``softmax_attention`` from its inputs, its results and ``grad`` of out."""
    return rows.backward(grad, Operands(q, k, v, mask), out, lse, Options(causal, scale))


@softmax_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    return _empty_like(q, k, v)


def _save_softmax(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale = inputs
    out, lse = output
    if ctx.needs_input_grad[3]:
        raise SpcompileError(
            "softmax_attention: the mask requires a gradient, which is not computed. "
            "Remedy: detach the mask, or write this attention with torch.softmax."
        )
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, mask, out, lse)


def _softmax_gradients(ctx: Any, grad: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    backward = torch.ops.spcompile.softmax_attention_backward
    return *backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None


softmax_attention.register_autograd(_softmax_gradients, setup_context=_save_softmax)


# ---- softmax, this rank's rows ----


@torch.library.custom_op("spcompile::local_softmax_attention", mutates_args=())
def local_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, group: str, block: int
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention of this rank's query rows against all keys.

    Row i of ``q`` is token ``rank * block + i`` and sees the keys up to itself, so the work of rank r is
    that of its visible keys; the rank of the process in ``group`` is read at run time and no mask is built.

    Args:
        q: this rank's queries ``[B, H, block, K]``.
        k, v: all keys and values ``[B, Hkv, S, *]``.
        mask: None, or these rows' mask, broadcastable to ``[B, H, block, S]``, besides the causal one.
        group: registered name of the process group along the sequence.
        block: tokens per rank.
    Returns:
        out and lse of these rows, as in ``softmax_attention``.
    """
    options = Options(True, scale, current_rank(group) * block)
    return rows.forward(Operands(q, k, v, mask), options)


@local_softmax_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, group: str, block: int
) -> tuple[Tensor, Tensor]:
    return _fake_softmax(q, v)


@torch.library.custom_op("spcompile::local_softmax_attention_backward", mutates_args=())
def local_softmax_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    group: str,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``local_softmax_attention``: dq of these rows; dk, dv of all keys from just these rows."""
    options = Options(True, scale, current_rank(group) * block)
    return rows.backward(grad, Operands(q, k, v, mask), out, lse, options)


@local_softmax_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    group: str,
    block: int,
) -> tuple[Tensor, ...]:
    return _empty_like(q, k, v)
