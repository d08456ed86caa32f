"""Operators that stand where a tensor enters or leaves a compiled graph as one rank's part.

NOTE [Ports]
An output that may carry the sequence is returned by ``lend``, outside of autograd, so AOTAutograd gives it no
tangent. Its place in autograd is taken by ``open_port``, a token of one number: whoever gets a gradient for
the output puts it into the mailbox and gives the token's gradient the number under which it lies there. In
the backward ``late`` is that gradient, or zeros if the number is 0; where there is another gradient to add
to, ``add_late`` adds it in place, so an output that nobody read costs no memory and no time. Where that other
gradient is computed in pieces (``spcompile.passes.chunks``), each adds its rows of the letter, and the last
takes it out of the mailbox.

``arrive`` says that an input of the graph is this rank's part of a global tensor; ``depart`` is its backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.collectives import Group
from spcompile.placement import Shard
from spcompile.sizes import at

__all__ = [
    "Layout",
    "LocalPart",
    "add_late",
    "add_late_",
    "arrive",
    "deliver",
    "depart",
    "is_local_part",
    "late",
    "layout_of",
    "lend",
    "open_port",
    "ops",
]


ops = torch.ops.spcompile


@dataclass(frozen=True)
class Layout:
    """How a tensor of ``shape`` and ``stride`` lies on the ranks of ``group``.

    Sizes are numbers, or expressions of the inputs' sizes where one graph serves many lengths.
    """

    shard: Shard
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    group: Group

    def at_sizes(self, values: Mapping[Any, int]) -> Layout:
        """One of expressions, where their symbols have these values."""
        shape, stride = (tuple(at(size, values) for size in x) for x in (self.shape, self.stride))
        return Layout(self.shard.at_sizes(values), shape, stride, self.group)

    def numbers(self) -> tuple[list[int], list[int], list[int], str]:
        """The same as arguments of an operator."""
        s = self.shard
        where = [s.dim, s.length, s.block, s.start, s.outer, self.group.size]
        return list(self.shape), list(self.stride), where, self.group.name


def layout_of(shape: list[int], stride: list[int], where: list[int], group: str) -> Layout:
    """The layout of which ``numbers`` are the arguments."""
    *shard, size = where
    return Layout(Shard(*shard), tuple(shape), tuple(stride), Group(size, group))


class LocalPart:
    """What :class:`spcompile.sharded.ShardedTensor` is: a tensor of which this rank holds a part."""


def is_local_part(x: object) -> bool:
    """Whether the ranks rightly hold different things in ``x``: parts of one tensor."""
    return isinstance(x, LocalPart)


# ---- the mailbox ----------------------------------------------------------------------------------------


class Letter(Protocol):
    """A gradient that lies in the mailbox."""

    def part(self, shard: Shard | None, group: Group) -> Tensor:
        """This rank's part of it under ``shard``, or all of it."""


_letters: dict[int, Letter] = {}
_opened: dict[tuple[int, int], Tensor] = {}  # by number and rank: what is read in several pieces
_numbers = itertools.count(1)


def deliver(letter: Letter) -> Tensor:
    """Put a gradient into the mailbox; returns the gradient of the token that its port made."""
    number = next(_numbers)
    _letters[number] = letter
    return torch.tensor(float(number), dtype=torch.float64)


def _take(token: Tensor, where: list[int], group: str, more: bool = False) -> Tensor | None:
    """What the letter of this number has for this rank; None for number 0.

    Args:
        more: whether it will be asked for again.
    """
    *shard, size = where
    turns = collectives._simulated_rank
    last = not turns or turns[-1] == size - 1  # simulated ranks share a mailbox
    number = int(token)
    mine = number, turns[-1] if turns else 0
    part = _opened.pop(mine, None)
    if part is None:
        letter = _letters.pop(number, None) if last else _letters.get(number)
        if letter is None:
            return None
        part = letter.part(Shard(*shard) if shard else None, Group(size, group))
    if more:
        _opened[mine] = part
    return part


# ---- outputs --------------------------------------------------------------------------------------------


