"""Softmax attention in plain PyTorch, a block of query rows at a time: any device, dtype, mask, head sizes.

    s_ij = scale * q_i k_j, or cap * tanh(scale * q_i k_j / cap), plus what the distance i - j adds
    p_ij = softmax_j(s_ij + mask_ij)    out_i = sum_j p_ij v_j    lse_i = log sum_j exp(...)

with a sink as one more logit of each row. The probabilities of one block of rows exist at a time, against the
keys that one of its rows may see. The backward computes them again from whole rows (not from ``lse``), so a
row whose keys are all masked by a huge negative number keeps its distribution; of a part of the keys it
cannot, and takes ``out`` and ``lse``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.kernels.scan import state_dtype
from spcompile.kernels.softmax.operands import Operands, Options

__all__ = ["backward", "backward_relative", "forward"]

# Scores held at a time, in elements (8 MiB in float32): what goes over them again and again finds them in a
# cache. Where that is less than a few rows, which would read all keys for little work, up to 64 MiB.
_BUDGET, _MOST = 1 << 21, 1 << 24
_FEW_ROWS = 64

# Rows taken together where keys are passed over by their documents or prefixes.
_ROWS_OF_DOCUMENTS = 256


class _Block(NamedTuple):
    """Rows [start, stop), and the keys [first, end) that some of them may see."""

    start: int
    stop: int
    first: int
    end: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.first, self.end)


def _blocks(x: Operands, options: Options) -> Iterator[_Block]:
    """Blocks of rows that see some key, as many rows as the budget has room for."""
    (b, h, t, _), keys = x.q.shape, x.k.shape[2]
    row = max(1, b * h * keys)
    if options.window is not None and x.prefixes is None:
        # What a row sees, and once more: a block's rows see that of its neighbours.
        row = min(row, max(1, b * h * 4 * options.window))
    step = max(1, _BUDGET // row, min(_FEW_ROWS, _MOST // row))
    step = step if options.window is None else min(step, max(64, options.window))
    step = min(step, _ROWS_OF_DOCUMENTS) if x.ids else step
    for start in range(0, t if keys else 0, step):
        stop = min(t, start + step)
        first, end = x.seen(options, start, stop)
        if first < end:
            yield _Block(start, stop, first, end)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, t, D] -> [B, Hkv, G, t, D]: the query heads that share a key head side by side."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads))


class _Weights(NamedTuple):
    """Of a block of rows, [B, Hkv, G, t, ...]."""

    p: Tensor
    lse: Tensor
    slope: Tensor | None
    """d score / d (scale * q k), of a soft cap."""


def _probabilities(q: Tensor, k: Tensor, x: Operands, options: Options, block: _Block) -> _Weights:
    """The softmax of the rows ``q`` [B, Hkv, G, t, K] over the keys ``k`` [B, Hkv, keys, K] of a block."""
    scores, slope, heads = (q @ k.unsqueeze(2).mT) * options.scale, None, k.shape[1]
    if options.soft_cap is not None:
        bounded = torch.tanh(scores / options.soft_cap)
        scores, slope = options.soft_cap * bounded, 1 - bounded * bounded
    bias = _mask_block(x.bias(options, *block), heads)
    if bias is not None:
        scores = scores + bias
    mask = _mask_block(_cut(x.mask, block), heads)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    visible = x.visible(options, *block)
    if visible is not None:
        visible = visible.unsqueeze(1) if visible.dim() == 4 else visible
        scores = scores.masked_fill(~visible, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    sinks = None if x.sinks is None else x.sinks.to(q.dtype).reshape(heads, -1, 1, 1)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    lse = (top + torch.log(total)).squeeze(-1)
    return _Weights(weights / torch.where(total == 0, 1.0, total), lse, slope)


def _cut(mask: Tensor | None, block: _Block) -> Tensor | None:
    """The mask's part of a block, [B, H, t, keys], any of them 1."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[:, :, block.rows] if mask.shape[2] > 1 else mask
    return mask[..., block.keys] if mask.shape[3] > 1 else mask


