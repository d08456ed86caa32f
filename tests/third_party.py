"""How the tests get at other people's code: transformers' models and fla's functions, unmodified."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__all__ = ["fla_kernel", "fla_naive", "load", "transformers_function", "transformers_module"]


def load(module: str) -> Any:
    """Import a module; what it warns about itself is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def transformers_module(model: str, kind: str = "modeling") -> Any:
    """transformers' module of one model, with its own functions in plain PyTorch.

    Beside fla it would take fla's kernels on import, which need a GPU: fla is hidden meanwhile.
    """
    hidden = sys.modules.get("fla")
    sys.modules["fla"] = None  # type: ignore[assignment]
    try:
        return load(f"transformers.models.{model}.{kind}_{model}")
    finally:
        del sys.modules["fla"]
        if hidden is not None:
            sys.modules["fla"] = hidden


def transformers_function(model: str, name: str) -> Callable[..., Any]:
    """A function, or a class's method by its dotted name."""
    return operator.attrgetter(name)(transformers_module(model))


@functools.cache
def _fla_file(relative: str) -> Any:
    """One file of fla's ops, loaded by its path: importing the package imports all of its kernels."""
    spec = importlib.util.find_spec("fla")
    assert spec is not None and spec.submodule_search_locations
    path = Path(next(iter(spec.submodule_search_locations)), "ops", f"{relative}.py")
    name = "fla_file_" + relative.replace("/", "_")
    file = importlib.util.spec_from_file_location(name, path)
    assert file is not None and file.loader is not None
    module = importlib.util.module_from_spec(file)
    sys.modules[name] = module
    file.loader.exec_module(module)
    return module


def fla_naive(relative: str, name: str) -> Callable[..., Any]:
    """A reference in plain PyTorch: ``fla_naive("simple_gla/naive", "naive_chunk_simple_gla")``."""
    return getattr(_fla_file(relative), name)


def fla_kernel(relative: str, name: str) -> Callable[..., Any]:
    """An entry point of fla's kernels, which can be imported anywhere and run on a GPU."""
    return getattr(load("fla.ops." + relative.replace("/", ".")), name)
