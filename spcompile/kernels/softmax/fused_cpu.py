"""Softmax attention by PyTorch's fused CPU kernel, in parts that are merged by their log-sum-exp.

A causal row r + i sees all keys before r (a part without a mask) and, of the keys r ..., the first i + 1 (a
part with the kernel's own causal flag). Two calls do just the work of the visible keys, and are one softmax:

    lse = log(exp(lse_1) + exp(lse_2))      out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

The kernel's backward takes the merged ``out`` and ``lse``, so the gradients of the parts simply add.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile._torch import flash_attention_cpu, flash_attention_cpu_backward
from spcompile.kernels.scan import state_dtype
from spcompile.kernels.softmax.operands import Operands, Options

__all__ = ["backward", "forward", "imprecise", "supports"]

# What a masked score becomes: -inf would make the kernel's log-sum-exp of a fully masked row 0, the same as a
# row that sees a key. No real score is near it, and exp(_MASKED - anything real) is 0.
_MASKED = -1e30
_NONE_VISIBLE = -1e29


def supports(q: Tensor) -> bool:
    """Whether the kernel takes such queries."""
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return q.device.type == "cpu" and q.dtype in floats and q.numel() > 0


def imprecise(mask: Tensor | None, lse: Tensor) -> bool:
    """Whether an additive mask makes some row's ``lse`` so large that it cannot say the row's weights.

    A row whose keys all carry -1e4 or ``finfo.min`` is a softmax of what is left of its scores after
    rounding (often uniform), which exp(score - lse) loses: -3e38 + log(n) is -3e38. Such rows, and those
    where an additive -inf hides every key, are left to the blockwise kernel. (Scores that are large by
    themselves round alike everywhere.)
    """
    return mask is not None and mask.dtype != torch.bool and bool((lse < -1e3).any())


def _parts(x: Operands, options: Options) -> list[tuple[int, int, bool]]:
    """Key ranges [start, stop) and whether the kernel's causal flag is on."""
    keys, rows = x.k.shape[2], x.q.shape[2]
    if not options.causal:
        return [(0, keys, False)]
    past = min(options.first_row, keys)
    parts = [(0, past, False), (past, min(keys, options.first_row + rows), True)]
    return [part for part in parts if part[0] < part[1]]


def _widened(x: Tensor, size: int) -> Tensor:
    """Pad the head dim with zeros, which change nothing: the kernel wants keys and values of one size.

    It also takes the head dim's stride to be 1 without looking, and reads beside the tensor where it is not;
    Inductor chooses layouts freely, and a user's transposed view has such strides too.
    """
    if x.shape[-1] < size:
        x = F.pad(x, (0, size - x.shape[-1]))  # keeps channels last
    return x if x.stride(-1) == 1 else x.contiguous()


def _mask_part(mask: Tensor | None, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
    """Columns [start, stop) of the mask as the kernel's additive 4-D mask; dims of size 1 stay."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[..., start:stop] if mask.shape[3] > 1 else mask
    wide = state_dtype(dtype)
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, _MASKED).to(wide)
    return mask.to(wide).clamp(min=_MASKED)


def forward(x: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """As :func:`.blockwise.forward`; ask :func:`imprecise` about the lse that it returns."""
    q, k, v, mask = x
    wide, size = state_dtype(q.dtype), max(k.shape[3], v.shape[3])
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    merged = False
    for start, stop, diagonal in _parts(x, options):
        part_out, part_lse = flash_attention_cpu(
            _widened(q, size),
            _widened(k[:, :, start:stop], size),
            _widened(v[:, :, start:stop], size),
            0.0,
            diagonal,
            attn_mask=_mask_part(mask, start, stop, q.dtype),
            scale=options.scale,
        )
        part_out = part_out[..., : v.shape[3]]
        if not merged:
            out, lse, merged = part_out, part_lse, True
            continue
        both = torch.logaddexp(lse, part_lse)
        ours, theirs = (torch.exp(y - both).unsqueeze(-1) for y in (lse, part_lse))
        out, lse = (out * ours + part_out * theirs).to(q.dtype), both
    if mask is not None:
        hidden = lse < _NONE_VISIBLE
        out = torch.where(hidden.unsqueeze(-1), 0.0, out)
        lse = torch.where(hidden, -torch.inf, lse)
    return out.contiguous(), lse.contiguous()


def backward(
    grad: Tensor, x: Operands, out: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the merged ``out`` and ``lse``: dq, dk, dv contiguous, each in its input's dtype."""
    q, k, v, mask = x
    size = max(k.shape[3], v.shape[3])
    # A row without a visible key: exp(_MASKED - 0) is 0, so it gets and gives no gradient.
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    dq, dk, dv = (y.new_zeros(y.shape) for y in (q, k, v))
    grad, out, wide_q = _widened(grad, size), _widened(out, size), _widened(q, size)
    for start, stop, diagonal in _parts(x, options):
        dq_part, dk_part, dv_part = flash_attention_cpu_backward(
            grad,
            wide_q,
            _widened(k[:, :, start:stop], size),
            _widened(v[:, :, start:stop], size),
            out,
            lse,
            0.0,
            diagonal,
            attn_mask=_mask_part(mask, start, stop, q.dtype),
            scale=options.scale,
        )
        dq += dq_part[..., : q.shape[3]]
        dk[:, :, start:stop] = dk_part[..., : k.shape[3]]
        dv[:, :, start:stop] = dv_part[..., : v.shape[3]]
    return dq, dk, dv
