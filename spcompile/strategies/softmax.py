"""What a strategy of softmax attention is: the sharded forward and backward on this rank's tensors."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from spcompile.collectives import Sequence
from spcompile.kernels.softmax.operands import Operands, Options

__all__ = ["SoftmaxStrategy"]


class SoftmaxStrategy(Protocol):
    """Sharded ``spcompile::softmax_attention``.

    q is of ``queries``, and k and v are of ``keys``, which may be another sequence, or None: then they are
    whole. The mask has this rank's rows and whole columns.
    """

    @staticmethod
    def gather(
        x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None
    ) -> Tensor | None:
        """``kv`` of :meth:`forward` by itself, where a backward has none."""
        ...

    @staticmethod
    def grows(kv: Tensor) -> bool:
        """Whether ``kv`` is of all ranks' tokens, so that saving it may cost more than sending it again.

        Else it is no more than this rank's queries, keys and values, in whose place it is saved.
        """
        ...

    @staticmethod
    def forward(
        x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's rows of the output and log-sum-exp, and ``kv`` for the backward.

        Returns:
            out, lse, and the keys and values of other ranks in the strategy's own layout (None: nothing was
            gathered).
        """
        ...

    @staticmethod
    def backward(
        grad: Tensor,
        x: Operands,
        out: Tensor,
        lse: Tensor,
        kv: Tensor | None,
        options: Options,
        queries: Sequence | None,
        keys: Sequence | None,
        *,
        relative: bool = False,
    ) -> tuple[Tensor, ...]:
        """dq, dk, dv of this rank's tokens; if ``relative``, the gradient of ``x.relative`` from this rank's
        rows as well, a term of the sum over ranks.

        With ``keys`` None and sharded queries, dk and dv are this rank's *terms* of a sum over ranks.
        """
        ...
