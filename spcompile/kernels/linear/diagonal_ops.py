"""The kernels of a decay per key (``kernels/triton/diagonal.py``) as operators, with their fake results.

Of all of them q and k are ``[B, H, T, K]`` and v is ``[B, H, T, V]``, of any strides; ``log_decay`` is one
per key, and for ``diagonal_columns`` one per value; ``read`` and ``reverse`` say how the walk goes
(``kernels/triton/tiles.py``).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from spcompile.kernels.linear.launch import CHUNK, blank, lie, narrow, rows, segment, strides_of, tiles
from spcompile.kernels.triton import diagonal, per_key, segments

__all__ = [
    "diagonal_columns",
    "diagonal_outputs",
    "diagonal_prologue",
    "diagonal_summaries",
    "diagonal_within",
]

_WIDE = torch.float32


@torch.library.custom_op("spcompile::diagonal_summaries", mutates_args=())
def diagonal_summaries(
    k: Tensor, v: Tensor, log_decay: Tensor, scale: float, read: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    """What each segment of a walk does to the state, ``U_after = Diag(exp(log)) U_before + S``.

    Args:
        scale: a factor of S.
    Returns:
        S ``[B*H, segments, K, V]`` and the sums of log decays ``[B*H, segments, K]``, in the order of the
        walk, float32.
    """
    b, h, t, _ = k.shape
    k, v, log_decay = rows(k), rows(v), rows(log_decay)
    count, size = segment(t, b * h)
    states, logs = _summaries(k, v)
    options = tiles("summaries", k, v)
    grid = (b * h * count * triton.cdiv(k.shape[3], options["BK"]) * triton.cdiv(v.shape[3], options["BV"]),)
    strides = [s for x in (k, v, log_decay) for s in strides_of(x)]
    with torch.cuda.device_of(k):
        diagonal.summaries[grid](
            k, v, log_decay, states, logs, scale, *strides, h, t, count, size,
            READ=read, REVERSE=reverse, **options,
        )  # fmt: skip
    return states, logs


@diagonal_summaries.register_fake
def _(
    k: Tensor, v: Tensor, log_decay: Tensor, scale: float, read: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    return _summaries(k, v)


def _summaries(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = k.shape[0] * k.shape[1]
    count, _ = segment(k.shape[2], heads)
    states = k.new_empty(heads, count, k.shape[3], v.shape[3], dtype=_WIDE)
    return states, k.new_empty(heads, count, k.shape[3], dtype=_WIDE)


@torch.library.custom_op("spcompile::diagonal_prologue", mutates_args=())
def diagonal_prologue(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, log_decay: Tensor, scale: float, read: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`diagonal_summaries` of a forward, and of its way back, in that one's order, of (q, grad).

    Args:
        grad: of the outputs, ``[B, H, T, V]``.
        scale, read, reverse: of the forward.
    """
    b, h, t, _ = k.shape
    given = [rows(x) for x in (q, k, v, grad, log_decay)]
    count, size = segment(t, b * h)
    options = tiles("summaries", k, v)
    walk = b * h * count * triton.cdiv(k.shape[3], options["BK"]) * triton.cdiv(v.shape[3], options["BV"])
    found = *_summaries(k, v), *_summaries(k, v)
    strides = [s for x in given for s in strides_of(x)]
    with torch.cuda.device_of(k):
        diagonal.prologue[(2 * walk,)](
            *given, *found, scale, *strides, h, t, count, size, walk, READ=read, REVERSE=reverse, **options
        )
    return found


@diagonal_prologue.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, log_decay: Tensor, scale: float, read: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_summaries(k, v), *_summaries(k, v)


