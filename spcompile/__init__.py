"""Sequence parallelism that nobody has to write: ``torch.compile(model, backend="spcompile")``."""

from __future__ import annotations

from typing import Any

from spcompile.errors import SpcompileError

__all__ = ["SpcompileError", "dtensor", "explain", "local", "shard"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use: looking the backend up must not cost anybody the import of Inductor.
    if name == "explain":
        from spcompile.reports.explainer import explain

        return explain
    if name in ("local", "shard"):
        from spcompile import parts

        return getattr(parts, name)
    if name == "dtensor":
        from spcompile.dtensors import dtensor

        return dtensor
    raise AttributeError(f"module 'spcompile' has no attribute {name!r}")
