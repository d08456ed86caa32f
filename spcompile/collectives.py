"""The only place that emits a collective, and the only one that knows which rank is running.

Everything here is an ordinary function of tensors, called while a pass traces it into the graph (see
``spcompile.emit``). Collectives are PyTorch's functional ones, so that Inductor can overlap and bucket
them, and the rank is read at run time by an operator, so that the graph of one rank is the graph of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from spcompile._torch import resolve_process_group
from spcompile.sizes import Sized

__all__ = [
    "Group",
    "Sequence",
    "all_gather",
    "all_reduce",
    "all_reduce_bucket",
    "all_to_all",
    "finish",
    "local_positions",
    "local_valid",
    "mirror",
    "rank",
    "reduce_scatter",
    "start_all_gather",
    "start_shift",
]

_c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Group:
    """The ranks along the sequence axis: how many, and the process group's registered name."""

    size: int
    name: str


@dataclass(frozen=True, eq=False)
class Sequence(Sized):
    """One sequence cut into ``block`` tokens per rank; the last ``size * block - length`` are padding."""

    group: Group
    block: int
    length: int

    @property
    def padded(self) -> bool:
        """Whether some rank holds tokens that are not there."""
        return self.group.size * self.block != self.length


# Simulated ranks (spcompile.simulate) have no process group: they answer for the rank while it is their turn.
_simulated_rank: list[int] = []


def current_rank(group: str) -> int:
    """This process's index in the named group, read at run time."""
    if _simulated_rank:
        return _simulated_rank[-1]
    return dist.get_rank(resolve_process_group(group))


@torch.library.custom_op("spcompile::rank", mutates_args=())
def _rank_op(group: str, device: torch.device) -> Tensor:
    return torch.full((), current_rank(group), dtype=torch.int64, device=device)


@_rank_op.register_fake
def _(group: str, device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def rank(group: Group, device: torch.device) -> Tensor:
    """This rank's index as a 0-dim int64 tensor: the rank never enters the graph as a literal."""
    if group.size == 1:
        return torch.zeros((), dtype=torch.int64, device=device)
    return torch.ops.spcompile.rank(group.name, device)


def local_positions(sequence: Sequence, device: torch.device) -> Tensor:
    """Positions in the whole sequence of this rank's tokens, [block] int64; those >= length are padding."""
    own = torch.arange(sequence.block, device=device)
    if sequence.group.size == 1:
        return own
    return own + rank(sequence.group, device) * sequence.block


def local_valid(sequence: Sequence, device: torch.device) -> Tensor:
    """Which of this rank's tokens exist, [block] bool."""
    return local_positions(sequence, device) < sequence.length


def start_all_gather(x: Tensor, group: Group) -> Tensor:
    """Start gathering ``x`` from all ranks; give the result to :func:`finish` once it is needed.

    Work placed between the two is what the collective hides behind.
    """
    flat = x.contiguous().reshape(-1)
    return _c10d.all_gather_into_tensor(flat, group.size, group.name)


def _start_sending(x: Tensor, to: int, source: int, size: int, group: str) -> Tensor:
    """To one rank, and from one."""
    # Of its own: a compiler that does not know this for a collective may write over x before the wait.
    sent = x.clone(memory_format=torch.contiguous_format)
    splits = ([x.numel() if r == other else 0 for r in range(size)] for other in (source, to))
    return _c10d.all_to_all_single(sent, *splits, group)


@torch.library.custom_op("spcompile::start_shift", mutates_args=())
def _start_shift(x: Tensor, by: int, size: int, group: str, after: Tensor | None = None) -> Tensor:
    rank = current_rank(group)
    return _start_sending(x, (rank + by) % size, (rank - by) % size, size, group)


@_start_shift.register_fake
def _(x: Tensor, by: int, size: int, group: str, after: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("spcompile::start_mirror", mutates_args=())
def _start_mirror(x: Tensor, size: int, group: str) -> Tensor:
    other = size - 1 - current_rank(group)
    return _start_sending(x, other, other, size, group)


@_start_mirror.register_fake
def _(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty(x.shape)


def start_shift(x: Tensor, by: int, group: Group, after: Tensor | None = None) -> Tensor:
    """Start sending ``x`` to the rank ``by`` further on, around the ring; :func:`finish` gives what came.

    Which ranks these are is read when the graph runs (PyTorch's ``permute_tensor`` has them as numbers).
    ``after`` is not read: it is not sent before that is there, so not in the forward if it is a gradient.
    """
    more = () if after is None else (after,)
    return torch.ops.spcompile.start_shift(x.contiguous().reshape(-1), by, group.size, group.name, *more)


def mirror(x: Tensor, group: Group) -> Tensor:
    """``x`` of the rank that is as far from the last as this one is from the first."""
    if group.size == 1:
        return x
    flat = x.contiguous().reshape(-1)
    return finish(torch.ops.spcompile.start_mirror(flat, group.size, group.name), tuple(x.shape))


def finish(started: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Wait for a started collective and view what came as ``shape`` ([P, *x.shape] for an all-gather)."""
    return _c10d.wait_tensor(started).reshape(shape)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """``x`` of every rank, stacked in rank order: [P, *x.shape]."""
    if group.size == 1:
        return x.unsqueeze(0)
    return finish(start_all_gather(x, group), (group.size, *x.shape))


def all_reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """The sum (or ``max``, ``min``, ``product``) of every rank's ``x``, on every rank."""
    if group.size == 1:
        return x
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), op, group.name))


def all_reduce_bucket(tensors: list[Tensor], group: Group) -> list[Tensor]:
    """The sums of several tensors of one dtype, in one collective."""
    if group.size == 1:
        return tensors
    if len(tensors) == 1:
        return [all_reduce(tensors[0], group)]
    flat = torch.cat([x.reshape(-1) for x in tensors])
    parts = all_reduce(flat, group).split([x.numel() for x in tensors])
    return [part.reshape(x.shape) for part, x in zip(parts, tensors, strict=True)]


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """Entry p of ``x``, [P, ...], sent to rank p; entry p of the result came from rank p."""
    if group.size == 1:
        return x
    flat, splits = x.contiguous().reshape(-1), [x[0].numel()] * group.size
    return finish(_c10d.all_to_all_single(flat, splits, splits, group.name), tuple(x.shape))


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """The sum over all ranks of this rank's entry, [...]; ``x`` is [P, ...], entry p meant for rank p."""
    if group.size == 1:
        return x.squeeze(0)
    flat = x.contiguous().reshape(x.shape[0], -1).reshape(-1)
    out = _c10d.reduce_scatter_tensor(flat, "sum", group.size, group.name)
    return _c10d.wait_tensor(out).reshape(x.shape[1:])
