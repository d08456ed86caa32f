"""Ops that pick and place entries along one dim, as contractions with a matrix of zeros and ones.

    out[.., o, ..] = sum_r x[.., r, ..] * (r == step * o + offset)

So `select`, `slice`, `stack`, `cat`, `flip`, `roll`, zero padding and a running sum of a state are as linear
as a matmul, and the rest of the algebra need not know them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spcompile.passes.recognize.algebra.dims import Atom, Dims, name_dims
from spcompile.passes.recognize.algebra.products import Factor
from spcompile.passes.shadow import Value

__all__ = ["Selection", "selections"]

Selection = tuple[Value, Dims, list[Factor], list[Atom]]
"""A source, the names of its dims, the matrix as a factor, and what is summed."""


def _matrix(rows: int, columns: int, step: int, offset: int, wrap: int = 0) -> Value:
    """[r, o] = (r == step * o + offset), modulo `wrap` if that is given."""

    def build(device: torch.device) -> torch.Tensor:
        at = torch.arange(columns, device=device) * step + offset
        at = at % wrap if wrap else at
        return torch.arange(rows, device=device)[:, None] == at[None, :]

    return _constant(build, (rows, columns))


def _constant(build: object, shape: tuple[int, ...]) -> Value:
    return Value("constant", {"build": build}, shape, torch.bool)


def selections(v: Value, dims: Dims) -> Iterator[Selection] | None:
    """`v` as a sum of selections; None if it is none."""
    reader = _READERS.get(v.name)
    return None if reader is None else reader(v, dims)


def _through(x: Value, dim: int, dims: Dims, size: int, step: int, offset: int, wrap: int = 0) -> Selection:
    """A dim of `x` whose entries are placed along `dims[dim]`, which has `size`."""
    inner = name_dims((x.shape[dim],))[0]
    matrix = Factor(_matrix(x.shape[dim], size, step, offset, wrap), (inner, dims[dim]))
    return x, dims[:dim] + (inner,) + dims[dim + 1 :], [matrix], list(inner)


def _select(v: Value, dims: Dims) -> Iterator[Selection]:
    x = v.args["self"]
    dim = v.args["dim"]
    wider = dims[:dim] + ((),) + dims[dim:]
    yield _through(x, dim, wider, 1, 1, v.args["index"])


def _slice(v: Value, dims: Dims) -> Iterator[Selection]:
    dim, start, step = (v.args[n] for n in ("dim", "start", "step"))
    yield _through(v.args["self"], dim, dims, v.shape[dim], step, start)


def _stack(v: Value, dims: Dims) -> Iterator[Selection]:
    dim = v.args["dim"]
    for n, x in enumerate(v.args["tensors"]):
        place = Factor(_matrix(1, v.shape[dim], 1, -n), ((), dims[dim]))
        yield x, dims[:dim] + dims[dim + 1 :], [place], []


def _cat(v: Value, dims: Dims) -> Iterator[Selection]:
    dim, at = v.args["dim"], 0
    for x in v.args["tensors"]:
        yield _through(x, dim, dims, v.shape[dim], 1, -at)
        at += x.shape[dim]


def _flip(v: Value, dims: Dims) -> Iterator[Selection]:
    if len(v.args["dims"]) == 1:
        (dim,) = v.args["dims"]
        yield _through(v.args["self"], dim, dims, v.shape[dim], -1, v.shape[dim] - 1)


def _roll(v: Value, dims: Dims) -> Iterator[Selection]:
    shifts, over = v.args["shifts"], v.args.get("dims", [])
    if len(shifts) == len(over) == 1:
        dim = over[0] % len(dims)
        size = v.shape[dim]
        yield _through(v.args["self"], dim, dims, size, 1, -shifts[0], size)


def _pad(v: Value, dims: Dims) -> Iterator[Selection]:
    pad = v.args["pad"]
    changed = [n for n in range(0, len(pad), 2) if pad[n] or pad[n + 1]]
    if len(changed) == 1 and not v.args.get("value") and v.args.get("mode", "constant") == "constant":
        dim = len(dims) - 1 - changed[0] // 2
        yield _through(v.args["self"], dim, dims, v.shape[dim], 1, -pad[changed[0]])


def _cumsum(v: Value, dims: Dims) -> Iterator[Selection]:
    dim = v.args["dim"]
    size = v.shape[dim]
    inner = name_dims((size,))[0]

    def build(device: torch.device) -> torch.Tensor:
        at = torch.arange(size, device=device)
        return at[:, None] <= at[None, :]

    matrix = Factor(_constant(build, (size, size)), (inner, dims[dim]))
    yield v.args["self"], dims[:dim] + (inner,) + dims[dim + 1 :], [matrix], list(inner)


_READERS = {
    "select": _select, "slice": _slice, "stack": _stack, "cat": _cat, "flip": _flip, "roll": _roll,
    "constant_pad_nd": _pad, "pad": _pad, "cumsum": _cumsum,
}  # fmt: skip
