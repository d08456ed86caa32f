"""The associative algebra of memory states: what a run of tokens does to the state, and how two runs compose.

A linear-attention variant is the recurrence S_t = A_t S_{t-1} + k_t^T v_t. A run of tokens maps the state
before it to the state after it by an affine map (A, S): S_after = A S_before + S. Two runs compose by

    (A2, S2) o (A1, S1) = (A2 A1, A2 S1 + S2)        "2" is the later run

which is associative with identity (1, 0), so a sequence can be cut into ranks and chunks anywhere. What sets
the variants apart is the form of A, one row of :data:`ALGEBRAS` each; a strategy says how summaries cross
ranks and sees nothing else of the variant. A running maximum is the same over (max, +) in place of (+, *).

The backward recurrence is R_{t-1} = A_t^T R_t + q_t^T do_t: the same algebra with A transposed and time
reversed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spcompile.kernels.linear.operands import Operands

__all__ = [
    "AFFINE",
    "ALGEBRAS",
    "BASIC",
    "DECAY",
    "MATRIX",
    "MAXIMUM",
    "StateAlgebra",
    "Summary",
    "algebra_of",
    "fold",
    "identity",
    "pack",
    "summary_shapes",
    "unpack",
]

# What a run of tokens does to the state: the tensors of (A, S), S last. Leading dims are free (ranks,
# chunks). The basic algebra, where A is 1, is just (S,).
Summary = tuple[Tensor, ...]


@dataclass(frozen=True)
class StateAlgebra:
    """The form of A, as ranks exchange it.

    Attributes:
        name: what it is called.
        transition: how A is represented, for people.
        act: ``act(A, S)`` = A S, elementwise over leading dims.
        compose: ``compose(A2, A1)`` = the representation of A2 A1.
        neutral: the representation of 1 in the shape of the given one.
        add: the sum of two states.
        zero: the state that adds nothing.
        mixes: whether A mixes rows of the state, or acts on each entry by itself. It never mixes columns.
    """

    name: str
    transition: str
    act: Callable[[Tensor, Tensor], Tensor]
    compose: Callable[[Tensor, Tensor], Tensor]
    neutral: Callable[[Tensor], Tensor]
    add: Callable[[Tensor, Tensor], Tensor] = torch.add
    zero: float = 0.0
    mixes: bool = False

    def apply(self, summary: Summary, state: Tensor) -> Tensor:
        """The state after a run of this ``summary`` that starts at ``state``: A state + S."""
        moved = state if len(summary) == 1 else self.act(summary[0], state)
        return self.add(moved, summary[-1])

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        """The summary of the earlier run followed by the later one, elementwise over leading dims."""
        state = self.apply(later, earlier[-1])
        return (state,) if len(later) == 1 else (self.compose(later[0], earlier[0]), state)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


BASIC = StateAlgebra("basic", "1", lambda a, s: s, lambda a2, a1: a2, torch.ones_like)
"""Summary (S,): the plain sum of LASP-2, algorithm 2."""

DECAY = StateAlgebra(
    "decay",
    "Diag(exp(g)), g the sum of the log decays",
    lambda g, s: g.exp() * s,
    lambda g2, g1: g2 + g1,
    torch.zeros_like,
)
"""Summary (g, S), g ``[..., 1, 1]`` or ``[..., K, 1]``: decay travels as sums of logs, never as products."""

MATRIX = StateAlgebra(
    "matrix", "a matrix M, K x K", lambda m, s: m @ s, lambda m2, m1: m2 @ m1, lambda m: _eye(m), mixes=True
)
"""Summary (M, S), M ``[..., K, K]``: the delta rules, and affine scans that mix rows of the state."""

AFFINE = StateAlgebra(
    "affine", "elementwise factors a", lambda a, s: a * s, lambda a2, a1: a2 * a1, torch.ones_like
)
"""Summary (a, S), a broadcastable to S, of any sign: affine scans of a user's own recurrence."""

MAXIMUM = StateAlgebra(
    "maximum",
    "a number that is added",
    lambda a, s: s + a,
    lambda a2, a1: a1 + a2,
    torch.zeros_like,
    torch.maximum,
    -math.inf,
)
"""Summary (a, S), a broadcastable to S, below inf: running maxima."""

ALGEBRAS = {row.name: row for row in (BASIC, DECAY, MATRIX, AFFINE, MAXIMUM)}


def algebra_of(x: Operands) -> StateAlgebra:
    """The form of A of a call of ``linear_attention``."""
    return MATRIX if x.beta is not None else BASIC if x.log_decay is None else DECAY


def identity(algebra: StateAlgebra, like: Summary) -> Summary:
    """The neutral summary in the shape of the given one."""
    return (*(algebra.neutral(a) for a in like[:-1]), torch.full_like(like[-1], algebra.zero))


def fold(algebra: StateAlgebra, summaries: Summary, keep: Tensor, reverse: bool = False) -> Summary:
    """Compose the kept summaries of a stack; the others count as the identity.

    The stack is combined in neighbouring pairs, log2(P) times: the same bracketing on every rank whatever
    ``keep`` holds (it is known at run time only), and a graph whose size does not grow with P.

    Args:
        summaries: tensors ``[P, ...]``, entry p the summary of rank p, in the order of the sequence.
        keep: ``[P]`` bool.
        reverse: time runs from the last entry to the first (the backward recurrence).
    Returns:
        the composed summary, without the leading dim.
    """
    neutral = identity(algebra, summaries)
    stack = tuple(
        torch.where(keep.reshape(-1, *[1] * (x.dim() - 1)), x, zero)
        for x, zero in zip(summaries, neutral, strict=True)
    )
    while (size := stack[0].shape[0]) > 1:
        even = size - size % 2
        first, second = (tuple(x[i:even:2] for x in stack) for i in (0, 1))
        pairs = algebra.combine(first, second) if reverse else algebra.combine(second, first)
        odd = tuple(x[even:] for x in stack)
        stack = tuple(torch.cat([p, o]) for p, o in zip(pairs, odd, strict=True)) if size % 2 else pairs
    return tuple(x.squeeze(0) for x in stack)


def summary_shapes(summary: Summary) -> tuple[torch.Size, ...]:
    """Shapes of a summary's tensors, for :func:`unpack`."""
    return tuple(x.shape for x in summary)


def pack(summary: Summary) -> Tensor:
    """All tensors of a summary in one flat buffer, so that one collective moves them."""
    if len(summary) == 1:
        return summary[0].reshape(-1)
    return torch.cat([x.reshape(-1) for x in summary])


def unpack(stack: Tensor, shapes: Sequence[torch.Size]) -> Summary:
    """``[P, n]`` packed buffers back to a stack of summaries, tensors ``[P, *shape]``."""
    parts = stack.split([math.prod(shape) for shape in shapes], dim=1) if len(shapes) > 1 else (stack,)
    return tuple(part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True))
