"""Operators of a gradient that is computed in pieces of rows (``spcompile.passes.chunks``)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_product", "add_product_", "rows"]


@torch.library.custom_op("spcompile::rows", mutates_args=())
def rows(x: Tensor, start: int, stop: int, after: list[Tensor]) -> Tensor:
    """Rows ``start`` to ``stop`` of ``x``, [R, k], copied once all of ``after`` is computed.

    An operator that a compiler does not look into: it can neither begin a piece before the one before has
    been used, nor fuse two into one loop; and what is computed of the copy may take its place.
    """
    return x[start:stop].clone(memory_format=torch.contiguous_format)


@rows.register_fake
def _(x: Tensor, start: int, stop: int, after: list[Tensor]) -> Tensor:
    return x.new_empty([stop - start, x.shape[1]])


@torch.library.custom_op("spcompile::add_product_", mutates_args=("total",))
def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, which may be more precise."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


@torch.library.custom_op("spcompile::add_product", mutates_args=())
def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b``; what runs is :func:`add_product_`."""
    return total + a @ b


@add_product.register_fake
def _(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(total)
