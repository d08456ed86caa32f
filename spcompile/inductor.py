"""Inductor's own options and modes, checked against Inductor's names and kept off the hooks that are ours."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_origin

from spcompile.errors import SpcompileError

__all__ = ["caches", "patches"]

# What a user may not set, and what to do instead.
_OURS = {
    "joint_custom_pre_pass": "spcompile shards the graph there; joint_custom_post_pass runs after it",
    "post_grad_custom_post_pass": "spcompile sees to waits there; post_grad_custom_pre_pass runs before it",
    "fallback_by_default": "the graph would reach the sharding rules before it is taken apart",
    "selective_decompose": "the graph would reach the sharding rules before it is taken apart",
    "freezing": "it folds parameters into constants, which the sharding rules take for inputs",
}


def patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's configuration for a mode of ``torch.compile`` and Inductor's options; the options win.

    Raises:
        SpcompileError: a mode or an option that Inductor does not have, a value of the wrong type, or an
            option that is spcompile's own to set.
    """
    from spcompile import _torch

    found: dict[str, Any] = {}
    if mode is not None:
        modes = _torch.list_mode_options()
        if mode not in modes or mode == "lite":
            why = "keeps whole what is sharded in pieces" if mode == "lite" else "there is no such mode"
            names = ", ".join(repr(m) for m in modes if m != "lite")
            raise SpcompileError(f"mode={mode!r}: {why}. Remedy: one of {names}.")
        found |= modes[mode]
    _hooks_are_free()
    for name, value in options.items():
        key = str(name).replace("-", "_")
        _check(key, value)
        found[key] = value
    return found


def caches(chosen: Mapping[str, Any]) -> bool:
    """Whether Inductor keeps what it compiles, under the patches that were chosen."""
    from spcompile import _torch

    config = _torch.inductor_config
    kept = chosen.get("fx_graph_cache", config.fx_graph_cache)
    return bool(kept) and not chosen.get("force_disable_caches", config.force_disable_caches)


def _check(name: str, value: Any) -> None:
    from spcompile import _torch

    known = _torch.inductor_config.get_config_copy()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else "torch._inductor.list_options() lists them."
        raise SpcompileError(f"option inductor: Inductor has no option {name!r}; {hint}")
    if name in _OURS:
        raise SpcompileError(f"option inductor: {name!r} cannot be set. Remedy: leave it out; {_OURS[name]}.")
    kind = _torch.inductor_config.get_type(name)
    if get_origin(kind) is None and not isinstance(value, kind):
        raise SpcompileError(
            f"option inductor: {name}={value!r} is a {type(value).__name__}. Remedy: give a {kind.__name__}."
        )


def _hooks_are_free() -> None:
    """Hooks set for the whole process would be lost without a word where ours stand."""
    from spcompile import _torch

    for name in ("joint_custom_pre_pass", "post_grad_custom_post_pass"):
        if getattr(_torch.inductor_config, name) is not None:
            raise SpcompileError(
                f"torch._inductor.config.{name} is set. Remedy: set it to None while spcompile compiles; "
                f"{_OURS[name]}."
            )
