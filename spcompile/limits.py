"""Dynamo's recompile limit: never a run that is unsharded without a word.

A frame that needs more graphs than ``torch._dynamo.config.recompile_limit`` is run by Dynamo as it is: every
rank computes all of it. Dynamo asks one function whether the limit is reached; ours stands before it and
says so for frames that spcompile compiles, once for each.

NOTE [Training and inference are counted apart]
Both are graphs of one frame: eight lengths of ``generate()`` would leave none for training. So only graphs of
the same grad mode count. And when Dynamo has reached the limit it never looks at the frame again, not even
for the other mode; therefore a limit reached in inference is told to it as an operator that it cannot trace:
this call is run eagerly, what it calls is not compiled either, and the next call is looked at anew.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from spcompile import _torch
from spcompile.config import Config
from spcompile.errors import SpcompileError
from spcompile.source import source_of

__all__ = ["Unsharded", "compiling", "no_silent_fallback", "symbolic", "watch"]


class Unsharded(UserWarning):
    """A call was not sharded: Dynamo runs the frame eagerly, since it has reached its limit of graphs for it,
    or since the compiler failed on an operator whose result depends on data."""


@dataclass
class _Frame:
    """What spcompile has compiled of one frame: Dynamo's numbers of the graphs (it may start one over) by
    grad mode, who was told of the end, and how many of the last graphs of symbolic sizes serve one length."""

    config: Config
    source: str
    compiled: dict[bool, set[int]] = field(default_factory=lambda: {True: set(), False: set()})
    told: set[bool] = field(default_factory=set)
    in_vain: int = 0

    def graphs(self, training: bool) -> int:
        """How many."""
        return len(self.compiled[training])


_frames: dict[int, _Frame] = {}

# So many graphs of symbolic sizes in a row that serve one length each, and a frame's are compiled for theirs.
_IN_VAIN = 2


def compiling(gm: fx.GraphModule, config: Config) -> Config:
    """Note that Dynamo's graph ``gm`` of the current frame is about to be compiled.

    Returns:
        the config with which to compile it: each length for itself, if symbolic sizes were in vain before.
    """
    watch()
    current = _torch.CompileContext.current_compile_id()
    if current is None or current.frame_id is None:
        return config  # not called by Dynamo
    if current.frame_compile_id == 0 or current.frame_id not in _frames:
        _frames[current.frame_id] = _Frame(config, _source(gm))
    frame = _frames[current.frame_id]
    frame.compiled[torch.is_grad_enabled()].add(current.frame_compile_id or 0)
    return replace(config, lengths="each") if frame.in_vain >= _IN_VAIN else config


def symbolic(serves_others: bool) -> None:
    """Note whether a graph of the current frame, compiled with symbolic sizes, serves more than one length.

    Where it does not (chunks that Python walks), these cost several times as much and gain nothing. Once may
    be by chance: an argument that is passed for the first time has sizes that are numbers.
    """
    current = _torch.CompileContext.current_compile_id()
    frame = None if current is None or current.frame_id is None else _frames.get(current.frame_id)
    if frame is not None:
        frame.in_vain = 0 if serves_others else frame.in_vain + 1


def watch() -> None:
    """Stand before the function that Dynamo asks, and notice its resets: frames are then numbered anew."""
    callbacks = _torch.callback_handler.start_callbacks
    if _not_reset not in callbacks:
        _frames.clear()
        callbacks.append(_not_reset)
    asked = _torch.convert_frame.exceeds_recompile_limit
    if not hasattr(asked, "spcompile"):
        _torch.convert_frame.exceeds_recompile_limit = _before(asked)


def _not_reset(_: Any) -> None:
    """``torch._dynamo.reset`` forgets the callbacks."""


def _before(exceeds: Callable[[Any, Any], tuple[bool, str]]) -> Callable[[Any, Any], tuple[bool, str]]:
    @functools.wraps(exceeds)
    def asked(cache_size: Any, compile_id: Any) -> tuple[bool, str]:
        reached, limit = exceeds(cache_size, compile_id)
        if not reached or _not_reset not in _torch.callback_handler.start_callbacks:
            return reached, limit
        frame, training = _frames.get(compile_id.frame_id), torch.is_grad_enabled()
        if frame is None:
            return reached, limit
        few = frame.graphs(training) < _torch.dynamo_config.recompile_limit
        if few and not cache_size.will_compilation_exceed_accumulated_limit():
            return False, ""  # calls that were not compiled have ids, too, which Dynamo counts
        _tell(frame, training, limit)
        if not training:
            raise _torch.not_traced(f"spcompile: {limit} is reached")  # NOTE above
        return reached, limit

    asked.spcompile = True  # type: ignore[attr-defined]
    return asked


def _tell(frame: _Frame, training: bool, limit: str) -> None:
    """Warn once, or raise under ``on_limit="error"``.

    Raises:
        SpcompileError: under ``on_limit="error"``, at every call that is not sharded.
    """
    mode = "training" if training else "inference"
    text = (
        f"Dynamo has reached torch._dynamo.config.{limit} for {frame.source}: {frame.graphs(training)} "
        f"graphs of it were compiled for {mode}. Calls that need another are not compiled: every rank "
        "computes all of them, right but unsharded.\n"
        "Remedy: find what changes from call to call with TORCH_LOGS=recompiles; pad to a few lengths, or "
        f"raise torch._dynamo.config.{limit}."
    )
    if frame.config.on_limit == "error":
        raise SpcompileError(text)
    if training not in frame.told:
        frame.told.add(training)
        warnings.warn(f"spcompile: {text}", Unsharded, stacklevel=2)


@contextlib.contextmanager
def no_silent_fallback(gm: fx.GraphModule, config: Config) -> Iterator[None]:
    """Say so where compiling ``gm`` fails in a way that Dynamo takes for a graph break.

    Raises:
        SpcompileError: under ``on_limit="error"``.
    """
    try:
        yield
    except _torch.fallbacks as why:
        said = f"{type(why).__name__}: {str(why).strip()[:200]}"
        text = (
            f"compiling {_source(gm)} failed with {said}. Dynamo runs "
            "it eagerly: every rank computes all of it, right but unsharded.\n"
            "Remedy: move what depends on data out of the compiled part (torch.compiler.disable)."
        )
        if config.on_limit == "error":
            raise SpcompileError(text) from why
        warnings.warn(f"spcompile: {text}", Unsharded, stacklevel=2)
        raise


def _source(gm: fx.GraphModule) -> str:
    """The frame, by its first line that is in the graph."""
    lines = (source_of(node, outermost=True) for node in gm.graph.nodes)
    found = next(filter(None, lines), "")
    return f"a frame ({found})" if found else "a frame without source"
