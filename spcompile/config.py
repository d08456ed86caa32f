"""The options of ``torch.compile(model, backend="spcompile", options={...})``, checked before all else."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spcompile.errors import SpcompileError

__all__ = ["Config"]

_CHOICES = {
    "linear": ("auto", "allgather"),
    "softmax": ("auto", "allgather"),
    "on_gather": ("warn", "error", "ignore"),
    "check": ("values", "shapes"),
    "regather": (True, False),
    "recognize": (True, False),
}


@dataclass(frozen=True)
class Config:
    """What a user may choose.

    Args:
        mesh: a 1-D ``DeviceMesh``, the ranks along the sequence; default: all ranks of the job.
        linear: how memory states cross ranks; ``"allgather"`` is LASP-2.
        softmax: how keys and values cross ranks; ``"allgather"`` is LASP-2H.
        regather: gather keys and values again in the backward instead of saving them (less memory, more
            communication).
        recognize: rewrite attention; without, sharding propagation alone does all (right, slower).
        on_gather: when an operator without a rule forces a gather: ``"warn"``, ``"error"`` or ``"ignore"``.
        check: what the ranks compare before each call: ``"values"`` of what it passes (and of parameters and
            buffers, at first and then now and then), or ``"shapes"`` alone.
        sequence_dims: argument name -> the dim that is the sequence, where it is not to be inferred.
        ranks: compile for this many ranks without a process group (to inspect; such code is not run).
        nan_padding: a debugging mode: padding is filled with NaN, which must never reach a result.
    """

    mesh: Any = None
    linear: str = "auto"
    softmax: str = "auto"
    regather: bool = False
    recognize: bool = True
    on_gather: str = "warn"
    check: str = "values"
    sequence_dims: Mapping[str, int] = field(default_factory=dict)
    ranks: int | None = None
    nan_padding: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> Config:
        """The config of a user's options.

        Raises:
            SpcompileError: an option that does not exist, or a value that it does not take.
        """
        options = dict(options or {})
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}."
                raise SpcompileError(f"spcompile has no option {name!r}; {hint}")
        for name, choices in _CHOICES.items():
            if name in options and options[name] not in choices:
                allowed = ", ".join(map(repr, choices))
                raise SpcompileError(f"option {name}={options[name]!r}: must be one of {allowed}.")
        config = cls(**options)
        if config.ranks is not None and (not isinstance(config.ranks, int) or config.ranks < 1):
            raise SpcompileError(f"option ranks={config.ranks!r}: must be a number of ranks, at least 1.")
        return config

    def key(self) -> str:
        """A text that is equal for configs that compile alike (the mesh is told by its group)."""
        return repr(dataclasses.replace(self, mesh=None))
