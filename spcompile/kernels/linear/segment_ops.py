"""The kernels over segments (``kernels/triton/segments.py``) as operators, with their fake results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from spcompile.kernels.linear.launch import CHUNK, blank, lie, narrow, rows, segment, strides_of, tiles
from spcompile.kernels.triton import segments

__all__ = ["segment_outputs", "segment_pairs", "segment_prologue", "segment_summaries"]


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
    count, size = segment(t, b * h)
    states, logs = _summaries(k, v)
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
    return _summaries(k, v)


def _summaries(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads, wide = k.shape[0] * k.shape[1], torch.float32
    count, _ = segment(k.shape[2], heads)
    states = k.new_empty(heads, count, k.shape[3], v.shape[3], dtype=wide)
    return states, k.new_zeros(heads, count, dtype=wide)


@torch.library.custom_op("spcompile::segment_outputs", mutates_args=())
def segment_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    states: Tensor | None,
    logs: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    other: Tensor | None,
    kept: Tensor | None,
    scale: float,
    scaled: bool,
    read: int,
    reverse: bool,
    strict: bool,
    less: Sequence[Tensor],
    last: bool,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``scale * q_t U_t`` of every token of a walk, and what the gradient of a decay needs (``gate.py``).

    Args:
        states, logs, carry, fold: the state before each segment, or what it is made of (``chain.Before``).
        other: ``[B, H, T, V]`` where the gradient of the decay is asked for, else None.
        kept: None, or the states that the walk the other way has kept.
        scaled: the scale is a factor of what is written, and so of ``states`` already, not of what is read.
        strict: no step reads what it writes itself.
        less: what else a delta rule needs, or empty: ``[B, H, T, K]`` and ``[B, H, T, V]`` whose product is
            taken from the state too, and never read by its own step; and what a strict walk has given, which
            is added.
        last: the state after the last segment is asked for.
        wide: the results are float32, as they are terms of a sum.
        q, k, v, log_decay, read, reverse: as of :func:`segment_summaries`.
    Returns:
        ``[B, H, T, V]`` contiguous, in q's dtype, or float32 if ``strict`` or ``wide``. If there is
        ``other``, then its product with what is read from before the chunk, of each step of the walk
        (whole segments) ``[parts, B*H, steps]``, to be summed over the parts of V; and without ``kept`` the
        states before each chunk ``[B*H, chunks, K, V]`` (none if ``strict``: that walk repeats one that kept
        them), with ``kept`` the products of the states ``[parts, B*H, chunks]``. Last, the state after the
        last segment ``[B*H, K, V]``, float32. ``[0]`` for what there is not.
    """
    b, h, t, _ = k.shape
    q, k, v = rows(q), rows(k), rows(v)
    other = None if other is None else rows(other)
    count, size = segment(t, b * h)
    options = tiles(_name(less), k, v)
    parts = triton.cdiv(v.shape[3], options["BV"])
    out = _outputs(q, v, strict or wide)
    asked = other is not None, kept is not None, strict
    inner, sums, keeps = _of_gate(q, k, v, parts, *asked)
    for of_gate, dim, of_chunk in ((inner, 2, CHUNK), (keeps, 1, 1)):
        blank(of_gate, dim, t, of_chunk, reverse)
    blank(sums, 2, t, 1, not reverse)  # in the order of the other way, as ``kept`` is
    final = _final(k, v, last)
    gate, mate = ((0, 0, 0) if x is None else strides_of(x) for x in (log_decay, other))
    strides = [*(s for x in (q, k, v) for s in strides_of(x)), *gate, *lie(states, carry), *mate]
    strides += strides_of(out)
    less_k, less_v, plus = map(rows, less) if less else (None, None, None)
    strides += [s for x in (less_k, less_v) for s in ((0, 0, 0) if x is None else strides_of(x))]
    roles = (0, segments.READS.value, segments.WRITES.value)
    with torch.cuda.device_of(k):
        segments.outputs[(b * h * count * parts,)](
            q, k, v, log_decay, states, logs, carry, other, keeps if kept is None else kept, out,
            final if last else None, inner, sums, less_k, less_v, plus, scale,
            *strides, h, t, count, size, b * h,
            FOLD=fold, SCALED=scaled, OF_GATE=roles[(other is not None) + (kept is not None)],
            GATED=log_decay is not None, READ=read, STRICT=strict, LESS=bool(less),
            REVERSE=reverse, **options,
        )  # fmt: skip
    return out, inner, sums, keeps, final


def _outputs(q: Tensor, v: Tensor, wide: bool) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32 if wide else q.dtype)


def _final(k: Tensor, v: Tensor, last: bool) -> Tensor:
    shape = (k.shape[0] * k.shape[1], k.shape[3], v.shape[3]) if last else (0,)
    return k.new_empty(shape, dtype=torch.float32)


