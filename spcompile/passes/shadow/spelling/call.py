"""A call of ATen on Values, and what rewrites one into the spelling that recognizers read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spcompile._torch import OpOverload
from spcompile.passes.shadow.values import Value

__all__ = ["Call", "Derive", "Rewrite", "by_schema", "each", "target_of"]


@dataclass(frozen=True)
class Call:
    """A call of `torch.ops.aten.<name>.<overload>`, arguments by name, and its result."""

    name: str
    overload: str
    args: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    device: torch.device | None

    def of(self, name: str, overload: str, /, **args: Any) -> Call:
        """Another call with this one's result."""
        return replace(self, name=name, overload=overload, args=args)

    def made(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Call:
        return replace(self, shape=tuple(shape), dtype=self.dtype if dtype is None else dtype)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def source(self) -> Value | None:
        """The operand of an operation on one tensor."""
        x = self.args.get("self", self.args.get("input"))
        return x if isinstance(x, Value) else None


Derive = Callable[[Call], Value]
"""Makes a Value of a call on the way."""
Rewrite = Callable[[Call, Derive], Call | None]
"""None: it is canonical as it stands."""


def target_of(v: Value) -> OpOverload | None:
    """The operator that a Value is a call of; None where it is none of ATen's."""
    target = getattr(getattr(torch.ops.aten, v.name, None), v.overload or "default", None)
    return target if isinstance(target, OpOverload) else None


def by_schema(target: OpOverload, args: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by name as those of a call: those before the first that is left out go by place."""
    positional: list[Any] = []
    rest = dict(args)
    for a in target._schema.arguments:
        if a.name not in rest or a.kwarg_only:
            break
        positional.append(rest.pop(a.name))
    return positional, rest


def each(names: str, rewrite: Rewrite) -> dict[str, Rewrite]:
    """One rewrite for several names."""
    return dict.fromkeys(names.split(), rewrite)
