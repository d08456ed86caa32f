"""What can be said of a mask's data without knowing it: its sign, and numbers that code alone fixes."""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile._torch import disable_current_modes
from spcompile.passes.recognize.algebra.dims import back_through_view, name_dims
from spcompile.passes.recognize.algebra.products import same_values, scalar
from spcompile.passes.shadow import Value
from spcompile.passes.shadow.spelling import target_of

_SMALL = 4096  # elements: as many as there are heads, not as there are tokens
_POSITIVE = {"exp", "exp2", "sigmoid", "softplus"}
_INPUTS = {"input", "opaque"}
_MODERATE = 1e4  # numbers in code that makes biases; a mask's are -1e9 or less
_ARITHMETIC = {
    *("add", "mul", "abs", "minimum", "maximum", "clamp", "cumsum", "sum", "arange", "embedding"),
    *("_to_copy", "clone", "detach", "reshape", "permute", "expand", "select", "slice", "repeat"),
    *("repeat_interleave", "cat", "stack", "flip", "diff"),
}
"""Operations on floats that give no infinity where they are given none, of numbers that occur."""


def positive(v: object) -> bool:
    """Whether every entry is positive, by the code that makes it."""
    if (c := scalar(v)) is not None:
        return c > 0
    if not isinstance(v, Value):
        return False
    if v.name in _POSITIVE:
        return True
    source = same_values(v)
    if source is None and (back := back_through_view(v, name_dims(v.shape))) is not None:
        source = back[0]
    if source is not None:
        return positive(source)
    if v.name in ("mul", "div", "add") and v.args.get("alpha", 1) > 0:
        return all(positive(v.args[n]) for n in ("self", "other")) or bool(_all_positive(constant(v)))
    return _all_positive(constant(v))


def _all_positive(x: Tensor | None) -> bool:
    return x is not None and bool((x > 0).all())


def bounded(x: object) -> bool:
    """Whether no entry is so large, of either sign, that it hides keys as a mask does, by its code.

    That code is arithmetic on whole numbers (positions, counts), parameters and moderate numbers: a factor of
    1e9 makes a mask of a 0 and a 1, and so does minus such a bias.
    """
    if (c := scalar(x)) is not None:
        return abs(c) <= _MODERATE
    if not isinstance(x, Value) or x.dtype is None:
        return False
    if not x.dtype.is_floating_point:
        return not x.dtype.is_complex
    if x.name == "input":
        return x.is_parameter
    if x.name == "full":
        return bounded(x.args["fill_value"])
    if (known := constant(x)) is not None:  # as many as heads
        return bool((known.abs() <= _MODERATE).all())
    if x.name == "div":
        return abs(scalar(x.args["other"]) or 0) >= 1 / _MODERATE and bounded(x.args["self"])
    if x.name == "pow":
        return (scalar(x.args["self"]) or 0) > 0 or isinstance(x.args["exponent"], int)
    numbers = (o for o in x.args.values() if isinstance(o, float))
    return x.name in _ARITHMETIC and all(bounded(o) for o in (*x.operands(), *numbers))


def constant(v: Value) -> Tensor | None:
    """The value of a small tensor that depends on no input: its code is run."""
    try:
        return _run(v)
    except (RuntimeError, TypeError, AttributeError, ValueError, NotImplementedError):
        return None  # an op that this short way does not know


def _run(x: object) -> Tensor:
    if not isinstance(x, Value) or x.name in _INPUTS:
        raise ValueError("data")
    if torch.Size(x.shape).numel() > _SMALL:
        raise ValueError("large")
    if x.name == "literal":
        return torch.tensor(x.args["value"], dtype=x.dtype)
    function = target_of(x)
    if function is None or torch.Tag.nondeterministic_seeded in function.tags or "empty" in x.name:
        raise ValueError("not fixed by its code")
    args = {n: _run(a) if isinstance(a, Value) else a for n, a in x.args.items()}
    if any(isinstance(b, Value) for a in args.values() if isinstance(a, (list, tuple)) for b in a):
        raise ValueError("nested operands")
    with disable_current_modes(), torch.no_grad():
        out = function(**args)
    if not isinstance(out, Tensor):
        raise ValueError("not a tensor")
    return out
