"""The kernels of the delta rule with a decay per key (``kernels/triton/delta_per_key.py``) as operators, with
their fake results.

q, k and log_decay are ``[B, H, T, K]``, v and the gradient of the outputs ``[B, H, T, V]`` and beta
``[B, H, T, 1]``, of any strides. Everything else is contiguous and as one of these operators has made it:
squares of chunks ``[B*H, steps, CHUNK]``, in the order of the forward's walk, without chunks of padding, and
tensors of tokens, ``[B*H, T, K]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from spcompile.kernels.linear.launch import CHUNK, dense, narrow, rows, segment, strides_of, tiles
from spcompile.kernels.triton import delta_per_key, delta_per_key_back

__all__ = ["kda_corrected", "kda_prepared", "kda_summaries", "kda_summaries_back", "kda_written"]
__all__ += ["kda_gradients", "kda_readings"]

_WIDE = torch.float32


def _chunks(k: Tensor) -> int:
    return (k.shape[2] + CHUNK - 1) // CHUNK


def _segments(k: Tensor) -> tuple[int, int]:
    return segment(k.shape[2], k.shape[0] * k.shape[1])


def _steps(k: Tensor) -> int:
    count, size = _segments(k)
    return count * size


def _square(k: Tensor, kind: torch.dtype) -> Tensor:
    return k.new_empty(k.shape[0] * k.shape[1], _chunks(k) * CHUNK, CHUNK, dtype=kind)


@torch.library.custom_op("spcompile::kda_prepared", mutates_args=())
def kda_prepared(
    q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, scale: float, read: int, reverse: bool
) -> list[Tensor]:
    """All that the chunks need that needs no state, of the walk forward and of that back.

    Args:
        read: how queries read, INCLUSIVE or EXCLUSIVE (``kernels/triton/tiles.py``); keys read INCLUSIVE.
    Returns:
        scores; systems and adjoints, X and Y^T (float16 where k is bf16, else float32);
        scale q and k decayed from the chunk's start, k decayed to its end ``[B*H, T, K]``, and the decay of
        each chunk ``[B*H, chunks, K]`` float32.
    """
    b, h, t, _ = k.shape
    q, k, log_decay = rows(q), rows(k), rows(log_decay)
    found = _prepared(k)
    options = tiles("prepared", k, k)
    for name in ("V", "BV", "WIDE"):
        del options[name]
    strides = [s for x in (q, k, log_decay, beta) for s in strides_of(x)]
    with torch.cuda.device_of(k):
        delta_per_key.prepared[(b * h * _chunks(k),)](
            q, k, log_decay, beta, *found, scale, *strides, h, t, _steps(k), _chunks(k),
            READ=read, REVERSE=reverse, **options,
        )  # fmt: skip
    return found


@kda_prepared.register_fake
def _(
    q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, scale: float, read: int, reverse: bool
) -> list[Tensor]:
    return _prepared(k)


def _prepared(k: Tensor) -> list[Tensor]:
    b, h, t, d = k.shape
    kind = torch.float16 if k.dtype == torch.bfloat16 else _WIDE
    found = [_square(k, narrow(k)), _square(k, kind), _square(k, kind)]
    found += [k.new_empty(b * h, t, d, dtype=narrow(k)) for _ in range(3)]
    return [*found, k.new_empty(b * h, _chunks(k), d, dtype=_WIDE)]


@torch.library.custom_op("spcompile::kda_summaries", mutates_args=())
def kda_summaries(
    k: Tensor, v: Tensor, beta: Tensor, prepared: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, Tensor]:
    """What each segment of the forward does to the state, ``U_after = A U_before + S``.

    Args:
        k: for its sizes alone.
        prepared: of :func:`kda_prepared`.
    Returns:
        S ``[B*H, segments, K, V]`` and A ``[B*H, segments, K, K]``, in the order of the walk,
        float32. The matrices of the walk back are A transposed.
    """
    b, h, t, _ = k.shape
    v = rows(v)
    _, systems, _, _, readers, writers, through = prepared
    count, size = _segments(k)
    found = _summaries(k, v)
    options = tiles("delta, per key", k, v)
    columns = sum(triton.cdiv(x.shape[3], options["BV"]) for x in (k, v))
    with torch.cuda.device_of(k):
        delta_per_key.summaries[(b * h * count * columns,)](
            readers, writers, v, systems, beta, through, *found,
            *strides_of(v), *strides_of(beta), h, t, _chunks(k), count, size, REVERSE=reverse, **options,
        )  # fmt: skip
    return found


@kda_summaries.register_fake
def _(k: Tensor, v: Tensor, beta: Tensor, prepared: Sequence[Tensor], reverse: bool) -> tuple[Tensor, Tensor]:
    return _summaries(k, v)


def _states(k: Tensor, v: Tensor, count: int, kind: torch.dtype) -> Tensor:
    return k.new_empty(k.shape[0] * k.shape[1], count, k.shape[3], v.shape[3], dtype=kind)


def _summaries(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    count, _ = _segments(k)
    return _states(k, v, count, _WIDE), _states(k, k, count, _WIDE)


@torch.library.custom_op("spcompile::kda_summaries_back", mutates_args=())
def kda_summaries_back(
    k: Tensor, grad: Tensor, beta: Tensor, prepared: Sequence[Tensor], reverse: bool
) -> Tensor:
    """S of each segment of the walk back, ``[B*H, segments, K, V]`` in its order, float32.

    Args:
        grad: of the outputs.
        k, beta, prepared, reverse: as of :func:`kda_summaries`.
    """
    b, h, t, _ = k.shape
    grad = rows(grad)
    scores, _, adjoints, *decayed, through = prepared
    count, size = _segments(k)
    states = _states(k, grad, count, _WIDE)
    options = tiles("delta, per key", k, grad)
    with torch.cuda.device_of(k):
        delta_per_key.summaries_back[(b * h * count * triton.cdiv(grad.shape[3], options["BV"]),)](
            *decayed, grad, scores, adjoints, beta, through, states,
            *strides_of(grad), *strides_of(beta), h, t, _chunks(k), count, size, REVERSE=reverse, **options,
        )  # fmt: skip
    return states


@kda_summaries_back.register_fake
def _(k: Tensor, grad: Tensor, beta: Tensor, prepared: Sequence[Tensor], reverse: bool) -> Tensor:
    return _states(k, grad, _segments(k)[0], _WIDE)


@torch.library.custom_op("spcompile::kda_written", mutates_args=())
def kda_written(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    prepared: Sequence[Tensor],
    states: Tensor | None,
    matrices: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    reverse: bool,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs, or if ``trained`` what the tokens write, n = beta e, and the errors of predictions e.

    Args:
        states, matrices, carry, fold: the state before each segment, or what it is made of, a
            ``chain.Before``.
        k, v, beta, prepared, reverse: as of :func:`kda_summaries`.
    Returns:
        ``[B, H, T, V]`` contiguous; if ``trained`` another of that, and the states before chunks
        ``[B*H, chunks, K, V]``, bf16 where k is, else float32; or ``[0]``. Last the state after the last
        segment ``[B*H, K, V]``, float32.
    """
    b, h, t, _ = k.shape
    v = rows(v)
    scores, systems, _, *decayed, through = prepared
    count, size = _segments(k)
    found = _written(k, v, trained)
    options = tiles("delta, per key", k, v)
    with torch.cuda.device_of(k):
        delta_per_key.written[(b * h * count * triton.cdiv(v.shape[3], options["BV"]),)](
            *decayed, v, scores, systems, beta, through, *dense(states, matrices, carry), *found,
            *strides_of(v), *strides_of(beta), h, t, _chunks(k), count, size,
            FOLD=fold, REVERSE=reverse, TRAINED=trained, **options,
        )  # fmt: skip
    return found


