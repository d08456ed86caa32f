"""What a strategy is: the sharded forward and backward of an attention operator, on this rank's tensors.

Rank r holds tokens [r*block, (r+1)*block) of a :class:`~spcompile.collectives.Sequence`; tokens at or after
``length`` are padding with any content (NaN in a debug mode), and no valid result may depend on them.
``sequence`` None is a sequence that this rank holds whole: the same code without collectives.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from spcompile.collectives import Sequence, local_valid
from spcompile.kernels.linear.chunked import Operands, Options

__all__ = ["LinearStrategy", "SoftmaxStrategy", "masked"]


class LinearStrategy(Protocol):
    """Sharded ``spcompile::linear_attention`` and ``spcompile::affine_scan``."""

    def linear_forward(
        self, x: Operands, options: Options, sequence: Sequence | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's rows of the output, the state after the last token, and ``carry`` for the backward.

        Args:
            x: operands of this rank's ``block`` tokens; the initial state is the whole sequence's.
        Returns:
            out ``[B, H, block, V]`` in q's dtype; final ``[B, H, K, V]`` in float32 (float64), alike on all
            ranks; carry, the state before this rank's first token, or of the whole sequence if not causal.
            None is zero.
        """
        ...

    def linear_backward(
        self,
        grad: Tensor,
        grad_final: Tensor | None,
        x: Operands,
        options: Options,
        carry: Tensor | None,
        sequence: Sequence | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the operands, None for those that are None.

        Those of this rank's tokens; of a constant decay this rank's *term*; of the initial state the whole.
        """
        ...

    def scan(
        self,
        a: Tensor | None,
        b: Tensor,
        initial: Tensor | None,
        *,
        matrix: bool,
        reverse: bool,
        sequence: Sequence | None,
    ) -> tuple[Tensor, Tensor]:
        """``affine_scan`` of this rank's steps, with one exchange; the final state is alike on all ranks."""
        ...


class SoftmaxStrategy(Protocol):
    """Sharded ``spcompile::softmax_attention``."""

    def softmax_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        causal: bool,
        scale: float,
        q_sequence: Sequence | None,
        kv_sequence: Sequence | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's rows of the output and log-sum-exp, and ``kv`` for the backward.

        Args:
            q: ``[B, H, block, K]`` of ``q_sequence``.
            k, v: ``[B, Hkv, block', *]`` of ``kv_sequence``, which may be another sequence; whole if it is
                None.
            mask: None, or this rank's rows of the mask with whole columns, broadcastable to ``[B, H, block,
                S]``.
        Returns:
            out, lse, and the keys and values of all ranks in the strategy's own layout (None: nothing was
            gathered).
        """
        ...

    def softmax_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        out: Tensor,
        lse: Tensor,
        kv: Tensor | None,
        *,
        causal: bool,
        scale: float,
        q_sequence: Sequence | None,
        kv_sequence: Sequence | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this rank's tokens. ``kv`` None: keys and values are gathered again.

        With ``kv_sequence`` None and sharded queries, dk and dv are this rank's *terms* of a sum over ranks.
        """
        ...


def masked(sequence: Sequence | None, dim: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with zeros where dim ``dim`` holds padding, by ``where`` so that NaN goes too.

    In a sum over tokens every operand must be masked: masking one lets 0 * NaN through.
    """
    if sequence is None or not sequence.padded:
        return tensors
    valid = local_valid(sequence, tensors[0].device)
    return tuple(torch.where(valid.reshape(-1, *[1] * (x.dim() - 1 - dim)), x, 0.0) for x in tensors)