@torch.library.custom_op("spcompile::lend", mutates_args=())
def lend(x: Tensor, number: int) -> Tensor:
    """Output ``number`` of the graph: ``x``, which for autograd is another tensor."""
    return x.clone()


@lend.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("spcompile::open_port", mutates_args=())
def open_port(x: Tensor) -> Tensor:
    """The token of ``x``, float64 []: its gradient is the number of the letter that holds x's."""
    return torch.zeros((), dtype=torch.float64)


@open_port.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.float64)


@torch.library.custom_op("spcompile::late", mutates_args=())
def late(
    token: Tensor,
    shape: list[int],
    where: list[int],
    group: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The gradient that ``token`` is the number of, or zeros; ``where``: which part of it, [P] for all."""
    found = _take(token, where, group)
    if found is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return found.clone(memory_format=torch.contiguous_format)


@late.register_fake
def _(
    token: Tensor,
    shape: list[int],
    where: list[int],
    group: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@torch.library.custom_op("spcompile::add_late_", mutates_args=("x",))
def add_late_(
    x: Tensor, token: Tensor, where: list[int], group: str, first: int = 0, more: bool = False
) -> None:
    """Add to ``x`` the gradient that ``token`` is the number of.

    Args:
        first: where ``x`` is a piece [n, k] of it, the first of its rows.
        more: whether other pieces will be asked for.
    """
    found = _take(token, where, group, more)
    if found is not None:
        x.add_(_piece(found, x, first))


@torch.library.custom_op("spcompile::add_late", mutates_args=())
def add_late(
    x: Tensor, token: Tensor, where: list[int], group: str, first: int = 0, more: bool = False
) -> Tensor:
    """``x`` and the gradient that ``token`` is the number of; what runs is :func:`add_late_`."""
    found = _take(token, where, group, more)
    return x.clone() if found is None else x + _piece(found, x, first)


def _piece(found: Tensor, x: Tensor, first: int) -> Tensor:
    if found.shape == x.shape:
        return found
    return found.reshape(-1, x.shape[1])[first : first + x.shape[0]]


@add_late.register_fake
def _(x: Tensor, token: Tensor, where: list[int], group: str, first: int = 0, more: bool = False) -> Tensor:
    return torch.empty_like(x)


def _open_port_context(ctx: Any, inputs: Any, output: Any) -> None:
    (x,) = inputs
    ctx.like = list(x.shape), x.dtype, x.device


def _open_port_backward(ctx: Any, token: Tensor) -> Tensor:
    shape, dtype, device = ctx.like
    return torch.ops.spcompile.late(token, shape, [1], "", dtype, device)


open_port.register_autograd(_open_port_backward, setup_context=_open_port_context)


# ---- inputs ---------------------------------------------------------------------------------------------


@torch.library.custom_op("spcompile::arrive", mutates_args=())
def arrive(x: Tensor, shape: list[int], stride: list[int], where: list[int], group: str) -> Tensor:
    """The global tensor of which ``x`` is this rank's part."""
    raise AssertionError("a graph that was not sharded cannot run on one rank's part of its inputs")


@arrive.register_fake
def _(x: Tensor, shape: list[int], stride: list[int], where: list[int], group: str) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)


@torch.library.custom_op("spcompile::depart", mutates_args=())
def depart(x: Tensor, shape: list[int], stride: list[int], where: list[int], group: str) -> Tensor:
    """This rank's part of ``x``, [*local_shape]; the backward of :func:`arrive`."""
    raise AssertionError("a graph that was not sharded cannot give one rank's part of a gradient")


@depart.register_fake
def _(x: Tensor, shape: list[int], stride: list[int], where: list[int], group: str) -> Tensor:
    dim, _, block, _, outer, _ = where
    return x.new_empty([*shape[:dim], outer * block, *shape[dim + 1 :]])


def _arrive_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, *ctx.layout = inputs


def _arrive_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.spcompile.depart(grad, *ctx.layout), None, None, None, None


arrive.register_autograd(_arrive_backward, setup_context=_arrive_context)
