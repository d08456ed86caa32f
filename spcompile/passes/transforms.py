"""What lies inside torch.vmap, torch.func.grad and the like is not read by the shadow, nor run.

Dynamo writes a transform out: a call that pushes a level on functorch's stack, calls on wrapped tensors, a
call that pops it. Run by an interpreter that fails in between, the level would stay. So the calls between are
kept as what they read from outside, and what leaves them is an opaque value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from spcompile import _torch

__all__ = ["Inside", "Transforms", "clean_state", "may_write"]

# These change what the process does with tensors until they are undone; nothing in the shadow needs them.
_SWITCHES = {
    "lazy_load_decompositions",
    "set_inplace_requires_grad_allowed",
    "_saved_tensors_hooks_disable",
    "_saved_tensors_hooks_enable",
}


@dataclass(frozen=True)
class Inside:
    """Stands for a result inside a transform; ``reads`` are the tensors from outside that it is made from."""

    reads: tuple[torch.Tensor, ...]


class Transforms:
    """How deep in transforms the interpreter stands, and what it does there."""

    def __init__(self) -> None:
        self.depth = 0
        self.writes = False

    def enclose(self, n: fx.Node) -> bool:
        """Whether ``n``, the next node, lies inside a transform, or begins or ends one."""
        name = _name(n)
        begins, ends = name.endswith("_increment_nesting"), name.endswith("_decrement_nesting")
        if begins and self.depth == 0:
            self.writes = False
        inside = self.depth > 0
        self.depth += begins - ends
        self.writes |= inside and may_write(n)
        return inside or begins or name in _SWITCHES

    @staticmethod
    def reads(args: Any) -> list[torch.Tensor]:
        """The tensors from outside that a call inside is given, or was made from."""
        found: dict[int, torch.Tensor] = {}
        for x in pytree.tree_leaves(args):
            tensors = x.reads if isinstance(x, Inside) else (x,) if isinstance(x, torch.Tensor) else ()
            found |= {id(t): t for t in tensors}
        return list(found.values())

    @staticmethod
    def leaves(n: fx.Node) -> bool:
        """Whether the result of ``n``, inside a transform, is an ordinary tensor, for use outside."""
        leaves = pytree.tree_leaves(n.meta.get("example_value"))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        return bool(tensors) and not any(map(_torch.is_wrapped, tensors))


def _name(n: fx.Node) -> str:
    if n.op not in ("call_function", "call_method"):
        return ""
    return n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")


def may_write(n: fx.Node) -> bool:
    """Whether a call may be one that writes to an operand, as far as its name tells."""
    name = _name(n)
    in_place = name.endswith("_") and not name.startswith("__")
    operator = getattr(n.target, "__module__", "") == "_operator" and name[:1] == "i" and name != "invert"
    return in_place or operator or name == "setitem" or "out" in n.kwargs or not name


@contextlib.contextmanager
def clean_state() -> Iterator[None]:
    """Undo the levels of functorch that are pushed inside, if what runs there fails."""
    depth = _torch.transform_depth()
    try:
        yield
    except BaseException:
        _torch.undo_transforms(depth)
        raise
