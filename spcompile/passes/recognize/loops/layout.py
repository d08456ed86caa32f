"""Products of factors whose dims are named by atoms, as one tensor in a wanted layout, for all steps."""

from __future__ import annotations

import math
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spcompile.passes.recognize.algebra.dims import Atom, Dims, atoms_of, resolve
from spcompile.passes.recognize.algebra.products import Factor
from spcompile.passes.recognize.edit import Group, Refused
from spcompile.passes.recognize.loops.affine import Product, Reader
from spcompile.passes.recognize.loops.evaluate import Batch, Evaluator

__all__ = ["Item", "Layout", "permuted", "shaped", "spread"]


@dataclass
class Item:
    """A tensor for all steps and the names of its dims (of one step)."""

    batch: Batch
    dims: Dims

    @property
    def atoms(self) -> tuple[Atom, ...]:
        return atoms_of(self.dims)


class Layout:
    """Contracts the factors of products, computed in one dtype."""

    def __init__(self, reader: Reader, evaluator: Evaluator, like: torch.Tensor) -> None:
        self.reader = reader
        self.evaluator = evaluator
        self.dtype = like.dtype
        self.options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}

    def item(self, f: Factor) -> Item:
        """A factor's tensor."""
        b = self.evaluator.value(self.reader.ref(f.value))
        x = b.x.to(self.dtype)
        return Item(Batch(x.reciprocal() if f.inverse else x, b.batched), f.dims)

    def product(self, term: Product, groups: Sequence[Group], extra: Sequence[Item] = ()) -> Batch:
        """One term without its state, see `contract`."""
        return self.contract([*extra, *map(self.item, term.factors)], groups, term.summed, term.scale)

    def contract(
        self, items: Sequence[Item], groups: Sequence[Group], summed: Sequence[Atom] = (), scale: float = 1.0
    ) -> Batch:
        """The product of the items, summed over `summed`, with one dim per group of atoms.

        A group of which no item has an atom gets size 1; `spread` expands it.
        """
        over = resolve(summed)
        present = dict.fromkeys(a for i in items for a in i.atoms)
        wanted = [a for g in groups for a in resolve(g)]
        scale *= math.prod(a.size for a in over if a not in present)
        if set(present) - set(wanted) - set(over):
            raise Refused("a dim of its state has no role")
        x, batched = self._einsum(sorted(items, key=lambda i: not set(i.atoms) & set(over)), wanted, present)
        if scale != 1.0:
            x = x * scale
        lead = [x.shape[0]] if batched else []
        shape, full, out = list(lead), list(lead), list(lead)
        for g in groups:
            some = any(a in present for a in resolve(g))
            shape += [a.size if a in present else 1 for a in resolve(g)]
            full += [a.size if some else 1 for a in resolve(g)]
            out.append(math.prod(a.size for a in resolve(g)) if some else 1)
        x = shaped(x, shape)
        if shape != full:
            x = x.expand(full)
        return Batch(shaped(x, out), batched)

    def _einsum(
        self, items: Sequence[Item], wanted: Sequence[Atom], present: Collection[Atom]
    ) -> tuple[torch.Tensor, bool]:
        if not items:
            return torch.ones((), **self.options), False
        letters = dict(zip(present, string.ascii_letters, strict=False))
        if len(letters) < len(present) or len(letters) >= len(string.ascii_letters):
            raise Refused("its state has too many dims")
        step = string.ascii_letters[len(letters)]
        tensors, names = [], []
        for i in items:
            lead = [self.evaluator.steps] if i.batch.batched else []
            tensors.append(shaped(i.batch.x, lead + [a.size for a in i.atoms]))
            names.append(step * i.batch.batched + "".join(letters[a] for a in i.atoms))
        batched = any(i.batch.batched for i in items)
        out = step * batched + "".join(letters[a] for a in wanted if a in present)
        if len(items) == 1 and names[0] == out:
            return tensors[0], batched
        return torch.einsum(",".join(names) + "->" + out, tensors), batched


def spread(b: Batch, shape: Sequence[int], steps: int | None = None) -> torch.Tensor:
    """Expand to the full shape, with the steps in front (one, if `steps` is None and it is the same in
    all)."""
    x = b.x if b.batched else b.x.unsqueeze(0)
    lead = x.shape[0] if steps is None else steps
    return x if list(x.shape) == [lead, *shape] else x.expand(lead, *shape)


def shaped(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """reshape, where there is something to do."""
    return x if list(x.shape) == list(shape) else x.reshape(shape)


def permuted(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """permute, where there is something to do."""
    return x if list(order) == list(range(x.dim())) else x.permute(list(order))
