"""The kernels of the delta rule (``kernels/triton/delta.py``) as operators, with their fake results.

k, v, beta and log_decay are ``[B, H, T, *]`` of any strides; ``source`` is None, or q of the forward, where
v is the gradient of the outputs: see ``delta.py`` for the two walks.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from spcompile.kernels.linear.launch import CHUNK, rows, segment, strides_of, tiles
from spcompile.kernels.triton import delta

__all__ = ["delta_corrected", "delta_summaries", "delta_systems"]

_NONE = (0, 0, 0)


def _gate(log_decay: Tensor | None) -> tuple[int, int, int]:
    return _NONE if log_decay is None else strides_of(log_decay)


@torch.library.custom_op("spcompile::delta_systems", mutates_args=())
def delta_systems(k: Tensor, beta: Tensor, log_decay: Tensor | None, read: int, reverse: bool) -> Tensor:
    """X = (I + strictly lower (k k^T . D) beta)^-1 of each chunk of a walk.

    Args:
        read: INCLUSIVE or SOURCE (``kernels/triton/tiles.py``).
        reverse: the walk goes back from the last token.
    Returns:
        ``[B*H, steps, CHUNK]`` in the order of the walk, whole segments; bf16 where k is, else float32.
    """
    b, h, t, _ = k.shape
    k, inverses = rows(k), _systems(k)
    count = inverses.shape[1] // CHUNK
    options = tiles("delta", k, k)
    for name in ("V", "BV"):
        del options[name]
    with torch.cuda.device_of(k):
        delta.systems[(b * h * count,)](
            k, beta, log_decay, inverses, *strides_of(k), *strides_of(beta), *_gate(log_decay), h, t, count,
            GATED=log_decay is not None, READ=read, REVERSE=reverse, **options,
        )  # fmt: skip
    return inverses


@delta_systems.register_fake
def _(k: Tensor, beta: Tensor, log_decay: Tensor | None, read: int, reverse: bool) -> Tensor:
    return _systems(k)


def _systems(k: Tensor) -> Tensor:
    count, size = segment(k.shape[2])
    kind = torch.float16 if k.dtype == torch.bfloat16 else torch.float32
    return k.new_empty(k.shape[0] * k.shape[1], count * size, CHUNK, dtype=kind)


@torch.library.custom_op("spcompile::delta_summaries", mutates_args=())
def delta_summaries(
    source: Tensor | None,
    k: Tensor,
    v: Tensor,
    systems: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    read: int,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """What each segment of a walk does to the state, ``U_after = A U_before + S``.

    Args:
        systems: of :func:`delta_systems`.
        scale: a factor of the source.
    Returns:
        S ``[B*H, segments, K, V]`` and A ``[B*H, segments, K, K]``, in the order of the walk, float32.
    """
    b, h, t, _ = k.shape
    k, v = rows(k), rows(v)
    source = None if source is None else rows(source)
    count, size = segment(t)
    states, matrices = _summaries(k, v)
    options = tiles("delta", k, v)
    columns = sum(triton.cdiv(x.shape[3], options["BV"]) for x in (k, v))
    strides = [*(_NONE if source is None else strides_of(source)), *strides_of(k), *strides_of(v)]
    with torch.cuda.device_of(k):
        delta.summaries[(b * h * count * columns,)](
            k if source is None else source, k, v, systems, beta, log_decay, states, matrices, scale,
            *strides, *strides_of(beta), *_gate(log_decay), h, t, count, size,
            GATED=log_decay is not None, READ=read, REVERSE=reverse, SOURCE=source is not None, **options,
        )  # fmt: skip
    return states, matrices


@delta_summaries.register_fake
def _(
    source: Tensor | None,
    k: Tensor,
    v: Tensor,
    systems: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    read: int,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    return _summaries(k, v)


def _summaries(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads, count = k.shape[0] * k.shape[1], segment(k.shape[2])[0]
    states, matrices = (
        k.new_empty(heads, count, k.shape[3], x.shape[3], dtype=torch.float32) for x in (v, k)
    )
    return states, matrices


@torch.library.custom_op("spcompile::delta_corrected", mutates_args=())
def delta_corrected(
    source: Tensor | None,
    k: Tensor,
    v: Tensor,
    systems: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    before: Tensor,
    errors: Tensor | None,
    scale: float,
    read: int,
    reverse: bool,
    trained: bool,
) -> tuple[Tensor, Tensor]:
    """What the tokens of a walk write, n = beta (v - prediction), or, with a source, the gradients of v.

    Args:
        before: the state before each segment, ``[B*H, segments, K, V]``, float32, of any strides.
        errors: with a source those that the forward's walk gave, else None.
        trained: without a source: the errors v - prediction are asked for.
        source, k, v, systems, beta, log_decay, scale, read, reverse: as of :func:`delta_summaries`.
    Returns:
        n ``[B, H, T, V]`` and the errors, or the gradients of v and, of beta, ``[B*H, steps]`` in the order
        of the walk, float32. ``[0]`` for what there is not.
    """
    b, h, t, _ = k.shape
    k, v = rows(k), rows(v)
    source = None if source is None else rows(source)
    count, size = segment(t)
    options = tiles("delta", k, v)
    parts = triton.cdiv(v.shape[3], options["BV"])
    out, second = _corrected(source, k, v, trained)
    sums = k.new_zeros(parts, *second.shape, dtype=torch.float32) if source is not None else None
    wrong = (second if trained else None) if errors is None else errors.contiguous()
    strides = [*(_NONE if source is None else strides_of(source)), *strides_of(k), *strides_of(v)]
    with torch.cuda.device_of(k):
        delta.corrected[(b * h * count * parts,)](
            k if source is None else source, k, v, systems, beta, log_decay, before, out, wrong, sums, scale,
            *strides, *strides_of(beta), *_gate(log_decay), *before.stride(), h, t, count, size, b * h,
            GATED=log_decay is not None, READ=read, REVERSE=reverse, SOURCE=source is not None, **options,
        )  # fmt: skip
    return out, second if sums is None else sums.sum(0)


@delta_corrected.register_fake
def _(
    source: Tensor | None,
    k: Tensor,
    v: Tensor,
    systems: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    before: Tensor,
    errors: Tensor | None,
    scale: float,
    read: int,
    reverse: bool,
    trained: bool,
) -> tuple[Tensor, Tensor]:
    return _corrected(source, k, v, trained)


def _corrected(source: Tensor | None, k: Tensor, v: Tensor, trained: bool) -> tuple[Tensor, Tensor]:
    out = v.new_empty(v.shape)
    if source is None:
        return out, v.new_empty(v.shape if trained else (0,))
    count, size = segment(k.shape[2])
    return out, k.new_empty(k.shape[0] * k.shape[1], count * size, dtype=torch.float32)
