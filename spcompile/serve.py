"""Which calls a compiled graph may serve: those for whose lengths its recognition is proved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from spcompile.passes.lengths import Lengths

__all__ = ["inputs_of", "like", "served"]


def served(
    compiled: Any,
    lengths: Lengths | None,
    pristine: fx.GraphModule,
    places: Sequence[int],
    backend: Callable[..., Any],
) -> Any:
    """``compiled``, for the sizes for which it is right; other calls go to ``backend``'s own compilation of
    ``pristine``, Dynamo's graph as it was, by Dynamo as for any module.

    Args:
        places: the positions of the inputs of ``compiled`` among those of ``pristine``.
    """
    if lengths is None:
        return compiled
    other: list[Any] = []

    def checked(*args: Any) -> Any:
        given = inputs_of(args)
        if lengths.hold(given):
            return compiled(*args)
        if not other:
            other.append(torch.compile(pristine, backend=backend))
        return other[0](*(x for _, x in sorted(zip(places, given, strict=True), key=lambda pair: pair[0])))

    return like(compiled, checked)


def inputs_of(args: tuple[Any, ...]) -> Sequence[Any]:
    """The inputs of a call; AOTAutograd's callable may be given them as one list."""
    return args[0] if len(args) == 1 and isinstance(args[0], list) else args


def like(compiled: Any, wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """``wrapper``, which takes its inputs as ``compiled`` does: as a list, if that says so."""
    for name in ("_boxed_call",):
        if hasattr(compiled, name):
            setattr(wrapper, name, getattr(compiled, name))
    return wrapper
