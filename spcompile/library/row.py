"""One row of the table: a library's function, and what its arguments mean to an adapter."""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Row", "digest", "parameters"]


@dataclass(frozen=True)
class Row:
    """A function that an adapter can stand for.

    Attributes:
        module, name: where the library defines it; a method is ``Class.method``.
        signature: its parameters with their defaults, as the versions that we know write them. A function
            whose parameters differ is another function, and left alone. ``also``: those of other versions.
        adapter: takes some of the parameters, by keyword, and returns what the function returns, or None
            where it does not know how.
        names: the adapter's name of a parameter, where the library has another.
        fixed: arguments that the adapter takes and the library's function does not have.
        extra: names that the adapter takes out of the function's ``**kwargs``, with their defaults.
        free: parameters that change no result (the length of a chunk, ...), whatever their value; "**kwargs"
            means all that the function has no name for.
        sources: the digests of the code that the adapter repeats, of all versions that are known. A method's
            parameters do not say what it computes: if its code is another, it is left alone.

    An argument that the adapter does not take, and is not free, must have its default: otherwise the
    library's own function is traced or called, as without us.
    """

    module: str
    name: str
    signature: str
    adapter: Callable[..., Any]
    names: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    also: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given, taken = set(parameters(self.signature)), set(self.taken.values()) | set(self.fixed)
        needed = {p.name for p in inspect.signature(self.adapter).parameters.values() if p.default is p.empty}
        assert set(self.names) <= given, f"{self.path}: {self.names} names no parameter of {self.signature}"
        assert needed <= taken, f"{self.path}: the adapter needs {needed - taken}"
        assert bool(self.sources) == ("." in self.name), f"{self.path}: methods, and no others, have sources"

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def defaults(self) -> dict[str, Any]:
        """Every name that an argument may have, with its default."""
        return parameters(self.signature) | dict(self.extra)

    @property
    def file(self) -> str:
        """The end of the path of the module's file."""
        return self.module.replace(".", "/") + ".py"

    @property
    def taken(self) -> dict[str, str]:
        """The library's name of each parameter that the adapter takes, and the adapter's."""
        accepts = set(inspect.signature(self.adapter).parameters)
        found = {n: self.names.get(n, n) for n in [*parameters(self.signature), *self.extra]}
        return {n: a for n, a in found.items() if a in accepts}


def parameters(function: str | Callable[..., Any]) -> dict[str, Any]:
    """Each parameter with its default (``Parameter.empty`` without one), variadic ones with a star."""
    written = isinstance(function, str)
    source: Any = eval(f"lambda {function}: None", {"inf": float("inf")}) if written else function
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = inspect.signature(source, follow_wrapped=False).parameters.values()
    return {stars.get(p.kind, "") + p.name: p.default for p in found}


def digest(function: types.FunctionType) -> str:
    """Of the function's code without its white space; empty where there is no source to read.

    Its own code: of a function, ``inspect.getsource`` would give that of what it wraps.
    """
    try:
        code = inspect.getsource(function.__code__)
    except OSError:
        return ""
    return hashlib.sha256("".join(code.split()).encode()).hexdigest()[:16]
