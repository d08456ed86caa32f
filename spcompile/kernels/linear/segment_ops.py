"""The kernels over segments (``kernels/triton/segments.py``) as operators, with their fake results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from spcompile.kernels.linear.launch import CHUNK, rows, segment, strides_of, tiles
from spcompile.kernels.triton import segments

__all__ = ["segment_outputs", "segment_pairs", "segment_summaries"]


@torch.library.custom_op("spcompile::segment_summaries", mutates_args=())
def segment_summaries(
    k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, read: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    """What each segment of a walk does to the state, ``U_after = exp(log) U_before + S``.

    Args:
        k: ``[B, H, T, K]``; v: ``[B, H, T, V]``; log_decay: None (0) or ``[B, H, T, 1]``, of any strides.
        scale: a factor of S.
        read: how a step's decay, read and write follow each other (``kernels/triton/tiles.py``).
        reverse: the walk goes back from the last token.
    Returns:
        S ``[B*H, segments, K, V]`` and the sums of log decays ``[B*H, segments]``, in the order of the walk,
        float32.
    """
    b, h, t, _ = k.shape
    k, v = rows(k), rows(v)
    count, size = segment(t)
    states, logs = _summaries(k, v, count)
    options = tiles("summaries", k, v)
    gate = (0, 0, 0) if log_decay is None else strides_of(log_decay)
    grid = (b * h * count * triton.cdiv(k.shape[3], options["BK"]) * triton.cdiv(v.shape[3], options["BV"]),)
    with torch.cuda.device_of(k):
        segments.summaries[grid](
            k, v, log_decay, states, logs, scale, *strides_of(k), *strides_of(v), *gate, h, t, count, size,
            GATED=log_decay is not None, READ=read, REVERSE=reverse, **options,
        )  # fmt: skip
    return states, logs


@segment_summaries.register_fake
def _(
    k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, read: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    return _summaries(k, v, segment(k.shape[2])[0])


def _summaries(k: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
    heads, wide = k.shape[0] * k.shape[1], torch.float32
    states = k.new_empty(heads, count, k.shape[3], v.shape[3], dtype=wide)
    return states, k.new_zeros(heads, count, dtype=wide)


@torch.library.custom_op("spcompile::segment_outputs", mutates_args=())
def segment_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    before: Tensor,
    other: Tensor | None,
    kept: Tensor | None,
    scale: float,
    scaled: bool,
    read: int,
    reverse: bool,
    strict: bool,
    less: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``scale * q_t U_t`` of every token of a walk, and what the gradient of a decay needs (``gate.py``).

    Args:
        before: the state before each segment, ``[B*H, segments, K, V]``, float32, of any strides.
        other: ``[B, H, T, V]`` where the gradient of the decay is asked for, else None.
        kept: None, or the states that the walk the other way has kept.
        scaled: the scale is a factor of what is written, and so of ``before`` already, not of what is read.
        strict: no step reads what it writes itself.
        less: what else a delta rule needs, or empty: ``[B, H, T, K]`` and ``[B, H, T, V]`` whose product is
            taken from the state too, and never read by its own step; and what a strict walk has given, which
            is added.
        q, k, v, log_decay, read, reverse: as of :func:`segment_summaries`.
    Returns:
        ``[B, H, T, V]`` contiguous, in q's dtype, or float32 if ``strict``, as something is added to it. If
        there is ``other``, then its product with what is read from before the chunk, of each step of the walk
        (whole segments) ``[B*H, steps]``; and without ``kept`` the states before each chunk
        ``[B*H, chunks, K, V]`` (none if ``strict``: that walk repeats one that kept them), with ``kept`` the
        products of the states ``[B*H, chunks]``. ``[0]`` for what there is not.
    """
    b, h, t, _ = k.shape
    q, k, v = rows(q), rows(k), rows(v)
    other = None if other is None else rows(other)
    count, size = segment(t)
    options = tiles("outputs, less" if less else "outputs", k, v)
    parts = triton.cdiv(v.shape[3], options["BV"])
    out = _outputs(q, v, strict)
    shapes = _of_gate(k, v, other is not None, kept is not None, strict)
    inner, sums = (q.new_zeros(parts, *shape, dtype=torch.float32) for shape in shapes[:2])
    keeps = q.new_zeros(shapes[2], dtype=q.dtype)
    gate, mate = ((0, 0, 0) if x is None else strides_of(x) for x in (log_decay, other))
    strides = [
        *strides_of(q),
        *strides_of(k),
        *strides_of(v),
        *gate,
        *before.stride(),
        *mate,
        *strides_of(out),
    ]
    less_k, less_v, plus = map(rows, less) if less else (k, v, out)
    strides += [*strides_of(less_k), *strides_of(less_v)]
    roles = (0, segments.READS.value, segments.WRITES.value)
    with torch.cuda.device_of(k):
        segments.outputs[(b * h * count * parts,)](
            q, k, v, log_decay, before, other, keeps if kept is None else kept, out, inner, sums,
            less_k, less_v, plus, scale, *strides, h, t, count, size, b * h,
            SCALED=scaled, OF_GATE=roles[(other is not None) + (kept is not None)],
            GATED=log_decay is not None, READ=read, STRICT=strict, LESS=bool(less),
            REVERSE=reverse, **options,
        )  # fmt: skip
    return out, inner.sum(0), sums.sum(0), keeps


