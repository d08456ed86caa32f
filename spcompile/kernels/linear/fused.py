"""Linear attention on GPUs with one decay per token and head, or none, in two fused kernels.

``kernels/triton/segments.py`` has the kernels; here they are operators, and the forward and the backward over
them (``kernel.py``). A run of tokens is cut into segments, inside which nothing but outputs goes to memory:

    made     summaries: what each segment does to the state
    total    what all of them together do
    local    nothing: to read the operands once more would cost more than an exchange (in the backward dq,
             which needs no gradient of the state)
    finish   the states before each segment (``spcompile::affine_scan``), then outputs
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from spcompile.kernels.linear.gate import gradient
from spcompile.kernels.linear.operands import Operands, Options
from spcompile.kernels.triton import segments
from spcompile.kernels.triton.tiles import EXCLUSIVE, INCLUSIVE, SOURCE

__all__ = ["Backward", "Forward", "supports", "tiles"]

CHUNK = 64
# Tokens of a segment, at least. 16K tokens per rank are 32 segments: with 4 heads, as many programs as an
# H100 has multiprocessors.
_SEGMENT = 512
# A scan over more segments than this would take longer than it saves.
_MOST = 128


def supports(x: Operands) -> bool:
    """Whether the kernels take such operands."""
    floats = (torch.bfloat16, torch.float16, torch.float32)
    one_gate = x.log_decay is None or x.log_decay.shape[3] == 1
    return x.k.dtype in floats and x.beta is None and one_gate and max(x.k.shape[3], x.v.shape[3]) <= 256


def _segment(tokens: int) -> tuple[int, int]:
    """How many segments, and their tokens: whole chunks."""
    size = max(_SEGMENT, CHUNK * ((tokens + _MOST * CHUNK - 1) // (_MOST * CHUNK)))
    return (tokens + size - 1) // size, size


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, head and token; of a dim of one entry any will do."""
    assert x.stride(-1) == 1 or x.shape[-1] == 1
    return x.stride(0), x.stride(1), x.stride(2)


def _rows(x: Tensor) -> Tensor:
    """``x`` with its last dim next to each other in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# kernel -> the largest blocks of K and of V: what fits into the registers of sm_90. Where all of K has to be
# in one block and is more than 128, the blocks of V are halved.
_BLOCKS = {"summaries": (128, 64), "outputs": (256, 64), "pairs": (64, 64)}


def tiles(kernel: str, k: Tensor, v: Tensor) -> dict[str, Any]:
    """How a kernel of ``segments.py`` is compiled for keys and values: sizes, precision and warps."""
    block_k, block_v = (max(16, triton.next_power_of_2(x.shape[3])) for x in (k, v))
    most_k, most_v = _BLOCKS[kernel]
    halved = kernel == "outputs" and block_k > 128
    return {
        "K": k.shape[3],
        "V": v.shape[3],
        "BK": min(block_k, most_k),
        "BV": min(block_v, most_v // 2 if halved else most_v),
        "C": CHUNK,
        "WIDE": k.dtype != torch.bfloat16,
        "PRECISION": "tf32x3" if k.dtype == torch.float32 else "tf32",
        "num_warps": 4 if block_k <= 64 else 8,
        "num_stages": 2,
    }


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
    k, v = _rows(k), _rows(v)
    count, size = _segment(t)
    states = k.new_empty(b * h, count, k.shape[3], v.shape[3], dtype=torch.float32)
    logs = k.new_zeros(b * h, count, dtype=torch.float32)
    options = tiles("summaries", k, v)
    gate = (0, 0, 0) if log_decay is None else _strides(log_decay)
    grid = (b * h * count * triton.cdiv(k.shape[3], options["BK"]) * triton.cdiv(v.shape[3], options["BV"]),)
    with torch.cuda.device_of(k):
        segments.summaries[grid](
            k, v, log_decay, states, logs, scale, *_strides(k), *_strides(v), *gate, h, t, count, size,
            GATED=log_decay is not None, READ=read, REVERSE=reverse, **options,
        )  # fmt: skip
    return states, logs


@segment_summaries.register_fake
def _(
    k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, read: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    b, h, t, _ = k.shape
    count, _ = _segment(t)
    states = k.new_empty(b * h, count, k.shape[3], v.shape[3], dtype=torch.float32)
    return states, k.new_empty(b * h, count, dtype=torch.float32)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``scale * q_t U_t`` of every token of a walk, and what the gradient of a decay needs (``gate.py``).

    Args:
        before: the state before each segment, ``[B*H, segments, K, V]``, float32, of any strides.
        other: ``[B, H, T, V]`` where the gradient of the decay is asked for, else None.
        kept: None, or the states that the walk the other way has kept.
        scaled: the scale is a factor of what is written, and so of ``before`` already, not of what is read.
        q, k, v, log_decay, read, reverse: as of :func:`segment_summaries`.
    Returns:
        ``[B, H, T, V]`` in q's dtype, contiguous. If there is ``other``, then its product with what is read
        from before the chunk, of each step of the walk (whole segments) ``[B*H, steps]``; and without
        ``kept`` the states before each chunk ``[B*H, chunks, K, V]``, with ``kept`` the products of the
        states ``[B*H, chunks]``. ``[0]`` for what there is not.
    """
    b, h, t, _ = k.shape
    q, k, v = _rows(q), _rows(k), _rows(v)
    other = None if other is None else _rows(other)
    count, size = _segment(t)
    options = tiles("outputs", k, v)
    parts = triton.cdiv(v.shape[3], options["BV"])
    out = q.new_empty(b, h, t, v.shape[3])
    shapes = _of_gate(k, v, other is not None, kept is not None)
    inner, sums = (q.new_zeros(parts, *shape, dtype=torch.float32) for shape in shapes[:2])
    keeps = q.new_zeros(shapes[2], dtype=q.dtype)
    gate, mate = ((0, 0, 0) if x is None else _strides(x) for x in (log_decay, other))
    strides = [*_strides(q), *_strides(k), *_strides(v), *gate, *before.stride(), *mate, *_strides(out)]
    roles = (0, segments.READS.value, segments.WRITES.value)
    with torch.cuda.device_of(k):
        segments.outputs[(b * h * count * parts,)](
            q, k, v, log_decay, before, other, keeps if kept is None else kept, out, inner, sums, scale,
            *strides, h, t, count, size, b * h,
            SCALED=scaled, OF_GATE=roles[(other is not None) + (kept is not None)],
            GATED=log_decay is not None, READ=read, REVERSE=reverse, **options,
        )  # fmt: skip
    return out, inner.sum(0), sums.sum(0), keeps


