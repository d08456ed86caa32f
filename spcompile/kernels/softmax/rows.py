"""One call for a block of query rows: the fused kernel where there is one, else the blockwise one."""

from __future__ import annotations

from torch import Tensor

from spcompile.kernels.softmax import blockwise, fused_cpu

__all__ = ["backward", "forward"]


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, first_row: int
) -> tuple[Tensor, Tensor]:
    """Attention of rows ``first_row ...`` of the sequence; arguments, result as in ``blockwise.forward``."""
    if fused_cpu.supports(q):
        out, lse = fused_cpu.forward(q, k, v, mask, causal, scale, first_row)
        if not fused_cpu.imprecise(mask, lse):
            return out, lse
    return blockwise.forward(q, k, v, mask, causal, scale, first_row)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    first_row: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`'s ``out``; dk and dv are these rows' part of the sum over all rows."""
    if fused_cpu.supports(q) and not fused_cpu.imprecise(mask, lse):
        return fused_cpu.backward(grad, q, k, v, mask, out, lse, causal, scale, first_row)
    return blockwise.backward(grad, q, k, v, mask, causal, scale, first_row)
