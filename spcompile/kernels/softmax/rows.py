"""One call for a block of query rows: a fused kernel where there is one, else the blockwise one.

PyTorch's flash attention comes first, then FlexAttention, which takes what flash attention refuses on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from spcompile.kernels.softmax import blockwise, flash, flex
from spcompile.kernels.softmax.operands import PLAIN, Operands, Options, with_sinks

__all__ = ["backward", "backward_relative", "forward", "name", "refuses"]


def name(x: Operands, options: Options = PLAIN) -> str:
    """The kernel that takes this call."""
    if not flash.refuses(x, options):
        return "PyTorch's flash attention"
    return "ATen blocks" if flex.refuses(x, options) else "PyTorch's FlexAttention"


def refuses(x: Operands, options: Options = PLAIN) -> str:
    """Why no fused kernel takes this call, for the report; empty if one does."""
    why = flash.refuses(x, options)
    if not why or x.q.device.type != "cuda":
        return why
    more = flex.refuses(x, options)
    return more and (why if more == why else f"{why}; {more}")


def forward(x: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """Attention of the query rows given against all keys given; the result is as in ``blockwise.forward``."""
    if not flash.refuses(x, options):
        out, lse = flash.forward(x, options)
        if not flash.imprecise(x, lse):
            return (out, lse) if x.sinks is None else with_sinks(out, lse, x.sinks)
    elif not flex.refuses(x, options):
        with flex.or_blocks(x, options):
            return flex.forward(x, options)
    return blockwise.forward(x, options)


def backward(
    grad: Tensor, x: Operands, out: Tensor, lse: Tensor, options: Options, part: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`'s ``out``; dk and dv are these rows' part of the sum over all rows.

    ``part``: of the keys given, where ``out`` and ``lse`` are of more.

    Sinks are in ``out`` and ``lse``: exp(score - lse) is a key's weight beside them, and dO . out what the
    gradients of a row's scores have in common.
    """
    if not flash.refuses(x, options):
        if part or not flash.imprecise(x, lse):
            return flash.backward(grad, x, out, lse, options)
    elif not flex.refuses(x, options):
        with flex.or_blocks(x, options):
            return flex.backward(grad, x, out, lse, options)
    return blockwise.backward(grad, x, options, (out, lse) if part else None)


def backward_relative(
    grad: Tensor, x: Operands, options: Options, given: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same and the gradient of ``relative``, which no fused kernel sums in a fixed order.

    ``given``: out and lse, where they are of more keys than these.
    """
    return blockwise.backward_relative(grad, x, options, given)
