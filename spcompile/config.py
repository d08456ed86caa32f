"""The options of ``torch.compile(model, backend="spcompile", options={...})``, checked before all else."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spcompile.errors import SpcompileError
from spcompile.kernels.choice import SWITCH, switched_off
from spcompile.strategies import LINEAR, SOFTMAX

__all__ = ["Config"]

_CHOICES = {
    "inputs": ("global", "sharded"),
    "outputs": ("auto", "whole", "sharded"),
    "linear": ("auto", *LINEAR),
    "softmax": ("auto", *SOFTMAX),
    "on_gather": ("warn", "error", "ignore"),
    "check": ("values", "shapes"),
    "gradients": ("whole", "partial"),
    "lengths": ("symbolic", "each"),
    "on_limit": ("warn", "error"),
    "regather": ("auto", True, False),
    "recognize": (True, False),
    "nan_padding": (True, False),
}


def _number(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _names(x: Any) -> bool:
    return isinstance(x, Mapping) and all(isinstance(name, str) for name in x)


# Options of many values: whether a value is of the right kind, and what that is.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "ranks": (lambda x: _number(x) and x >= 1, "a number of ranks, at least 1"),
    "sequence_dims": (
        lambda x: _names(x) and all(map(_number, x.values())),
        "a dict of an argument's name to the number of its dim, for instance {'input_ids': 1}",
    ),
    "inductor": (_names, "a dict of Inductor's options, for instance {'max_autotune': True}"),
    "mode": (lambda x: isinstance(x, str), "the name of a mode, for instance 'max-autotune'"),
    "mesh": (lambda x: hasattr(x, "get_group"), "a DeviceMesh, for instance mesh['sp']"),
}


@dataclass(frozen=True)
class Config:
    """What a user may choose.

    Args:
        mesh: a 1-D ``DeviceMesh``, the ranks along the sequence; default: all ranks of the job.
        inputs: ``"global"``, the same whole batch on every rank; or ``"sharded"``, each rank passes its own
            tokens (:func:`spcompile.shard`).
        outputs: one that carries the sequence stays this rank's part until somebody reads it (``"auto"``), is
            gathered at once (``"whole"``), or is returned as this rank's part (``"sharded"``).
        linear: how memory states cross ranks; ``"allgather"`` is LASP-2.
        softmax: how keys and values cross ranks; ``"allgather"`` is LASP-2H.
        gradients: of parameters: ``"whole"`` on every rank, or ``"partial"``: on each rank another value,
            whose mean over the ranks is the gradient. That is for a wrapper that averages over these ranks
            anyway (FSDP2, DDP): its reduction is then the only one.
        regather: gather keys and values again in the backward instead of saving them (less memory, more
            communication); ``"auto"``: where they are more than a tenth of what a layer saves besides.
        recognize: rewrite attention; without, sharding propagation alone does all (right, slower).
        on_gather: when an operator without a rule forces a gather: ``"warn"``, ``"error"`` or ``"ignore"``.
        check: what the ranks compare before each call: ``"values"`` of what it passes (and of parameters and
            buffers, at first and then now and then), or ``"shapes"`` alone.
        lengths: where Dynamo makes a size ``"symbolic"`` (from a function's second length on) one graph
            serves many; or ``"each"`` is compiled for itself, which takes less long.
        on_limit: when Dynamo runs a call unsharded, above all where its recompile limit is reached:
            ``"warn"`` or ``"error"``.
        sequence_dims: argument name -> the dim that is the sequence, where it is not to be inferred.
        ranks: compile for this many ranks without a process group (to inspect; such code is not run).
        nan_padding: a debugging mode: padding is filled with NaN, which must never reach a result.
        mode: as ``torch.compile(mode=...)``, which takes no options beside it: a mode of Inductor.
        inductor: Inductor's own options, by their names in ``torch._inductor.config``.
    """

    mesh: Any = None
    inputs: str = "global"
    outputs: str = "auto"
    linear: str = "auto"
    softmax: str = "auto"
    gradients: str = "whole"
    regather: bool | str = "auto"
    recognize: bool = True
    on_gather: str = "warn"
    check: str = "values"
    lengths: str = "symbolic"
    on_limit: str = "warn"
    sequence_dims: Mapping[str, int] = field(default_factory=dict)
    ranks: int | None = None
    nan_padding: bool = False
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> Config:
        """The config of a user's options.

        Raises:
            SpcompileError: an option that does not exist, or a value that it does not take.
        """
        if not isinstance(options, Mapping | None):
            raise SpcompileError(f"options={options!r}: must be a dict of the backend's options.")
        options = dict(options or {})
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}."
                raise SpcompileError(f"spcompile has no option {name!r}; {hint}")
        for name, choices in _CHOICES.items():
            value = options.get(name, choices[0])
            # True == 1, so the type counts too.
            if not any(type(value) is type(c) and value == c for c in choices):
                allowed = ", ".join(map(repr, choices))
                raise SpcompileError(f"option {name}={value!r}: must be one of {allowed}.")
        for name, (fits, wanted) in _KINDS.items():
            if options.get(name) is not None and not fits(options[name]):
                raise SpcompileError(f"option {name}={options[name]!r}: must be {wanted}.")
        return cls(**{name: value for name, value in options.items() if value is not None})

    def key(self) -> str:
        """A text that is equal for configs that compile alike (the mesh is told by its group)."""
        inductor = dict(sorted(self.inductor.items()))
        triton = f" {SWITCH}=0" if switched_off() else ""
        return repr(dataclasses.replace(self, mesh=None, inductor=inductor)) + triton
