"""The kernels of the delta rule (``kernels/triton/delta.py``) as operators, with their fake results.

k, v, beta and log_decay are ``[B, H, T, *]`` of any strides; ``source`` is None, or q of the forward, where
v is the gradient of the outputs and the walk goes back: see ``delta.py`` for the two walks. ``reverse`` says
that the walk goes back from the last token, and ``scale`` is a factor of the source. The state before each
segment, or what it is made of (``states, matrices, carry, fold``), is a ``chain.Before``.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from spcompile.kernels.linear.launch import CHUNK, blank, dense, rows, segment, strides_of, tiles
from spcompile.kernels.triton import delta, inverse

__all__ = ["delta_corrected", "delta_outputs", "delta_prologue", "delta_summaries", "delta_systems"]

_NONE = (0, 0, 0)
# Kernels that read queries as well as keys have smaller blocks: they would spill.
_BOTH = "delta, back"
_WIDE = torch.float32


def _strides(*given: Tensor | None) -> list[int]:
    """Of batch, head and token of each operand."""
    return [s for x in given for s in (_NONE if x is None else strides_of(x))]


@torch.library.custom_op("spcompile::delta_systems", mutates_args=())
def delta_systems(k: Tensor, beta: Tensor, log_decay: Tensor | None, reverse: bool) -> Tensor:
    """Z = (I + L beta)^-1 L of each chunk of the forward's walk, L = strictly lower (k k^T . D).

    Returns:
        ``[B*H, steps, CHUNK]`` in the order of the walk, whole segments; fp16 where k is bf16, else float32.
    """
    b, h, t, _ = k.shape
    k, systems = rows(k), _systems(k)
    count = systems.shape[1] // CHUNK
    options = tiles("systems", k, k)
    for name in ("V", "BV"):
        del options[name]
    with torch.cuda.device_of(k):
        inverse.systems[(b * h * count,)](
            k, beta, log_decay, systems, *_strides(k, beta, log_decay), h, t, count,
            GATED=log_decay is not None, REVERSE=reverse, **options,
        )  # fmt: skip
    return systems


@delta_systems.register_fake
def _(k: Tensor, beta: Tensor, log_decay: Tensor | None, reverse: bool) -> Tensor:
    return _systems(k)


def _systems(k: Tensor) -> Tensor:
    heads = k.shape[0] * k.shape[1]
    count, size = segment(k.shape[2], heads)
    kind = torch.float16 if k.dtype == torch.bfloat16 else _WIDE
    return k.new_empty(heads, count * size, CHUNK, dtype=kind)


@torch.library.custom_op("spcompile::delta_summaries", mutates_args=())
def delta_summaries(
    source: Tensor | None,
    k: Tensor,
    v: Tensor,
    systems: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """What each segment of a walk does to the state, ``U_after = A U_before + S``.

    Args:
        systems: of :func:`delta_systems`.
    Returns:
        S ``[B*H, segments, K, V]`` and A ``[B*H, segments, K, K]``, in the order of the walk, float32.
    """
    b, h, t, _ = k.shape
    k, v, q = rows(k), rows(v), rows(k if source is None else source)
    count, size = segment(t, b * h)
    states, matrices = _summaries(k, v)
    options = tiles("delta" if source is None else _BOTH, k, v)
    columns = sum(triton.cdiv(x.shape[3], options["BV"]) for x in (k, v))
    with torch.cuda.device_of(k):
        delta.summaries[(b * h * count * columns,)](
            q, k, v, systems, beta, log_decay, states, matrices, scale,
            *_strides(q, k, v, beta, log_decay), h, t, count, size,
            GATED=log_decay is not None, REVERSE=reverse, BACK=source is not None, **options,
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
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    return _summaries(k, v)


def _summaries(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = k.shape[0] * k.shape[1]
    count, _ = segment(k.shape[2], heads)
    states, matrices = (k.new_empty(heads, count, k.shape[3], x.shape[3], dtype=_WIDE) for x in (v, k))
    return states, matrices


@torch.library.custom_op("spcompile::delta_prologue", mutates_args=())
def delta_prologue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    systems: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`delta_summaries` of a forward, and of its way back, in that one's order, of (q, grad).

    Args:
        grad: of the outputs, ``[B, H, T, V]``.
        reverse: of the forward.
    """
    b, h, t, _ = k.shape
    q, k, v, grad = (rows(x) for x in (q, k, v, grad))
    count, size = segment(t, b * h)
    found, options = (*_summaries(k, v), *_summaries(k, v)), tiles(_BOTH, k, v)
    walk = b * h * count * sum(triton.cdiv(x.shape[3], options["BV"]) for x in (k, v))
    with torch.cuda.device_of(k):
        delta.prologue[(2 * walk,)](
            q, k, v, grad, systems, beta, log_decay, *found, scale,
            *_strides(q, k, v, grad, beta, log_decay), h, t, count, size, walk,
            GATED=log_decay is not None, REVERSE=reverse, **options,
        )  # fmt: skip
    return found


