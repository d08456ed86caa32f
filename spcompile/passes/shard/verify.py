"""Fail closed: what the passes wrote is checked by other means than those that wrote it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from spcompile.errors import SpcompileError
from spcompile.passes.numbers import unsized
from spcompile.passes.shard.copies import Effect, effects
from spcompile.passes.shard.localize import Localizer, same_strides
from spcompile.placement import local_shape

__all__ = ["check_outputs", "verify"]


def verify(graph: fx.Graph, localizer: Localizer, before: list[Effect]) -> None:
    """Check the local graph.

    Every version of every tensor has the shape and dtype that its placement gives the global tensor; no
    operator is left that Inductor would have decomposed; what the graph did ``before`` besides computing (the
    inputs that it writes) it still does, once and in order.

    Raises:
        SpcompileError: names the node, the user's source line and what is wrong.
    """
    for (value, placement, _), local in localizer.versions.items():
        node, index = value
        whole = node.meta["val"]
        whole = whole[index] if isinstance(whole, (tuple, list)) else whole
        if unsized(whole):  # a copy's result, which is only ever whole
            continue
        expected = local_shape(tuple(whole.shape), placement)
        if tuple(local.shape) != expected or local.dtype != whole.dtype:
            found = f"{tuple(local.shape)} {local.dtype}"
            _fail(node, f"{placement} should be {expected} {whole.dtype}, is {found}")
    originals = set(localizer.originals)
    decomposed = localizer.emitter.decompositions
    allowed = localizer.emitter.declined | {n.target for n in originals if n.op == "call_function"}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node in originals:
            _fail(node, "was left behind")
        if node.target in decomposed and node.target not in allowed:
            _fail(node, f"{node.target} is decomposed by Inductor")
    _check_effects(graph, before)
    graph.lint()


def _check_effects(graph: fx.Graph, before: list[Effect]) -> None:
    after = effects(graph)
    if after == before:
        return
    lost = [e for e in before if before.count(e) != after.count(e)] or [e for e in after if e not in before]
    what = f"{lost[0].target} on {', '.join(lost[0].inputs) or 'no input'} is not there as often as it was"
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    _fail(output, what if lost else "what the graph does besides computing is in another order")


def check_outputs(before: list[Any], graph: fx.Graph) -> None:
    """Check that what is returned has eager's shapes, dtypes and strides: ``before`` are the old values.

    Raises:
        SpcompileError: as :func:`verify`.
    """
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    for old, new in zip(before, tree_leaves(output.args), strict=True):
        if not isinstance(old, Tensor) or unsized(old):
            continue
        value = new.meta["val"]
        if tuple(value.shape) != tuple(old.shape) or value.dtype != old.dtype:
            expected = f"{tuple(old.shape)} {old.dtype}"
            _fail(new, f"is returned as {tuple(value.shape)} {value.dtype}, eager has {expected}")
        if not same_strides(value, tuple(old.stride())):
            _fail(new, f"is returned with strides {tuple(value.stride())}, eager has {tuple(old.stride())}")


def _fail(node: fx.Node, what: str) -> None:
    where = node.meta.get("stack_trace", "").strip() or "no source line is known"
    raise SpcompileError(
        f"spcompile wrote a wrong graph at node {node.name} ({node.target}): {what}\n{where}\n"
        "This is a defect of spcompile, not of the model. "
        "Remedy: report it; until then use backend='inductor'."
    )