def _mask_block(mask: Tensor | None, kv_heads: int) -> Tensor | None:
    """[B, Hkv, G, t, keys], any of them 1."""
    if mask is None:
        return None
    return mask.unsqueeze(2) if mask.shape[1] == 1 else _grouped(mask, kv_heads)


def forward(x: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """Attention of the query rows given against all keys given.

    Returns:
        out ``[B, H, T, V]`` in q's dtype and lse ``[B, H, T]`` in the state dtype, both contiguous. A row
        that sees no key is 0 with lse -inf (or the sink), as in ``scaled_dot_product_attention``.
    """
    q, k, v = x[:3]
    wide, heads = state_dtype(q.dtype), k.shape[1]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    if x.sinks is not None:
        lse.copy_(x.sinks.to(wide)[:, None])
    for block in _blocks(x, options):
        rows = _grouped(q[:, :, block.rows], heads).to(wide)
        keys, values = (y[:, :, block.keys].to(wide) for y in (k, v))
        found = _probabilities(rows, keys, x, options, block)
        out[:, :, block.rows] = (found.p @ values.unsqueeze(2)).flatten(1, 2)
        lse[:, :, block.rows] = found.lse.flatten(1, 2)
    return out, lse


Given = tuple[Tensor, Tensor] | None
"""out and lse, where they are of more keys than these."""


def backward(
    grad: Tensor, x: Operands, options: Options, given: Given = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`'s ``out``: dq, dk, dv contiguous, each in its input's dtype."""
    return _gradients(grad, x, options, None, given)


def backward_relative(
    grad: Tensor, x: Operands, options: Options, given: Given = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and the gradient of ``relative``: of an entry the sum over the scores that it is added to."""
    assert x.relative is not None
    total = torch.zeros(x.relative.shape, dtype=state_dtype(x.q.dtype), device=x.q.device)
    return *_gradients(grad, x, options, total, given), total.to(x.relative.dtype)


def _by_distance(ds: Tensor, heads: int) -> Tensor:
    """The sums of [B, Hkv, G, t, keys] along its diagonals and over the batch, [heads, t + keys - 1].

    With the keys from last to first and each row moved on by one, a diagonal is a column.
    """
    rows, keys = ds.shape[-2:]
    ds = ds.sum(0).flatten(0, 1)
    ds = ds if heads > 1 else ds.sum(0, keepdim=True)
    moved = F.pad(ds.flip(-1), (0, rows)).flatten(1)[:, : rows * (rows + keys - 1)]
    return moved.unflatten(1, (rows, rows + keys - 1)).sum(1)


def _gradients(
    grad: Tensor, x: Operands, options: Options, total: Tensor | None, given: Given
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; that of ``relative`` is added to ``total``."""
    q, k, v = x[:3]
    wide, heads = state_dtype(q.dtype), k.shape[1]
    dq, dk, dv = (torch.zeros(y.shape, dtype=wide, device=y.device) for y in (q, k, v))
    for block in _blocks(x, options):
        rows, grads = (_grouped(y[:, :, block.rows], heads).to(wide) for y in (q, grad))
        keys, values = (y[:, :, block.keys].to(wide) for y in (k, v))
        p, own, slope = _probabilities(rows, keys, x, options, block)
        dp = grads @ values.unsqueeze(2).mT
        if given is None:
            common = (p * dp).sum(-1, keepdim=True)
        else:
            out, lse = (_grouped(y[:, :, block.rows], heads).to(wide) for y in given)
            p = p * torch.where(own == -torch.inf, 0.0, torch.exp(own - lse)).unsqueeze(-1)
            common = (grads * out).sum(-1, keepdim=True)
        dv[:, :, block.keys] += (p.mT @ grads).sum(2)
        ds = p * (dp - common)
        if total is not None:
            total.index_add_(1, x.distances(options, *block), _by_distance(ds, total.shape[0]))
        ds = ds * options.scale
        ds = ds if slope is None else ds * slope
        dq[:, :, block.rows] = (ds @ keys.unsqueeze(2)).flatten(1, 2)
        dk[:, :, block.keys] += (ds.mT @ rows).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