@delta_prologue.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    systems: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_summaries(k, v), *_summaries(k, v)


@torch.library.custom_op("spcompile::delta_outputs", mutates_args=())
def delta_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    systems: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    states: Tensor | None,
    matrices: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """``scale * q_t U_t`` of every token of the forward's walk.

    Returns:
        ``[B, H, T, V]`` contiguous, in q's dtype, and the state after the last segment ``[B*H, K, V]``.
    """
    b, h, t, _ = k.shape
    q, k, v = rows(q), rows(k), rows(v)
    count, size = segment(t, b * h)
    options = tiles(_BOTH, k, v)
    out, final = _outputs(q, k, v)
    with torch.cuda.device_of(k):
        delta.outputs[(b * h * count * triton.cdiv(v.shape[3], options["BV"]),)](
            q, k, v, systems, beta, log_decay, *dense(states, matrices, carry), out, final, scale,
            *_strides(q, k, v, beta, log_decay), h, t, count, size,
            FOLD=fold, GATED=log_decay is not None, REVERSE=reverse, **options,
        )  # fmt: skip
    return out, final


@delta_outputs.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    systems: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    states: Tensor | None,
    matrices: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(q, k, v)


def _outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), _final(k, v)


def _final(k: Tensor, v: Tensor) -> Tensor:
    return k.new_empty(k.shape[0] * k.shape[1], k.shape[3], v.shape[3], dtype=_WIDE)


@torch.library.custom_op("spcompile::delta_corrected", mutates_args=())
def delta_corrected(
    source: Tensor | None,
    k: Tensor,
    v: Tensor,
    systems: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    states: Tensor | None,
    matrices: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    errors: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the tokens of a walk write, n = beta (v - prediction), or, with a source, the gradients of v.

    Args:
        systems: of the forward, of either walk.
        errors: with a source v - prediction, as the forward's walk gave them, else None.
    Returns:
        n ``[B, H, T, V]`` and the errors; or the gradients of v and, of beta, ``[parts, B*H, steps]`` in the
        order of the walk, float32, to be summed over the parts of V. The state before each segment
        ``[B*H, segments, K, V]`` if it is folded of ``states``, else ``[0]``, and the one after the last.
    """
    b, h, t, _ = k.shape
    k, v, q = rows(k), rows(v), rows(k if source is None else source)
    count, size = segment(t, b * h)
    options = tiles("delta" if source is None else _BOTH, k, v)
    out, second, before, final = _corrected(source, k, v, fold and states is not None)
    if source is not None:
        blank(second, 2, t, CHUNK, reverse)
    wrong = second if errors is None else errors.contiguous()
    with torch.cuda.device_of(k):
        delta.corrected[(b * h * count * triton.cdiv(v.shape[3], options["BV"]),)](
            q, k, v, systems, beta, log_decay, *dense(states, matrices, carry),
            before if before.numel() else None, out, wrong, second, final, scale,
            *_strides(q, k, v, beta, log_decay), h, t, count, size, b * h,
            FOLD=fold, GATED=log_decay is not None, REVERSE=reverse, BACK=source is not None, **options,
        )  # fmt: skip
    return out, second, before, final


@delta_corrected.register_fake
def _(
    source: Tensor | None,
    k: Tensor,
    v: Tensor,
    systems: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    states: Tensor | None,
    matrices: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    errors: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _corrected(source, k, v, fold and states is not None)


def _corrected(
    source: Tensor | None, k: Tensor, v: Tensor, folded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = k.shape[0] * k.shape[1]
    count, size = segment(k.shape[2], heads)
    parts = triton.cdiv(v.shape[3], tiles(_BOTH, k, v)["BV"])
    second = v.new_empty(v.shape) if source is None else k.new_empty(parts, heads, count * size, dtype=_WIDE)
    before = k.new_empty((heads, count, k.shape[3], v.shape[3]) if folded else 0, dtype=_WIDE)
    return v.new_empty(v.shape), second, before, _final(k, v)