@torch.library.custom_op("spcompile::diagonal_within", mutates_args=())
def diagonal_within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor | None,
    log_decay: Tensor,
    scale: float,
    read: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``scale q_i D k_j`` of each pair of steps of a chunk, and what such pairs add to the gradients.

    Args:
        grad: of the outputs, ``[B, H, T, V]``; None: the scores alone.
    Returns:
        Scores ``[B*H, steps, CHUNK]`` in the order of the walk, whole segments, bf16 or else float32; and
        parts of dq, dk and of the gradient of ``log_decay``, ``[B, H, T, K]`` float32, or ``[0]``.
    """
    b, h, t, _ = k.shape
    given = [rows(x) for x in (q, k, v, v if grad is None else grad, log_decay)]
    found = _within(q, k, grad is not None)
    options = tiles("within", k, v)
    del options["WIDE"]
    count = found[0].shape[1] // CHUNK
    lies = strides_of(found[1]) if grad is not None else (0, 0, 0)
    strides = [s for x in given for s in strides_of(x)]
    with torch.cuda.device_of(k):
        diagonal.within[(b * h * count * (CHUNK // per_key.BLOCK.value),)](
            *given, *found, scale, *strides, *lies, h, t, count,
            READ=read, REVERSE=reverse, GRADS=grad is not None, **options,
        )  # fmt: skip
    return found


@diagonal_within.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor | None,
    log_decay: Tensor,
    scale: float,
    read: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _within(q, k, grad is not None)


def _within(q: Tensor, k: Tensor, grads: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = k.shape[0] * k.shape[1]
    count, size = segment(k.shape[2], heads)
    scores = k.new_empty(heads, count * size, CHUNK, dtype=narrow(q))
    dq, dk, dg = (k.new_empty(k.shape if grads else (0,), dtype=_WIDE) for _ in range(3))
    return scores, dq, dk, dg


@torch.library.custom_op("spcompile::diagonal_outputs", mutates_args=())
def diagonal_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scores: Tensor,
    states: Tensor | None,
    logs: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    scale: float,
    scaled: bool,
    read: int,
    reverse: bool,
    mirrored: bool,
) -> tuple[Tensor, Tensor]:
    """``scale * q_t U_t`` of every token of a walk.

    Args:
        scores: of :func:`diagonal_within`; of the walk the other way if ``mirrored``.
        states, logs, carry, fold: the state before each segment, or what it is made of (``chain.Before``).
        scaled: the scale is a factor of what is written, and so of ``states`` already, not of what is read.
    Returns:
        ``[B, H, T, V]`` contiguous, in q's dtype, and the state after the last segment ``[B*H, K, V]``.
    """
    b, h, t, _ = k.shape
    given = [rows(x) for x in (q, k, v, log_decay)]
    count, size = segment(t, b * h)
    out, final = _outputs(q, k, v)
    options = tiles("outputs, per key", k, v)
    parts = triton.cdiv(v.shape[3], options["BV"])
    strides = [*(s for x in given for s in strides_of(x)), *lie(states, carry), *strides_of(out)]
    with torch.cuda.device_of(k):
        diagonal.outputs[(b * h * count * parts,)](
            *given, scores, states, logs, carry, out, final, scale, *strides, h, t, count, size,
            FOLD=fold, READ=read, REVERSE=reverse, MIRRORED=mirrored, SCALED=scaled, **options,
        )  # fmt: skip
    return out, final


@diagonal_outputs.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scores: Tensor,
    states: Tensor | None,
    logs: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    scale: float,
    scaled: bool,
    read: int,
    reverse: bool,
    mirrored: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(q, k, v)


def _outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = k.shape[0] * k.shape[1]
    return _like(q, v), k.new_empty(heads, k.shape[3], v.shape[3], dtype=_WIDE)


def _like(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("spcompile::diagonal_columns", mutates_args=())
def diagonal_columns(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor | None,
    logs: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    plus: Tensor,
    mate: Tensor,
    kept: Tensor | None,
    given: Tensor,
    scale: float,
    read: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``q_t U_t`` of every token of a walk, read from before its chunk, with U's columns decaying.

    Args:
        log_decay: ``[B, H, T, V]``.
        states, logs, carry, fold: the state before each segment, or what it is made of (``chain.Before``).
        plus: what is added, and given: the gradient of ``log_decay`` so far; ``[B, H, T, V]`` contiguous,
            float32.
        mate: what the reading is the gradient of, ``[B, H, T, V]``.
        kept: None, where readings are scaled; or the states that the walk the other way has kept, where the
            scale is in what is written and in ``states``.
    Returns:
        ``[B, H, T, V]`` in q's dtype, the gradient of ``log_decay`` with what this walk knows of it, float32,
        both contiguous; without ``kept`` the states before each chunk ``[B*H, chunks, K, V]``, else ``[0]``.
    """
    b, h, t, _ = k.shape
    tensors = [rows(x) for x in (q, k, v, log_decay)]
    mate = rows(mate)
    count, size = segment(t, b * h)
    out, of_gate, keeps = _columns(q, k, v, kept)
    blank(keeps, 1, t, 1, reverse)
    options = tiles("outputs, per key", k, v)
    parts = triton.cdiv(v.shape[3], options["BV"])
    strides = [*(s for x in tensors for s in strides_of(x)), *lie(states, carry)]
    role = segments.READS if kept is None else segments.WRITES
    with torch.cuda.device_of(k):
        diagonal.columns[(b * h * count * parts,)](
            *tensors, states, logs, carry, plus, mate, keeps if kept is None else kept, given, of_gate, out,
            scale, *strides, *strides_of(mate), *strides_of(out), h, t, count, size,
            FOLD=fold, READ=read, REVERSE=reverse, ROLE=role.value, **options,
        )  # fmt: skip
    return out, of_gate, keeps


@diagonal_columns.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor | None,
    logs: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    plus: Tensor,
    mate: Tensor,
    kept: Tensor | None,
    given: Tensor,
    scale: float,
    read: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _columns(q, k, v, kept)


def _columns(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    heads = k.shape[0] * k.shape[1]
    count, size = segment(k.shape[2], heads)
    states = heads, count * size // CHUNK, k.shape[3], v.shape[3]
    keeps = q.new_empty(states if kept is None else (0,), dtype=narrow(q))
    return _like(q, v), v.new_empty(v.shape, dtype=_WIDE), keeps
