"""Backward operators of softmax attention that give the gradient of ``relative`` as well.

As :mod:`spcompile.attention.softmax` has them, but for one result more: of an entry the sum over the scores
that it is added to, batch, rows and keys of one distance (over all heads, where they share it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spcompile.attention.softmax import empty_like, local
from spcompile.kernels.softmax import rows
from spcompile.kernels.softmax.operands import Operands, Options

__all__ = ["local_softmax_attention_relative_backward", "softmax_attention_relative_backward"]


def _like_operands(at: int, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, ...]:
    """Memory for the gradients; ``relative`` is argument ``at`` behind q, k and v."""
    return empty_like(q, k, v, named["relative"] if "relative" in named else rest[at])


@torch.library.custom_op("spcompile::softmax_attention_relative_backward", mutates_args=())
def softmax_attention_relative_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    documents: Tensor | None,
    relative: Tensor,
    prefixes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, drelative) of ``softmax_attention``."""
    options = Options(causal, scale, 0, window, soft_cap)
    return rows.backward_relative(
        grad, Operands(q, k, v, mask, sinks, documents, relative, prefixes), options
    )


@softmax_attention_relative_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, ...]:
    return _like_operands(9, q, k, v, *rest, **named)


@torch.library.custom_op("spcompile::local_softmax_attention_relative_backward", mutates_args=())
def local_softmax_attention_relative_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    group: str,
    block: int,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    length: int = 0,
    reach: int | None = None,
    documents: Tensor | None = None,
    relative: Tensor | None = None,
    prefixes: Tensor | None = None,
    ring: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``local_softmax_attention``: of keys, values and ``relative`` from just these rows."""
    options = Options(causal, scale, 0, window, soft_cap)
    x = Operands(q, k, v, mask, sinks, documents, relative, prefixes)
    here = local(x, options, group, block, length, reach, ring)
    given = None if ring is None else (out, lse)
    dq, dk, dv, drelative = rows.backward_relative(grad, here.x, here.options, given)
    return dq, *here.back(dk, dv, k.shape[2]), drelative


@local_softmax_attention_relative_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, ...]:
    return _like_operands(13, q, k, v, *rest, **named)
