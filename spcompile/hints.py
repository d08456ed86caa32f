"""The option ``sequence_dims``: an argument's name and a dim, found among a graph's inputs or refused."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

from torch import Tensor, fx

from spcompile import _torch
from spcompile.errors import SpcompileError

__all__ = ["find"]

_LONG: set[str] = set()
"""Arguments that were given a sequence of more than one token: one token of them is no mistake then."""


def find(gm: fx.GraphModule, dims: Mapping[str, int]) -> dict[str, int]:
    """The joint graph's placeholder -> its sequence dim, counted from the front, for each hint that applies.

    A graph need not have every argument: what follows a graph break has what is left to compute.

    Raises:
        SpcompileError: a name that no function being run has for an argument, an argument that is no tensor,
            a dim that it does not have, or one of length 1.
    """
    if not dims:
        return {}
    found: dict[str, int] = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for name, dim in dims.items():
        # Dynamo names the argument x of forward L_x_, and an entry of **kwargs L_kwargs_x_.
        pattern = rf"[Ll]_(kwargs_)?{re.escape(name)}_"
        at = [i for i, node in enumerate(placeholders) if re.fullmatch(pattern, node.name)]
        for i in at:
            found[f"primals_{i + 1}"] = _checked(name, dim, placeholders[i].meta.get("example_value"))
        if not at:
            _is_an_argument(name, placeholders)
    return found


def _checked(name: str, dim: int, value: Any) -> int:
    given = f"option sequence_dims={{{name!r}: {dim}}}"
    if not isinstance(value, Tensor):
        raise SpcompileError(
            f"{given}: {name} is a {type(value).__name__}, which has no dims. "
            "Remedy: name an argument that is a tensor."
        )
    shape = list(value.shape)
    if not -len(shape) <= dim < len(shape):
        raise SpcompileError(
            f"{given}: {name} has the shape {shape}, so its dims are 0 to {len(shape) - 1}. "
            "Remedy: give the one along which the tokens lie."
        )
    if isinstance(shape[dim], int) and shape[dim] == 1 and name not in _LONG:
        raise SpcompileError(
            f"{given}: {name} has the shape {shape}, and dim {dim} has one entry, which no ranks can share. "
            "Remedy: give the dim along which the tokens lie, or leave the option out for one token."
        )
    _LONG.add(name)
    return dim % len(shape)


def _is_an_argument(name: str, placeholders: list[fx.Node]) -> None:
    """That a function on the stack has such an argument, though this graph does not read it."""
    frame = _torch.traced_frame()
    if frame is None:
        return  # a graph that Dynamo did not make
    code, values = frame
    arguments = [*_arguments(code, values)]
    if name in arguments:
        value = values.get(name)
        if isinstance(value, Tensor | None):
            return
        raise SpcompileError(
            f"option sequence_dims: the argument {name!r} is a {type(value).__name__}, not a tensor. "
            f"Remedy: name a tensor; {_what_there_is(arguments, placeholders)}"
        )
    if not any(name in _arguments(f.f_code, f.f_locals) for f in _stack()):
        raise SpcompileError(
            f"option sequence_dims: {code.co_name} has no argument {name!r}. "
            f"Remedy: {_what_there_is(arguments, placeholders)}"
        )


def _arguments(code: CodeType, values: Mapping[str, Any]) -> Iterator[str]:
    """The names of a function's arguments, and of the entries of its ``**kwargs``."""
    plain = code.co_argcount + code.co_kwonlyargcount
    yield from (n for n in code.co_varnames[:plain] if n != "self" and not n.startswith("___"))
    if code.co_flags & inspect.CO_VARKEYWORDS:
        others = values.get(code.co_varnames[plain + bool(code.co_flags & inspect.CO_VARARGS)])
        yield from others if isinstance(others, dict) else ()


def _stack() -> Iterator[Any]:
    """The frames outside this module: after a graph break the user's function is one of them."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals is not globals():
            yield frame
        frame = frame.f_back  # type: ignore[assignment]


def _what_there_is(arguments: list[str], placeholders: list[fx.Node]) -> str:
    shapes = {
        match[2]: list(value.shape)
        for node in placeholders
        if (match := re.fullmatch(r"[Ll]_(kwargs_)?(\w+)_", node.name))
        and isinstance(value := node.meta.get("example_value"), Tensor)
    }
    named = [f"{n} {shapes[n]}" if n in shapes else n for n in arguments]
    return f"there are {', '.join(named)}." if named else "it has no argument by name."
