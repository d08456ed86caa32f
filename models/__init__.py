"""Example models: plain `nn.Module`s, one file each, that know nothing of spcompile.

A file here joins by defining `PRESETS`, a dict of factories that build a model and take overrides as
keywords. Its models offer `example_inputs(seq, batch=1)`, the keyword arguments of one training call.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import partial

from torch import nn

__all__ = ["get", "names"]


def names() -> list[str]:
    """Every `"file:preset"` that `get` knows."""
    return [
        f"{module.name}:{preset}"
        for module in pkgutil.iter_modules(__path__)
        for preset in getattr(importlib.import_module(f"{__name__}.{module.name}"), "PRESETS", {})
    ]


def get(name: str, **overrides: object) -> Callable[[], nn.Module]:
    """A factory of the model called `name`, such as `"linear_llama3:tiny"`.

    Args:
        name: `"file:preset"`, with or without `models.` in front.
        overrides: fields of the model's configuration to change.
    Raises:
        ValueError: there is no such model.
    """
    name = name.removeprefix("models.")
    if name not in names():
        raise ValueError(f"no model is called {name!r}; there are {', '.join(names())}")
    module, preset = name.split(":")
    factory = importlib.import_module(f"{__name__}.{module}").PRESETS[preset]
    return partial(factory, **overrides)
