"""Random operands of every variant, and the reference's outputs and gradients for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.attention import reference
from spcompile.attention.variants import VARIANTS, Variant
from spcompile.kernels.linear.operands import Operands, Options

__all__ = ["KINDS", "Run", "cotangents", "draw", "gradients", "kinds", "options_of", "references"]

Run = Callable[..., tuple[Tensor, Tensor]]


def kinds() -> dict[str, Variant]:
    """One variant for each kind of operands: those that differ in their feature maps only are one kind."""
    found: dict[Any, Variant] = {}
    for v in VARIANTS.values():
        found.setdefault((v.decay, v.delta, v.exclusive), v)
    return {v.name: v for v in found.values()}


KINDS = kinds()


def draw(
    variant: Variant,
    b: int,
    h: int,
    t: int,
    k: int,
    v: int,
    *,
    initial: bool = True,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Operands:
    """Operands of ``variant``; log decays are uniform in [-strength, 0], keys of a delta rule have norm 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, key, value = normal(b, h, t, k), normal(b, h, t, k), normal(b, h, t, v)
    key = F.normalize(key, dim=-1) if variant.delta else key
    shape = variant.log_decay_shape(b, h, t, k)
    decay = None if shape is None else -strength * torch.rand(shape, generator=generator, dtype=torch.float64)
    beta = torch.rand(b, h, t, 1, generator=generator, dtype=torch.float64) if variant.delta else None
    state = normal(b, h, k, v) if initial else None
    return Operands(*(None if x is None else x.to(dtype) for x in (q, key, value, decay, beta, state)))


def options_of(variant: Variant, reverse: bool = False, scale: float = 0.3) -> Options:
    return Options(True, scale, variant.exclusive, reverse)


def cotangents(x: Operands, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random gradients of the outputs and of the final state."""
    generator = torch.Generator().manual_seed(seed)
    state = (*x.k.shape[:2], x.k.shape[3], x.v.shape[3])
    wide = torch.float64 if x.q.dtype == torch.float64 else torch.float32
    out, final = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((*x.q.shape[:3], state[3]), state)
    )
    return out.to(x.q.dtype), final.to(wide)


def gradients(run: Run, x: Operands, options: Options, grads: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Out, final state, and the gradients of all operands that are there."""
    leaves = [None if y is None else y.detach().clone().requires_grad_() for y in x]
    out, final = run(*leaves, *options)
    given = [y for y in leaves if y is not None]
    return out.detach(), final.detach(), *torch.autograd.grad((out, final), given, grads)


def references(x: Operands, options: Options, grads: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The same by the token-by-token recurrence in float64."""
    wide = Operands(*(None if y is None else y.double() for y in x))
    return gradients(reference.linear_attention, wide, options, (grads[0].double(), grads[1].double()))
