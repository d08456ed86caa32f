"""Picks along one dim, and running sums, as contractions with a matrix of zeros and ones.

    out[.., o, ..] = sum_r x[.., r, ..] * (r == step * o + offset)

So `select`, `slice`, `stack`, `cat`, `flip`, `roll`, zero padding and a running sum of a state are as linear
as a matmul, and the rest of the algebra need not know them.
"""

from __future__ import annotations

import torch

from spcompile.passes.recognize.algebra.dims import Dims, name_dims
from spcompile.passes.recognize.algebra.picks import Pick, picks
from spcompile.passes.recognize.algebra.products import Factor, Term
from spcompile.passes.shadow import Value

__all__ = ["selections"]


def selections(v: Value, dims: Dims) -> list[Term] | None:
    """`v` as a sum of its operands by matrices, the operand first; None if it is none."""
    if v.name == "cumsum":
        return [_running(v, dims)]
    found = picks(v)
    return None if found is None else [_by_matrix(p, v, dims) for p in found]


def _by_matrix(p: Pick, v: Value, dims: Dims) -> Term:
    d = p.dim
    outer, size = ((), 1) if p.lacks == "result" else (dims[d], v.shape[d])
    rows = 1 if p.lacks == "source" else p.source.shape[d]
    inner = name_dims((rows,))
    own = () if p.lacks == "source" else inner
    rest = dims[d:] if p.lacks == "result" else dims[d + 1 :]

    def build(device: torch.device) -> torch.Tensor:
        at = torch.arange(size, device=device) * p.step + p.offset
        at = at % p.wrap if p.wrap else at
        return torch.arange(rows, device=device)[:, None] == at[None, :]

    matrix = Factor(_constant(build, (rows, size)), (*inner, outer))
    return Term([Factor(p.source, (*dims[:d], *own, *rest)), matrix], summed=[a for x in own for a in x])


def _running(v: Value, dims: Dims) -> Term:
    dim = v.args["dim"]
    size = v.shape[dim]
    inner = name_dims((size,))

    def build(device: torch.device) -> torch.Tensor:
        at = torch.arange(size, device=device)
        return at[:, None] <= at[None, :]

    matrix = Factor(_constant(build, (size, size)), (*inner, dims[dim]))
    source = Factor(v.args["self"], (*dims[:dim], *inner, *dims[dim + 1 :]))
    return Term([source, matrix], summed=list(inner[0]))


def _constant(build: object, shape: tuple[int, ...]) -> Value:
    return Value("constant", {"build": build}, shape, torch.bool)
