"""Softmax attention by PyTorch's flash attention, in parts that are merged by their log-sum-exp.

A causal row r + i sees all keys before r (a part without a mask) and, of the keys r ..., the first i + 1 (a
part with the kernel's own causal flag). Two calls do just the work of the visible keys, and are one softmax:

    lse = log(exp(lse_1) + exp(lse_2))      out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

A window is blocks of rows, each with the keys that it sees and a mask of its own size, so that time and
memory are T x window. So are packed documents: of a block's rows no key before or behind their documents.

The kernel's backward takes the merged ``out`` and ``lse``, so the gradients of the parts simply add; sinks
need no more than to be in both (``rows.py``). On GPUs a call with the causal flag has as many keys as rows:
it is all the same whether the kernel aligns its diagonal at the first keys or at the last.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile import _torch
from spcompile.kernels.scan import state_dtype
from spcompile.kernels.softmax.operands import PLAIN, Operands, Options

__all__ = ["backward", "forward", "imprecise", "refuses"]

# What a masked score becomes: -inf would make the kernel's log-sum-exp of a fully masked row 0, the same as a
# row that sees a key. No real score is near it, and exp(_MASKED - anything real) is 0.
_MASKED = -1e30
_NONE_VISIBLE = -1e29


# A window's rows are taken so many at a time, or as many as the window is long if that is between.
_FEWEST_ROWS, _MOST_ROWS = 64, 512
# Those of documents and relative biases, where no window says more.
_ROWS_OF_DOCUMENTS = 256

# CUDA's kernel: heads of at most so many numbers, a multiple of so many, and its kinds of numbers.
_LARGEST, _MULTIPLE = 256, 8
_CUDA = (torch.bfloat16, torch.float16)


def refuses(x: Operands, options: Options = PLAIN) -> str:
    """Why the kernel does not take such a call, for the report; empty if it does."""
    q, name = x.q, str(x.q.dtype).removeprefix("torch.")
    if q.numel() == 0 or x.k.numel() == 0:
        return "no tokens"
    if options.soft_cap is not None:
        return "a soft cap"
    if q.device.type == "cpu":
        floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        return "" if q.dtype in floats else name
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"a device that is neither a CPU nor an NVIDIA GPU: {q.device.type}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "a GPU before sm_80"
    if q.dtype not in _CUDA:
        return f"{name}, not bfloat16 or float16"
    if x.mask is not None:
        return "a mask that is data"
    if options.window is not None:
        return "a sliding window"
    if x.documents is not None:
        return "documents"
    if x.prefixes is not None:
        return "prefixes"
    if x.relative is not None:
        return "a relative bias"
    return f"heads of more than {_LARGEST} numbers" if _size(x) > _LARGEST else ""


def _size(x: Operands) -> int:
    """The head size that the kernel is given: one for keys and values."""
    size = max(x.k.shape[3], x.v.shape[3])
    return -(-size // _MULTIPLE) * _MULTIPLE if _on_gpu(x.q) else size


def _on_gpu(q: Tensor) -> bool:
    return q.device.type != "cpu"


def imprecise(x: Operands, lse: Tensor) -> bool:
    """Whether an additive mask or bias makes a row's ``lse`` so large that it cannot say the row's weights.

    A row whose keys all carry -1e4 or ``finfo.min`` is a softmax of what is left of its scores after
    rounding (often uniform), which exp(score - lse) loses: -3e38 + log(n) is -3e38. Such rows, and those
    where an additive -inf hides every key, are left to the blockwise kernel. (Scores that are large by
    themselves round alike everywhere.)
    """
    additive = x.relative is not None or (x.mask is not None and x.mask.dtype != torch.bool)
    return additive and bool((lse < -1e3).any())


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


def _mask_part(x: Operands, call: _Call, options: Options) -> Tensor | None:
    """The mask of a call, data and structure, as the kernel's additive 4-D mask; dims of size 1 stay."""
    mask, wide, visible = x.mask, state_dtype(x.q.dtype), None
    block = call.row, call.row + call.rows, call.key, call.key + call.keys
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask[:, :, call.row : call.row + call.rows] if mask.shape[2] > 1 else mask
        mask = mask[..., call.key : call.key + call.keys] if mask.shape[3] > 1 else mask
        additive = mask.dtype != torch.bool
        mask = mask.to(wide).clamp(min=_MASKED) if additive else torch.where(mask, 0.0, _MASKED).to(wide)
    bias = x.bias(options, *block)
    if bias is not None:
        mask = bias.to(wide) if mask is None else bias.to(wide) + mask
    if _in_blocks(x, options):
        visible = x.visible(options, *block)
    if visible is None:
        return mask
    return torch.where(
        visible, mask if mask is not None else visible.new_zeros((1, 1, 1, 1), dtype=wide), _MASKED
    )


