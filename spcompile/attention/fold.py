"""The fold of the ranks' summaries as an operator: Inductor need not compile it (``kernels/choice.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile.attention.algebra import ALGEBRAS, fold
from spcompile.kernels.scan import own_dtypes

__all__ = ["folded"]


@torch.library.custom_op("spcompile::folded", mutates_args=())
def folded(
    transitions: Tensor | None,
    states: Tensor,
    keep: Tensor,
    initial: Tensor | None,
    algebra: str,
    later: bool,
) -> Tensor:
    """The state after the kept runs of tokens, one after the other.

    Args:
        transitions: A of each rank's run, ``[P, ...]``, as the algebra has it; None is 1.
        states: S of each rank's run, ``[P, ...]``.
        keep: ``[P]`` bool, the ranks that count.
        initial: the state before the first run, like one of ``states``; None: zero.
        algebra: a name of ``attention/algebra.py``.
        later: time runs from the last rank to the first.
    """
    with own_dtypes(states):
        row = ALGEBRAS[algebra]
        stack = (states,) if transitions is None else (transitions, states)
        whole = fold(row, stack, keep, reverse=later)
        state = whole[-1] if initial is None else row.apply(whole, initial)
        # Of one rank the fold is what it was given, and an operator returns memory of its own.
        return state.to(states.dtype).clone(memory_format=torch.contiguous_format)


@folded.register_fake
def _(
    transitions: Tensor | None,
    states: Tensor,
    keep: Tensor,
    initial: Tensor | None,
    algebra: str,
    later: bool,
) -> Tensor:
    return states.new_empty(states.shape[1:])