def _name(less: Sequence[Tensor]) -> str:
    return "outputs, less" if less else "outputs"


def _of_gate(
    q: Tensor, k: Tensor, v: Tensor, parts: int, asked: bool, kept: bool, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradient of a decay needs."""
    heads, wide = k.shape[0] * k.shape[1], torch.float32
    count, size = segment(k.shape[2], heads)
    chunks = count * size // CHUNK
    of_kept = asked and not kept and not strict
    return (
        q.new_empty((parts, heads, chunks * CHUNK) if asked else 0, dtype=wide),
        q.new_empty((parts, heads, chunks) if kept else 0, dtype=wide),
        q.new_empty((heads, chunks, k.shape[3], v.shape[3]) if of_kept else 0, dtype=narrow(q)),
    )


@torch.library.custom_op("spcompile::segment_pairs", mutates_args=())
def segment_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    less: Tensor | None,
    log_decay: Tensor,
    scale: float,
    read: int,
    reverse: bool,
) -> Tensor:
    """What the gradient of a decay has from pairs of steps of one chunk (``gate.py``), of each step.

    Args:
        q, k, v, log_decay, read, reverse: of the forward, as in :func:`segment_outputs`.
        grad: of the outputs, ``[B, H, T, V]``.
        less: None, or minus the gradient of what a delta rule's keys read, before their own write: likewise.
    Returns:
        ``[B*H, steps]`` float32, in the order of the walk, whole segments.
    """
    b, h, t, _ = k.shape
    given = [rows(x) for x in (q, k, v, grad)]
    less = None if less is None else rows(less)
    count, size = segment(t, b * h)
    sums, options = _sums(k), tiles("pairs", k, v)
    strides = [s for x in (*given, less, log_decay) for s in ((0, 0, 0) if x is None else strides_of(x))]
    with torch.cuda.device_of(k):
        segments.pairs[(b * h * count * size // CHUNK,)](
            *given, less, log_decay, sums, scale, *strides, h, t, count * size,
            READ=read, REVERSE=reverse, **options,
        )  # fmt: skip
    return sums


@segment_pairs.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    less: Tensor | None,
    log_decay: Tensor,
    scale: float,
    read: int,
    reverse: bool,
) -> Tensor:
    return _sums(k)


def _sums(k: Tensor) -> Tensor:
    heads = k.shape[0] * k.shape[1]
    count, size = segment(k.shape[2], heads)
    return k.new_empty(heads, count * size, dtype=torch.float32)


@segment_outputs.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    states: Tensor | None,
    logs: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    other: Tensor | None,
    kept: Tensor | None,
    scale: float,
    scaled: bool,
    read: int,
    reverse: bool,
    strict: bool,
    less: Sequence[Tensor],
    last: bool,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parts = triton.cdiv(v.shape[3], tiles(_name(less), k, v)["BV"])
    gate = _of_gate(q, k, v, parts, other is not None, kept is not None, strict)
    return _outputs(q, v, strict or wide), *gate, _final(k, v, last)


@torch.library.custom_op("spcompile::segment_prologue", mutates_args=())
def segment_prologue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    log_decay: Tensor | None,
    scale: float,
    read: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All of a backward that needs no state, in one launch.

    Args:
        q, k, v, log_decay, scale, read, reverse: of the forward, as in :func:`segment_outputs`.
        grad: of the outputs, ``[B, H, T, V]``.
    Returns:
        :func:`segment_summaries` of the forward and those of the way back, in its order, of (q, grad); and
        with a decay :func:`segment_pairs`, else ``[0]``.
    """
    b, h, t, _ = k.shape
    q, k, v, grad = (rows(x) for x in (q, k, v, grad))
    count, size = segment(t, b * h)
    found, options = _prologue(k, v, log_decay), tiles("summaries", k, v)
    small = tiles("pairs", k, v)
    walk = b * h * count * triton.cdiv(k.shape[3], options["BK"]) * triton.cdiv(v.shape[3], options["BV"])
    chunks = 0 if log_decay is None else b * h * count * size // CHUNK
    gate = (0, 0, 0) if log_decay is None else strides_of(log_decay)
    strides = [s for x in (q, k, v, grad) for s in strides_of(x)]
    with torch.cuda.device_of(k):
        segments.prologue[(2 * walk + chunks,)](
            q, k, v, grad, log_decay, *found, scale, *strides, *gate, h, t, count, size, walk,
            PK=small["BK"], PV=small["BV"],
            GATED=log_decay is not None, READ=read, REVERSE=reverse, **options,
        )  # fmt: skip
    return found


@segment_prologue.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    log_decay: Tensor | None,
    scale: float,
    read: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _prologue(k, v, log_decay)


def _prologue(k: Tensor, v: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = k.new_empty((0,), dtype=torch.float32) if gate is None else _sums(k)
    return *_summaries(k, v), *_summaries(k, v), sums
