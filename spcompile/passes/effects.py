"""What a node of Dynamo's graph may do besides computing its value, and which storages it touches.

Dynamo's graph speaks Python: methods, functions of torch, operators. What is known to be pure is listed; all
else is taken to have an effect.
"""

from __future__ import annotations

import enum
import functools
import inspect
import math
import operator
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from spcompile._torch import (
    FakeTensor,
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    enter_autocast,
    exit_autocast,
    set_grad_enabled,
)

__all__ = ["Effect", "Unknown", "effect_of", "storages"]


class Unknown(Exception):
    """An effect that is not understood: nothing may be moved."""


class Effect(enum.Enum):
    """What a node does: nothing else; something to its operands or to the random state; a change of mode that
    another node ends; or anything at all."""

    NONE = enum.auto()
    ACTS = enum.auto()
    OPENS = enum.auto()
    CLOSES = enum.auto()
    SETS = enum.auto()
    BARRIER = enum.auto()


# In the namespaces of torch: what draws random numbers, writes statistics or is no computation.
_ACTS = re.compile(
    r"rand|normal$|bernoulli|multinomial|dropout|poisson$|binomial|rrelu|gumbel|fractional_max|_norm_stats|"
    r"batch_norm|instance_norm|embedding_bag|embedding_renorm|seed|resize|backward|hook|retain|share_memory"
)
_NO_COMPUTATION = re.compile(
    r"^_|_$|^(set|get|use|is|init|save|load|compile|cond|while_loop|vmap|autocast|no_grad|enable|inference|"
    r"import|typename|manual|initial|fork|wait|export|profiler|jit|from_file|library|script|trace)(_|$)"
)
_BUILTINS = {getattr, abs, bool, float, int, len, max, min, pow, round, sum}
_IN_PLACE = {
    getattr(operator, f"__i{name}__", None)
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "concat"),
        *("lshift", "rshift"),
    )
} | {operator.setitem, operator.delitem}
_OPERATORS = {f for f in vars(operator).values() if callable(f)} - _IN_PLACE
_MATHS = {f for f in vars(math).values() if callable(f)}
_OURS = ("aten", "prims", "spcompile")


def _computations() -> dict[Any, str]:
    found: dict[Any, str] = {}
    for space in (torch, F, torch.linalg, torch.special, torch.fft):
        for name, f in vars(space).items():
            if callable(f) and not isinstance(f, type) and not _NO_COMPUTATION.search(name):
                found.setdefault(f, name)
    return found


_COMPUTATIONS = _computations()


def effect_of(node: fx.Node) -> Effect:
    """The effect of one node, by its target and its literal arguments."""
    if node.op in ("placeholder", "get_attr", "output"):
        return Effect.NONE
    if node.op == "call_method":
        return _effect_of_method(str(node.target))
    if node.op != "call_function" or "out" in node.kwargs:
        return Effect.ACTS
    modes = {enter_autocast: Effect.OPENS, exit_autocast: Effect.CLOSES, set_grad_enabled: Effect.SETS}
    target: Any = node.target
    if target in modes:
        return modes[target]
    if isinstance(target, OpOverload | OpOverloadPacket):
        return _effect_of_operator(target)
    if isinstance(target, HigherOrderOperator) or target in _IN_PLACE:
        return Effect.ACTS
    if target in _OPERATORS or target in _BUILTINS or target in _MATHS:
        return Effect.NONE
    name = _COMPUTATIONS.get(target)
    if name is None:
        return Effect.BARRIER
    return Effect.ACTS if _ACTS.search(name) or _writes(node, target, name) else Effect.NONE


def _effect_of_method(name: str) -> Effect:
    if not hasattr(Tensor, name):
        return Effect.BARRIER
    reads = name.startswith("__") and name.endswith("__") and not re.match(r"__(i|set|del)", name)
    if name in ("__index__", "__invert__", "__int__"):
        reads = True
    return Effect.NONE if reads or not (name.endswith("_") or _ACTS.search(name)) else Effect.ACTS


def _effect_of_operator(target: Any) -> Effect:
    packet = isinstance(target, OpOverloadPacket)
    overloads = [getattr(target, name) for name in target.overloads()] if packet else [target]
    pure = all(
        o.namespace in _OURS and not o._schema.is_mutable and torch.Tag.nondeterministic_seeded not in o.tags
        for o in overloads
    )
    return Effect.NONE if pure else Effect.ACTS


def _writes(node: fx.Node, target: Any, name: str) -> bool:
    """Whether this call writes to an operand, or draws numbers, because an argument says so."""
    if name == "embedding":  # max_norm, which renormalises rows in place
        return node.kwargs.get("max_norm", node.args[3] if len(node.args) > 3 else None) is not None
    if name == "scaled_dot_product_attention":
        return node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0) != 0.0
    at = _place_of_inplace(target)
    given = at is not None and len(node.args) > at and node.args[at]
    return bool(node.kwargs.get("inplace", given) or node.kwargs.get("training", False))


@functools.cache
def _place_of_inplace(target: Any) -> int | None:
    try:
        parameters = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a builtin, which has no such argument
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def storages(node: fx.Node) -> list[int]:
    """The storages of what a node reads and gives, by the fake tensors that Dynamo traced it with.

    Raises:
        Unknown: Dynamo left no value, or one that is no plain tensor.
    """
    found: dict[int, None] = {}
    for n in (*node.all_input_nodes, node):
        if n.op in ("get_attr", "output") or effect_of(n) in (Effect.OPENS, Effect.CLOSES, Effect.SETS):
            continue
        if "example_value" not in n.meta:
            raise Unknown
        for x in tree_leaves(n.meta["example_value"]):
            if isinstance(x, Tensor):
                if not isinstance(x, FakeTensor) or x.layout is not torch.strided:
                    raise Unknown
                found[x.untyped_storage()._cdata] = None
    return list(found)