def _of_gate(k: Tensor, v: Tensor, asked: bool, kept: bool) -> list[tuple[int, ...]]:
    """Shapes of what the gradient of a decay needs."""
    if not asked:
        return [(0,)] * 3
    (b, h), (count, size) = k.shape[:2], _segment(k.shape[2])
    steps, chunks = (b * h, count * size), (b * h, count * size // CHUNK)
    return [steps, chunks, (0,)] if kept else [steps, (0,), (*chunks, k.shape[3], v.shape[3])]


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
    given = [_rows(x) for x in (q, k, v, grad)]
    count, size = _segment(t)
    sums = k.new_empty(b * h, count * size, dtype=torch.float32)
    options = tiles("pairs", k, v)
    strides = [s for x in (*given, log_decay) for s in _strides(x)]
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
    count, size = _segment(k.shape[2])
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inner, sums, keeps = _of_gate(k, v, other is not None, kept is not None)
    wide = {"dtype": torch.float32}
    out = q.new_empty(*k.shape[:3], v.shape[3])
    return out, q.new_empty(inner, **wide), q.new_empty(sums, **wide), q.new_empty(keeps)


ops = torch.ops.spcompile
_NO = (None, None)


class _Walk:
    """One way through the tokens: with k and v what is written, and how it is read."""

    def __init__(
        self, k: Tensor, v: Tensor, gate: Tensor | None, scale: float, read: int, reverse: bool
    ) -> None:
        self.k, self.v, self.gate, self.read, self.reverse = k, v, gate, read, reverse
        self.states, logs = ops.segment_summaries(k, v, gate, scale, read, reverse)
        self.logs = None if gate is None else logs.unflatten(-1, (-1, 1, 1))

    def of(self, k: Tensor, v: Tensor) -> _Walk:
        """The same way with something else written; the states must be given to it."""
        other = copy(self)
        other.k, other.v = k, v
        return other

    def heads(self, state: Tensor) -> Tensor:
        """A state ``[N, ...]`` as ``[B, H, ...]``."""
        return state.reshape(*self.k.shape[:2], *state.shape[1:])

    def total(self) -> tuple[Tensor, ...]:
        """What all segments together do to the state."""
        if self.logs is None:
            return (self.heads(self.states.sum(1)),)
        later = (
            F.pad(self.logs.narrow(1, 1, self.logs.shape[1] - 1), (0, 0, 0, 0, 0, 1))
            .flip(1)
            .cumsum(1)
            .flip(1)
        )
        return self.heads(self.logs.sum(1)), self.heads((later.exp() * self.states).sum(1))

    def before(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """States ``[N, segments, K, V]`` before each segment, and the one ``[N, K, V]`` after the last."""
        a = None if self.logs is None else self.logs.exp()
        start = None if carry is None else carry.flatten(0, 1).float()
        return ops.affine_scan(a, self.states, start, False)

    def outputs(
        self, q: Tensor, before: Tensor, scale: float, *, scaled: bool = False, of_gate: tuple[Any, Any] = _NO
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What every step reads; ``of_gate`` are ``other`` and ``kept`` of :func:`segment_outputs`."""
        how = *of_gate, scale, scaled, self.read, self.reverse
        return ops.segment_outputs(q, self.k, self.v, self.gate, before, *how)


class Forward:
    """See :class:`spcompile.kernels.linear.kernel.Forward`."""

    def __init__(self, x: Operands, options: Options) -> None:
        self.x, self.options = x, options
        self.walk = _forward_walk(x, options)

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the state."""
        return self.walk.total()

    def local(self) -> None:
        """Nothing."""

    def finish(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs, and the state after the last token."""
        w = self.walk
        before, final = w.before(carry)
        out, *_ = w.outputs(self.x.q, before, self.options.scale)
        return out, w.heads(final)


class Backward:
    """See :class:`spcompile.kernels.linear.kernel.Backward`: a walk for each of dq, dk and dv."""

    def __init__(self, x: Operands, options: Options, grad: Tensor, carry: Tensor | None) -> None:
        self.x, self.options, self.carry = x, options, carry
        self.grad = grad.to(x.q.dtype)
        read = EXCLUSIVE.value if options.exclusive else SOURCE.value
        self.walk = _Walk(x.q, self.grad, _gate(x), options.scale, read, not options.reverse)

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the gradient of the state."""
        return self.walk.total()

    def local(self) -> None:
        """dq, which reads the states of the forward."""
        x, forward = self.x, _forward_walk(self.x, self.options)
        before, _ = forward.before(self.carry)
        of_gate = _NO if x.log_decay is None else (x.q, None)
        back = forward.of(x.v, x.k).outputs(self.grad, before.mT, self.options.scale, of_gate=of_gate)
        self.dq, self.reads, _, self.kept = back
        if x.log_decay is not None:
            w = forward
            how = w.gate, self.options.scale, w.read, w.reverse
            self.pairs = ops.segment_pairs(x.q, x.k, x.v, self.grad, *how)

    def finish(self, carry: Tensor | None) -> tuple[Tensor | None, ...]:
        """The other gradients, which read the gradient of the state."""
        x, w, scale = self.x, self.walk, self.options.scale
        before, initial = w.before(carry)
        dv, *_ = w.outputs(x.k, before, scale, scaled=True)
        of_gate = _NO if x.log_decay is None else (x.k, self.kept)
        back = w.of(self.grad, x.q).outputs(x.v, before.mT, scale, scaled=True, of_gate=of_gate)
        dk, writes, across, _ = back
        decay = None
        if x.log_decay is not None:
            decay = gradient(self.pairs, self.reads, writes.flip(1), across, self.options.exclusive)
            decay = decay.flip(1) if self.options.reverse else decay
            decay = w.heads(decay).narrow(2, 0, x.k.shape[2]).unsqueeze(-1)
            decay = decay.sum_to_size(x.log_decay.shape)
            decay = decay.to(x.log_decay.dtype).contiguous()
        state = x.initial_state
        of_state = None if state is None else w.heads(initial).to(state.dtype).contiguous()
        return self.dq, dk, dv, decay, None, of_state


def _gate(x: Operands) -> Tensor | None:
    return None if x.log_decay is None else x.log_decay.float().expand(*x.k.shape[:3], 1)


def _forward_walk(x: Operands, options: Options) -> _Walk:
    read = EXCLUSIVE.value if options.exclusive else INCLUSIVE.value
    return _Walk(x.k, x.v, _gate(x), 1.0, read, options.reverse)