class _Call(NamedTuple):
    """Query rows and keys of one call of the kernel, and its causal flag."""

    row: int
    rows: int
    key: int
    keys: int
    diagonal: bool


def _calls(x: Operands, options: Options) -> list[_Call]:
    if _in_blocks(x, options):
        return _blocks(x, options)
    rows, found = x.q.shape[2], []
    for start, stop, diagonal in _parts(x, options):
        keys = stop - start
        square = diagonal and keys < rows and _on_gpu(x.q)
        found.append(_Call(0, keys if square else rows, start, keys, diagonal))
        if square:  # the rows behind the last key see all of them
            found.append(_Call(keys, rows - keys, start, keys, False))
    return found


def _in_blocks(x: Operands, options: Options) -> bool:
    return options.window is not None or bool(x.ids) or x.relative is not None


def _blocks(x: Operands, options: Options) -> list[_Call]:
    """Blocks of rows, each with all that it sees; none for rows that see nothing."""
    rows, found = x.q.shape[2], []
    step = min(max(options.window or _ROWS_OF_DOCUMENTS, _FEWEST_ROWS), _MOST_ROWS)
    for row in range(0, rows, step):
        stop = min(rows, row + step)
        first, end = x.seen(options, row, stop)
        if first < end:
            found.append(_Call(row, stop - row, first, end - first, False))
    return found


def _of_call(x: Operands, call: _Call, options: Options, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of a call."""
    k, v = (_widened(y.narrow(2, call.key, call.keys), size) for y in x[1:3])
    return k, v, _mask_part(x, call, options)


def forward(x: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """As :func:`.blockwise.forward`; ask :func:`imprecise` about the lse that it returns."""
    q, v = x.q, x.v
    wide, size = state_dtype(q.dtype), _size(x)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    wide_q, merged = _widened(q, size), False
    for call in _calls(x, options):
        rows = wide_q.narrow(2, call.row, call.rows)
        keys, values, part_mask = _of_call(x, call, options, size)
        how = 0.0, call.diagonal
        on_cpu = partial(_torch.flash_attention_cpu, attn_mask=part_mask)
        flash = _torch.flash_attention_cuda if _on_gpu(q) else on_cpu
        part_out, part_lse = flash(rows, keys, values, *how, scale=options.scale)[:2]
        part_out = part_out.narrow(3, 0, v.shape[3])
        if not merged and call.rows == q.shape[2]:
            out, lse, merged = part_out, part_lse, True
            continue
        ours, known = (y.narrow(2, call.row, call.rows) for y in (out, lse))
        both = torch.logaddexp(known, part_lse)
        one, other = (torch.exp(y - both).unsqueeze(-1) for y in (known, part_lse))
        ours.copy_(ours * one + part_out * other)
        known.copy_(both)
    if x.mask is not None or _in_blocks(x, options):
        hidden = lse < _NONE_VISIBLE
        out = torch.where(hidden.unsqueeze(-1), 0.0, out)
        lse = torch.where(hidden, -torch.inf, lse)
    return out.contiguous(), lse.contiguous()


def backward(
    grad: Tensor, x: Operands, out: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the merged ``out`` and ``lse``: dq, dk, dv contiguous, each in its input's dtype."""
    size = _size(x)
    # A row without a visible key: exp(_MASKED - 0) is 0, so it gets and gives no gradient.
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    grads = [y.new_zeros(y.shape) for y in x[:3]]
    given = _widened(grad, size), _widened(x.q, size), _widened(out, size), lse
    for call in _calls(x, options):
        places = (call.row, call.rows), (call.key, call.keys), (call.key, call.keys)
        for whole, part, place in zip(grads, _gradients(x, given, call, options, size), places, strict=True):
            whole.narrow(2, *place).add_(part.narrow(3, 0, whole.shape[3]))
    return grads[0], grads[1], grads[2]


def _gradients(
    x: Operands, given: tuple[Tensor, ...], call: _Call, options: Options, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of one call, from the gradient, the queries, the merged output and log-sum-exp."""
    grad, q, out, lse = (y.narrow(2, call.row, call.rows) for y in given)
    k, v, mask = _of_call(x, call, options, size)
    how = 0.0, call.diagonal
    if not _on_gpu(q):
        flash = _torch.flash_attention_cpu_backward
        return flash(grad, q, k, v, out, lse, *how, attn_mask=mask, scale=options.scale)
    lengths, none = (None, None, q.shape[2], k.shape[2]), q.new_empty(0, dtype=torch.int64)
    flash = _torch.flash_attention_cuda_backward  # without dropout it needs no random state
    lse = lse.contiguous()
    return flash(grad, q, k, v, out, lse, *lengths, *how, none, none, scale=options.scale)
