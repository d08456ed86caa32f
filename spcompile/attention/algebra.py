"""The associative algebra of memory states: what a run of tokens does to the state, and how two runs compose.

A linear-attention variant is the recurrence S_t = A_t S_{t-1} + k_t^T v_t. A run of tokens maps the state
before it to the state after it by an affine map (A, S): S_after = A S_before + S. Two runs compose by

    (A2, S2) o (A1, S1) = (A2 A1, A2 S1 + S2)        "2" is the later run

which is associative with identity (1, 0), so a sequence can be cut into ranks and chunks anywhere. A
variant is one row of :data:`ALGEBRAS`; a strategy says how summaries cross ranks and sees nothing else of
the variant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ALGEBRAS", "BASIC", "StateAlgebra", "Summary", "fold", "pack", "summary_shapes", "unpack"]

# What a run of tokens does to the state: the tensors of (A, S), S last. Leading dims are free (ranks,
# chunks). The basic algebra, where A is 1, is just (S,).
Summary = tuple[Tensor, ...]


@dataclass(frozen=True)
class StateAlgebra:
    """One variant's row.

    Attributes:
        name: the variant's name.
        summarise: the summary of a run from the tokens' operands, token dim second to last.
        combine: ``combine(later, earlier)``, elementwise over leading dims.
        identity: the neutral summary in the shape of the given one.
    """

    name: str
    summarise: Callable[..., Summary]
    combine: Callable[[Summary, Summary], Summary]
    identity: Callable[[Summary], Summary]


def _basic_summarise(k: Tensor, v: Tensor) -> Summary:
    return (k.mT @ v,)


def _basic_combine(later: Summary, earlier: Summary) -> Summary:
    # A = 1 on both sides: A2 S1 + S2 = S1 + S2 (the plain sum of LASP-2, algorithm 2).
    return (earlier[0] + later[0],)


def _basic_identity(like: Summary) -> Summary:
    return (torch.zeros_like(like[0]),)


BASIC = StateAlgebra("basic", _basic_summarise, _basic_combine, _basic_identity)

ALGEBRAS = {row.name: row for row in (BASIC,)}


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
    neutral = algebra.identity(summaries)
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