def _outputs(q: Tensor, v: Tensor, strict: bool) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32 if strict else q.dtype)


def _of_gate(k: Tensor, v: Tensor, asked: bool, kept: bool, strict: bool) -> list[tuple[int, ...]]:
    """Shapes of what the gradient of a decay needs."""
    if not asked:
        return [(0,)] * 3
    (b, h), (count, size) = k.shape[:2], segment(k.shape[2])
    steps, chunks = (b * h, count * size), (b * h, count * size // CHUNK)
    if kept or strict:
        return [steps, chunks if kept else (0,), (0,)]
    return [steps, (0,), (*chunks, k.shape[3], v.shape[3])]


@torch.library.custom_op("spcompile::segment_pairs", mutates_args=())
def segment_pairs(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, log_decay: Tensor, scale: float, read: int, reverse: bool
) -> Tensor:
    """What the gradient of a decay has from pairs of steps of one chunk (``gate.py``), of each step.

    Args:
        q, k, v, log_decay, read, reverse: of the forward, as in :func:`segment_outputs`.
        grad: of the outputs, ``[B, H, T, V]``.
    Returns:
        ``[B*H, steps]`` float32, in the order of the walk, whole segments.
    """
    b, h, t, _ = k.shape
    given = [rows(x) for x in (q, k, v, grad)]
    count, size = segment(t)
    sums = k.new_empty(b * h, count * size, dtype=torch.float32)
    options = tiles("pairs", k, v)
    strides = [s for x in (*given, log_decay) for s in strides_of(x)]
    with torch.cuda.device_of(k):
        segments.pairs[(b * h * count * size // CHUNK,)](
            *given, log_decay, sums, scale, *strides, h, t, count * size,
            READ=read, REVERSE=reverse, **options,
        )  # fmt: skip
    return sums


@segment_pairs.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, log_decay: Tensor, scale: float, read: int, reverse: bool
) -> Tensor:
    count, size = segment(k.shape[2])
    return k.new_empty(k.shape[0] * k.shape[1], count * size, dtype=torch.float32)


@segment_outputs.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    before: Tensor,
    other: Tensor | None,
    kept: Tensor | None,
    scale: float,
    scaled: bool,
    read: int,
    reverse: bool,
    strict: bool,
    less: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inner, sums, keeps = _of_gate(k, v, other is not None, kept is not None, strict)
    wide = {"dtype": torch.float32}
    return _outputs(q, v, strict), q.new_empty(inner, **wide), q.new_empty(sums, **wide), q.new_empty(keeps)
