"""Softmax attention in plain PyTorch, a block of query rows at a time: any device, dtype, mask, head sizes.

    p_ij = softmax_j(scale * q_i k_j + mask_ij)    out_i = sum_j p_ij v_j    lse_i = log sum_j exp(...)

The probabilities of one block of rows exist at a time, and the backward computes them again from whole rows
(not from ``lse``), so a row whose keys are all masked by a huge negative number keeps its distribution.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spcompile.kernels.scan import state_dtype
from spcompile.kernels.softmax.operands import Operands, Options

__all__ = ["backward", "forward"]

# Scores held at a time, in elements (64 MiB in float32).
_BUDGET = 1 << 24


def _blocks(x: Operands, options: Options) -> Iterator[tuple[int, int, int]]:
    """Row ranges [start, stop) with the number of keys that some row of the range may see."""
    (b, h, t, _), keys = x.q.shape, x.k.shape[2]
    step = max(1, _BUDGET // max(1, b * h * keys))
    for start in range(0, t if keys else 0, step):
        stop = min(t, start + step)
        yield start, stop, min(keys, options.first_row + stop) if options.causal else keys


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, t, D] -> [B, Hkv, G, t, D]: the query heads that share a key head side by side."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads))


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, options: Options, start: int
) -> tuple[Tensor, Tensor]:
    """(probabilities [B, Hkv, G, t, S], lse [B, Hkv, G, t]); ``start`` is q's first row among those given."""
    scores = (q @ k.unsqueeze(2).mT) * options.scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if options.causal:
        rows = torch.arange(q.shape[3], device=q.device) + (options.first_row + start)
        columns = torch.arange(k.shape[2], device=q.device)
        scores = scores.masked_fill(columns > rows[:, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    lse = (top + torch.log(total)).squeeze(-1)
    return weights / torch.where(total == 0, 1.0, total), lse


def _mask_block(mask: Tensor | None, kv_heads: int, start: int, stop: int, seen: int) -> Tensor | None:
    """The mask's rows [start, stop) and first ``seen`` columns, [B, Hkv, G, t, seen], any of them 1."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[:, :, start:stop] if mask.shape[2] > 1 else mask
    mask = mask[..., :seen] if mask.shape[3] > 1 else mask
    return mask.unsqueeze(2) if mask.shape[1] == 1 else _grouped(mask, kv_heads)


def forward(x: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """Attention of the query rows given against all keys given.

    Returns:
        out ``[B, H, T, V]`` in q's dtype and lse ``[B, H, T]`` in the state dtype, both contiguous. A row
        that sees no key is 0 with lse -inf, as in ``scaled_dot_product_attention``.
    """
    q, k, v, mask = x
    wide, heads = state_dtype(q.dtype), k.shape[1]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    for start, stop, seen in _blocks(x, options):
        rows = _grouped(q[:, :, start:stop], heads).to(wide)
        part = _mask_block(mask, heads, start, stop, seen)
        p, row_lse = _probabilities(rows, k[:, :, :seen].to(wide), part, options, start)
        out[:, :, start:stop] = (p @ v[:, :, None, :seen].to(wide)).flatten(1, 2)
        lse[:, :, start:stop] = row_lse.flatten(1, 2)
    return out, lse


def backward(grad: Tensor, x: Operands, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`'s ``out``: dq, dk, dv contiguous, each in its input's dtype."""
    q, k, v, mask = x
    wide, heads = state_dtype(q.dtype), k.shape[1]
    dq, dk, dv = (torch.zeros(y.shape, dtype=wide, device=y.device) for y in (q, k, v))
    for start, stop, seen in _blocks(x, options):
        rows = _grouped(q[:, :, start:stop], heads).to(wide)
        grads = _grouped(grad[:, :, start:stop], heads).to(wide)
        keys, values = k[:, :, :seen].to(wide), v[:, :, :seen].to(wide)
        part = _mask_block(mask, heads, start, stop, seen)
        p, _ = _probabilities(rows, keys, part, options, start)
        dv[:, :, :seen] += (p.mT @ grads).sum(2)
        dp = grads @ values.unsqueeze(2).mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * options.scale
        dq[:, :, start:stop] = (ds @ keys.unsqueeze(2)).flatten(1, 2)
        dk[:, :, :seen] += (ds.mT @ rows).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