@kda_written.register_fake
def _(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    prepared: Sequence[Tensor],
    states: Tensor | None,
    matrices: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    reverse: bool,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _written(k, v, trained)


def _written(k: Tensor, v: Tensor, trained: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = _states(k, v, _chunks(k), narrow(k)) if trained else k.new_empty(0, dtype=narrow(k))
    return v.new_empty(v.shape), v.new_empty(v.shape if trained else (0,)), kept, _final(k, v)


def _final(k: Tensor, v: Tensor) -> Tensor:
    return _states(k, v, 1, _WIDE).squeeze(1)


@torch.library.custom_op("spcompile::kda_corrected", mutates_args=())
def kda_corrected(
    k: Tensor,
    grad: Tensor,
    beta: Tensor,
    prepared: Sequence[Tensor],
    states: Tensor | None,
    matrices: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    errors: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of v and of beta, and those of the states behind chunks.

    Args:
        states, matrices, carry, fold: the gradient of the state behind each segment, from the last one, or
            what it is made of (``chain.Before``); the matrices are those of the forward.
        errors: of :func:`kda_written`.
        k, grad, beta, prepared, reverse: as of :func:`kda_summaries_back`.
    Returns:
        ``[B, H, T, V]`` contiguous in the dtype of ``grad``, ``[B*H, T]`` float32, and
        ``[B*H, chunks, K, V]`` in the order of the forward, bf16 where k is, else float32. Last the gradient
        of the state before all tokens ``[B*H, K, V]``, float32.
    """
    b, h, t, _ = k.shape
    grad = rows(grad)
    scores, _, adjoints, *decayed, through = prepared
    count, size = _segments(k)
    options = tiles("delta, per key", k, grad)
    parts = triton.cdiv(grad.shape[3], options["BV"])
    out, of_beta, kept, final = _corrected(k, grad)
    sums = of_beta.new_empty(parts, *of_beta.shape)
    with torch.cuda.device_of(k):
        delta_per_key.corrected[(b * h * count * parts,)](
            *decayed, grad, scores, adjoints, beta, through, *dense(states, matrices, carry),
            errors, out, sums, kept, final,
            *strides_of(grad), *strides_of(beta), h, t, _chunks(k), count, size, b * h,
            FOLD=fold, REVERSE=reverse, **options,
        )  # fmt: skip
    torch.sum(sums, 0, out=of_beta)
    return out, of_beta, kept, final


@kda_corrected.register_fake
def _(
    k: Tensor,
    grad: Tensor,
    beta: Tensor,
    prepared: Sequence[Tensor],
    states: Tensor | None,
    matrices: Tensor | None,
    carry: Tensor | None,
    fold: bool,
    errors: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _corrected(k, grad)


def _corrected(k: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, t, _ = k.shape
    kept = _states(k, grad, _chunks(k), narrow(k))
    return grad.new_empty(grad.shape), k.new_empty(b * h, t, dtype=_WIDE), kept, _final(k, grad)


@torch.library.custom_op("spcompile::kda_readings", mutates_args=())
def kda_readings(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    written: Tensor,
    grad: Tensor,
    dv: Tensor,
    states: Tensor,
    grads: Tensor,
    scale: float,
    read: int,
    reverse: bool,
) -> list[Tensor]:
    """Weights of the pairs of chunks, and what comes from outside of a chunk.

    Args:
        written: n, and states: those before chunks, of :func:`kda_written`.
        grad: of the outputs.
        dv: and grads: of the states behind chunks, of :func:`kda_corrected`.
    Returns:
        Weights of queries and of keys; and parts of the gradients of q, k and log_decay,
        ``[B*H, T, K]`` float32.
    """
    b, h, t, _ = k.shape
    q, k, grad, log_decay = (rows(x) for x in (q, k, grad, log_decay))
    found = _readings(k)
    options = tiles("readings", k, grad)
    strides = [s for x in (q, k, log_decay, grad) for s in strides_of(x)]
    with torch.cuda.device_of(k):
        delta_per_key_back.readings[(b * h * _chunks(k),)](
            q, k, log_decay, written, grad, dv, states, grads, *found, scale, *strides,
            h, t, _steps(k), _chunks(k), READ=read, REVERSE=reverse, **options,
        )  # fmt: skip
    return found


@kda_readings.register_fake
def _(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    written: Tensor,
    grad: Tensor,
    dv: Tensor,
    states: Tensor,
    grads: Tensor,
    scale: float,
    read: int,
    reverse: bool,
) -> list[Tensor]:
    return _readings(k)


def _readings(k: Tensor) -> list[Tensor]:
    b, h, t, d = k.shape
    squares = [_square(k, narrow(k)) for _ in range(2)]
    return squares + [k.new_empty(b * h, t, d, dtype=_WIDE) for _ in range(3)]


@torch.library.custom_op("spcompile::kda_gradients", mutates_args=())
def kda_gradients(
    q: Tensor, k: Tensor, log_decay: Tensor, parts: Sequence[Tensor], read: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and log_decay, ``[B, H, T, K]`` contiguous; that of log_decay float32.

    Args:
        parts: of :func:`kda_readings`.
    """
    b, h, t, _ = k.shape
    q, k, log_decay = rows(q), rows(k), rows(log_decay)
    found = _gradients(q, k)
    options = tiles("within", k, k)
    for name in ("V", "BV", "WIDE"):
        del options[name]
    strides = [s for x in (q, k, log_decay) for s in strides_of(x)]
    with torch.cuda.device_of(k):
        delta_per_key_back.pairs[(b * h * _chunks(k) * 2,)](
            q, k, log_decay, *parts, *found, *strides, h, t, _steps(k), _chunks(k),
            READ=read, REVERSE=reverse, **options,
        )  # fmt: skip
    return found


@kda_gradients.register_fake
def _(
    q: Tensor, k: Tensor, log_decay: Tensor, parts: Sequence[Tensor], read: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(q, k)


def _gradients(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape, dtype=_WIDE)
