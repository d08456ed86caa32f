"""Registers the table's functions with Dynamo, as far as their libraries are imported."""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spcompile import _torch
from spcompile.library.row import Row, digest, parameters

__all__ = ["Status", "UnknownVersion", "known", "register", "substitute", "watch"]


class UnknownVersion(UserWarning):
    """A library's function has other parameters than the versions that spcompile knows: it is left alone."""


@dataclass(frozen=True)
class Status:
    """What became of one function: ``problem`` is empty if it is registered."""

    row: Row
    module: str
    problem: str


_KNOWN: list[Status] = []
# The functions that were looked at, by their ids. Dynamo finds a substitution by that: none of them may die.
_SEEN: dict[int, Any] = {}


def known() -> list[Status]:
    """The functions of imported libraries that were found so far, registered or not."""
    return list(_KNOWN)


def register() -> None:
    """Tell Dynamo about the known functions of the modules imported so far; again and again if need be.

    Warns:
        UnknownVersion: a function has other parameters than we know. It is left alone.
    """
    for name, module, row in _imported():
        owner, function = _find(module, row.name)
        if not isinstance(function, types.FunctionType) or id(function) in _SEEN:
            continue
        problem = _register(row, function) if owner is module else _replace(row, owner, function)
        _KNOWN.append(Status(row, name, problem))
        _SEEN.update((id(f), f) for f in (function, _find(module, row.name)[1]))
        if problem:
            warnings.warn(f"spcompile: {name}.{row.name} is left alone: {problem}", UnknownVersion, 2)


def watch() -> None:
    """``register`` now, and whenever Dynamo is about to trace: libraries may be imported later.

    ``torch._dynamo.reset`` forgets the callback: the backend watches again whenever it is called.
    """
    register()
    callbacks = _torch.callback_handler.start_callbacks
    if _on_compile not in callbacks:
        callbacks.append(_on_compile)


def _on_compile(_: Any) -> None:
    register()


def _imported() -> Iterator[tuple[str, types.ModuleType, Row]]:
    """The imported modules with a row. A library's file that was loaded by its path is its module, too: some
    libraries can't be imported as a whole where a part of them can run."""
    from spcompile.library.table import BY_FILE, BY_MODULE

    modules: list[tuple[str, Any]] = list(sys.modules.items())
    for name, module in modules:
        if not isinstance(module, types.ModuleType):
            continue
        rows = BY_MODULE.get(name)
        if rows is None:
            file = vars(module).get("__file__")
            if not isinstance(file, str) or (rows := BY_FILE.get(_end(file))) is None:
                continue
            root = file.replace("\\", "/").removesuffix(rows[0].file)
            if not Path(root, rows[0].file.partition("/")[0], "__init__.py").is_file():
                continue
        for row in rows:
            yield name, module, row


def _find(module: types.ModuleType, name: str) -> tuple[Any, Any]:
    """What defines the function (a class or the module), and the function, if they are there."""
    owner, _, last = name.rpartition(".")
    place = vars(module).get(owner) if owner else module
    return place, None if place is None else vars(place).get(last)


def _end(file: str) -> str:
    """The last two parts of a path, under which the table lists its rows."""
    return "/".join(file.replace("\\", "/").rsplit("/", 2)[-2:])


def _chain(function: Callable[..., Any]) -> list[Any]:
    """A function and all that it wraps, the innermost last."""
    found = [function]
    while (inner := getattr(found[-1], "__wrapped__", None)) is not None and inner not in found:
        found.append(inner)
    return found


def _register(row: Row, function: types.FunctionType) -> str:
    """Register one function; what is the matter if it can't be."""
    chain = _chain(function)
    innermost = chain[-1]
    if not isinstance(innermost, types.FunctionType):
        return f"it wraps a {type(innermost).__name__}"
    versions = [v for v in (row.signature, *row.also) if _fits(innermost, v)]
    if not versions:
        return f"its parameters are ({', '.join(parameters(innermost))}), expected ({row.signature})"
    row = replace(row, signature=versions[0])
    # Dynamo stops at a disabled wrapper without a look at what it wraps, so the wrapper is registered, too.
    disabled = [f for f in chain[:-1] if getattr(f, "_torchdynamo_disable", False)]
    traceable = substitute(row, _fallback(disabled[0] if disabled else innermost))
    for target in dict.fromkeys([*disabled, innermost]):
        try:
            torch.compiler.substitute_in_graph(target, skip_signature_check=True)(traceable)
        except ValueError as why:
            return f"Dynamo refuses: {why}"
    return ""


def _replace(row: Row, owner: type, function: types.FunctionType) -> str:
    """Give a class a method that is the adapter in Dynamo and the library's own everywhere else.

    Dynamo does not ask for substitutions where it calls a module's ``forward``. What is the matter if the
    method is not one that we know.
    """
    if not _fits(function, row.signature):
        return f"its parameters are ({', '.join(parameters(function))}), expected ({row.signature})"
    if digest(function) not in row.sources:
        return "its code is not that of a version that spcompile knows"
    traceable = substitute(row, function)

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        return (traceable if torch.compiler.is_dynamo_compiling() else function)(*args, **kwargs)

    setattr(owner, function.__name__, method)
    return ""


def _fits(function: Callable[..., Any], signature: str) -> bool:
    expected, found = parameters(signature), parameters(function)
    return list(expected) == list(found) and all(_same(found[n], expected[n]) for n in found)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _fallback(function: Any) -> Callable[..., Any]:
    """The function as Dynamo would treat it without us; the function itself would be substituted again."""
    if getattr(function, "_torchdynamo_disable", False):
        return torch.compiler.disable(lambda *args, **kwargs: function(*args, **kwargs))
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def substitute(row: Row, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """What Dynamo traces in place of the row's function: its adapter where that knows all the arguments."""
    defaults, taken, free, adapter = row.defaults, row.taken, row.free, row.adapter
    order = tuple(parameters(row.signature))
    any_other = "**kwargs" in free
    start = dict(row.fixed)
    start.update((a, defaults[n]) for n, a in taken.items() if defaults[n] is not _EMPTY)

    def traceable(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(order, args))
        given.update(kwargs)
        mapped = dict(start)
        for name, value in given.items():
            if name in taken:
                mapped[taken[name]] = value
            elif name in free or (any_other and name not in defaults):
                continue
            elif name not in defaults or not _is_default(value, defaults[name]):
                return fallback(*args, **kwargs)
        result = adapter(**mapped)
        return fallback(*args, **kwargs) if result is None else result

    return traceable


_EMPTY = parameters("x")["x"]


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, Tensor) and bool(value == default))
