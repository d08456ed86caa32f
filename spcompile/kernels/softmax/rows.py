"""One call for a block of query rows: the fused kernel where there is one, else the blockwise one."""

from __future__ import annotations

from torch import Tensor

from spcompile.kernels.softmax import blockwise, flash
from spcompile.kernels.softmax.operands import Operands, Options

__all__ = ["backward", "forward", "name"]


def name(x: Operands) -> str:
    """The kernel that takes this call."""
    return "ATen blocks" if flash.refuses(x) else "PyTorch's flash attention"


def forward(x: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """Attention of the query rows given against all keys given; the result is as in ``blockwise.forward``."""
    if not flash.refuses(x):
        out, lse = flash.forward(x, options)
        if not flash.imprecise(x.mask, lse):
            return out, lse
    return blockwise.forward(x, options)


def backward(
    grad: Tensor, x: Operands, out: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`'s ``out``; dk and dv are these rows' part of the sum over all rows."""
    if not flash.refuses(x) and not flash.imprecise(x.mask, lse):
        return flash.backward(grad, x, out, lse, options)
    return blockwise.backward(grad, x, options)
