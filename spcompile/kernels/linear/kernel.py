"""What a kernel of linear attention is, and which one takes a call.

A kernel works on one run of tokens: all of a sequence, or those of one rank. It says what the run does to the
state, and gives the outputs (or the gradients) from the state before it. Between the two stands whatever
brings that state from other ranks; kernels know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from spcompile.kernels.choice import opaque as is_opaque
from spcompile.kernels.choice import without_our_kernels
from spcompile.kernels.linear import chunked, opaque, whole
from spcompile.kernels.linear.operands import Operands, Options

__all__ = ["Backward", "Forward", "Kernel", "kernel_of"]


class Forward(Protocol):
    """The forward of one run of tokens: when made, what it does to the state is known."""

    def total(self) -> tuple[Tensor, ...]:
        """What the run does to the state, ``[B, H, ...]``: a ``Summary`` of ``attention/algebra.py``.

        If not causal, its memory state ``(S,)``.
        """
        ...

    def local(self) -> None:
        """Compute what needs no state: what the exchange of the totals hides behind."""
        ...

    def finish(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs ``[B, H, T, V]`` in q's dtype and the state ``[B, H, K, V]`` after the last token.

        Args:
            carry: the state before the first token (None: zero); if not causal, that of all tokens there are.
        """
        ...


class Backward(Protocol):
    """The backward of one run of tokens: when made, what it does to the gradient of the state is known."""

    def total(self) -> tuple[Tensor, ...]:
        """What the run does to the gradient of the state, from its last token to its first."""
        ...

    def local(self) -> None:
        """Compute what needs no gradient of the state."""
        ...

    def finish(self, carry: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the operands, None for those that are None.

        Args:
            carry: the gradient of the state after the last token (None: zero); if not causal, of the memory
                state of all tokens there are.
        """
        ...


class Kernel(NamedTuple):
    """One implementation: what makes its forward, and what its backward.

    The backward is made of the operands, the options, the gradient ``[B, H, T, V]`` of the outputs and the
    ``carry`` that the forward was finished with. ``refused`` says why it is not a fused one; ``again`` are
    operators of the forward's tokens whose results the backward makes again: saved, they would be as large as
    the operands.
    """

    name: str
    forward: Callable[[Operands, Options], Forward]
    backward: Callable[[Operands, Options, Tensor, Tensor | None], Backward]
    refused: str = ""
    again: frozenset[Any] = frozenset()


_WHOLE = Kernel("one memory state", whole.Forward, whole.Backward)
_CHUNKED = Kernel("ATen chunks", chunked.Forward, chunked.Backward)
_OPAQUE = Kernel("ATen chunks as operators", opaque.Forward, opaque.Backward)


def kernel_of(x: Operands, options: Options) -> Kernel:
    """The kernel that takes this call, by device, dtype and sizes: the one place where that is decided."""
    if not options.causal:
        return _WHOLE
    refused = without_our_kernels(x.k.device)
    if refused is None:
        # Triton takes its time to load, and is not everywhere.
        from spcompile.kernels.linear import fused, fused_delta, fused_diagonal, fused_kda, pieces

        per_key = x.log_decay is not None and x.log_decay.shape[3] != 1
        if x.beta is not None and (per_key or options.exclusive):
            kernel = Kernel("Triton, delta rule, decay per key", fused_kda.Forward, fused_kda.Backward)
            kernel = kernel._replace(again=fused_kda.AGAIN)
            refused = fused_kda.refuses(x)
        elif x.beta is not None:
            kernel = Kernel("Triton, delta rule", fused_delta.Forward, fused_delta.Backward)
            kernel = kernel._replace(again=fused_delta.AGAIN)
            refused = fused_delta.refuses(x)
        elif per_key:
            kernel = Kernel("Triton, decay per key", fused_diagonal.Forward, fused_diagonal.Backward)
            refused = fused_diagonal.refuses(x)
        else:
            kernel = Kernel("Triton, segments", fused.Forward, fused.Backward)
            refused = fused.refuses(x)
            if refused and not pieces.refuses(x):
                kernel = Kernel("Triton, segments, keys in pieces", pieces.Forward, pieces.Backward)
                refused = ""
        if not refused:
            return kernel
    # The others compile in a fraction of the time, and are up to 1.5 times as fast where Inductor fuses them.
    heavy = x.beta is not None or (x.log_decay is not None and x.log_decay.shape[3] != 1)
    return (_OPAQUE if heavy and is_opaque(x.k.device) else _CHUNKED)._replace(refused=refused)
