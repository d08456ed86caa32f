"""What a tensor's dims are made of, followed backwards through views.

A dim is a tuple of `Atom`s, outermost first: `[B, T, H*D]` is `((b,), (t,), (h, d))`, a dim of size one is
`()`. The walk starts at an output, whose dims it names, and goes back to the operands: views only permute,
merge and split atoms, and an `expand` drops those that its input does not have. So whatever the spelling, at
the end each operand says which of its dims are the tokens, the features and the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from spcompile.passes.shadow import Value


@dataclass(eq=False)
class Atom:
    """A factor of a dim. It may turn out to be a product later: then it has `parts`."""

    size: int
    parts: tuple[Atom, ...] = ()

    def __repr__(self) -> str:
        return f"{self.size}@{id(self) % 10007}"


Dims = tuple[tuple[Atom, ...], ...]


def resolve(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
    """The atoms with those that have been split replaced by their parts."""
    out: list[Atom] = []
    for a in atoms:
        out.extend(resolve(a.parts) if a.parts else (a,))
    return tuple(out)


def atoms_of(dims: Dims) -> tuple[Atom, ...]:
    return tuple(a for d in dims for a in resolve(d))


def name_dims(shape: Sequence[int]) -> Dims:
    """A fresh atom for each dim that is longer than one."""
    return tuple((Atom(s),) if s != 1 else () for s in shape)


def split(atom: Atom, outer: int) -> tuple[Atom, Atom] | None:
    if outer <= 0 or atom.size % outer:
        return None
    atom.parts = (Atom(outer), Atom(atom.size // outer))
    return atom.parts[0], atom.parts[1]


def regroup(atoms: Sequence[Atom], shape: Sequence[int]) -> Dims | None:
    """Group atoms, in row-major order, into dims of `shape`, splitting where a boundary falls inside one."""
    todo = list(resolve(atoms))[::-1]
    if prod(a.size for a in todo) != prod(shape):
        return None
    dims: list[tuple[Atom, ...]] = []
    for size in shape:
        dim: list[Atom] = []
        while size != 1:
            atom = todo.pop()
            if size % atom.size == 0:
                size //= atom.size
                dim.append(atom)
            elif parts := split(atom, size):
                todo.append(parts[1])
                todo.append(parts[0])
            else:
                return None
        dims.append(tuple(dim))
    return tuple(dims)


def align(dims: Dims, shape: Sequence[int]) -> Dims:
    """The dims of an operand of `shape` that was broadcast to `dims`."""
    tail = dims[len(dims) - len(shape) :]
    return tuple(d if s != 1 else () for d, s in zip(tail, shape, strict=True))


def back_through_view(v: Value, dims: Dims) -> tuple[Value, Dims] | None:
    """The operand of a view (or repeating copy) and its dims; None if `v` is none, or can't be followed."""
    source = v.args.get("self")
    if not isinstance(source, Value):
        return None
    found = _back(v, source, dims)
    return None if found is None else (source, found)


def _back(v: Value, source: Value, dims: Dims) -> Dims | None:
    if v.name == "reshape":
        return regroup(atoms_of(dims), source.shape)
    if v.name == "expand":
        return align(dims, source.shape)
    if v.name == "permute":
        return _unpermute(dims, v.args["dims"])
    if v.name == "repeat_interleave" and v.overload == "self_int":
        return _unrepeat(dims, source, v, inner=True)
    if v.name == "repeat":
        return _unrepeat(dims, source, v, inner=False)
    return None


def _unpermute(dims: Dims, order: Sequence[int]) -> Dims:
    out: list[tuple[Atom, ...]] = [()] * len(dims)
    for at, d in zip(order, dims, strict=True):
        out[at] = d
    return tuple(out)


def _unrepeat(dims: Dims, source: Value, v: Value, inner: bool) -> Dims | None:
    """A dim that got longer is (original, copies) or, tiled, (copies, original); drop the copies."""
    out: list[tuple[Atom, ...]] = []
    dims = dims[len(dims) - len(source.shape) :]
    for dim, was, now in zip(dims, source.shape, v.shape[-len(source.shape) :], strict=True):
        if was == now:
            out.append(dim)
            continue
        parts = regroup(dim, (was, now // was) if inner else (now // was, was))
        if parts is None:
            return None
        out.append(parts[0] if inner else parts[1])
    return tuple(out)
