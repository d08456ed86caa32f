"""Floats that Dynamo makes symbols of, though the graph only has them as tensors.

Dynamo gives every 0-d float64 tensor on the CPU (a step counter, say) a symbol for its value, and AOTAutograd
starts the trace anew for each symbol that it finds no use of. The new trace then drops calls on such tensors
that nobody uses the result of: ``self.steps.mul_(2)`` as a statement is lost, under any backend (torch 2.13).
Nothing is to be made of such a symbol, so it is counted as dealt with beforehand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import fx
from torch.utils._pytree import tree_leaves

from spcompile import _torch
from spcompile.passes.numbers import SYMBOLIC

__all__ = ["no_restart"]


@contextlib.contextmanager
def no_restart(gm: fx.GraphModule) -> Iterator[None]:
    """While ``gm``, Dynamo's graph, is compiled, symbols of floats that it has no use of restart nothing."""
    added = _unused(gm) - _torch.TensorifyState.force_specializations
    _torch.TensorifyState.force_specializations |= added
    try:
        yield
    finally:
        _torch.TensorifyState.force_specializations -= added


def _unused(gm: fx.GraphModule) -> set[str]:
    modules = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    values = [n.meta.get("example_value") for m in modules for n in m.graph.nodes]
    mode = _torch.detect_fake_mode(values)
    if mode is None or mode.shape_env is None:
        return set()
    numbers = [x for x in tree_leaves(values) if isinstance(x, SYMBOLIC)]
    used = {str(s) for x in numbers for s in x.node.expr.free_symbols}
    return {str(s) for s in _torch.float_symbols(mode.shape_env)} - used
