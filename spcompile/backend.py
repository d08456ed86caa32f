"""The backend: ``torch.compile(model, backend="spcompile")`` comes here with Dynamo's graph."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from spcompile import _torch, floats, inductor, library, limits, watch
from spcompile.agreement import Agreement
from spcompile.boundary import open_boundary
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.errors import SpcompileError
from spcompile.frontend import Frontend, prepare
from spcompile.groups import sequence_group
from spcompile.passes import chunks, overlap
from spcompile.passes.canonical import canonicalise, in_their_order, own_copy
from spcompile.passes.shard import Sharded, shard_joint_graph
from spcompile.passes.shard.ports import close_ports
from spcompile.reports.report import RECORDS, Record, strategy_names
from spcompile.serve import inputs_of, like, served
from spcompile.warm import Told

__all__ = ["ForcedGather", "OneLengthEach", "spcompile"]


# PyTorch imports this module when the backend is looked up, before it traces anything.
library.watch()
limits.watch()


class OneLengthEach(UserWarning):
    """Symbolic sizes failed in spcompile's passes: each length is compiled for itself."""


class _SymbolicSizesFailed(Exception):
    pass


class ForcedGather(UserWarning):
    """An operator that no rule covers was computed whole on every rank: right, but slower."""


def spcompile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile Dynamo's graph to run sharded along the sequence.

    The options are those of :class:`spcompile.config.Config`; the modes are Inductor's.

    Raises:
        SpcompileError: bad options, no process group, ranks that disagree; always before a collective of
            the model.
    """
    library.watch()
    config = Config.of({**(options or {}), "mode": mode} if mode is not None else options)
    chosen = inductor.patches(config.mode, config.inductor)
    if config.ranks is not None:
        raise SpcompileError(
            f"option ranks={config.ranks}: what is compiled for ranks that are not there cannot run. "
            "Remedy: spcompile.explain(model, ranks=...) shows it; to train, start as many processes."
        )
    group = sequence_group(config)
    config = limits.compiling(gm, config)
    record = Record(group, strategy_names(group, config))
    pristine, passed = gm, example_inputs
    with record.timed("canonical"):
        gm = own_copy(gm)
        places = canonicalise(gm)
        example_inputs = [example_inputs[i] for i in places]
    boundary, compiled_for = open_boundary(gm, example_inputs, group, config)
    with record.timed("recognize"):
        frontend = prepare(gm, config, source_hash() if inductor.caches(chosen) else None)
    record.sites = frontend.sites
    agreement = Agreement.of(gm, example_inputs, group, config, {"spcompile's sources": source_hash()})
    agreement.before_compiling(example_inputs)
    RECORDS.append(record)
    told = Told(record, gm, source_hash())
    patches: dict[str, Any] = {
        **(overlap.scheduler(overlap.on_gpu(example_inputs)) if group.size > 1 else {}),
        **chosen,
        "joint_custom_pre_pass": JointPass(group, config, frontend, told, bool(boundary.sizes)),
        "post_grad_custom_post_pass": WaitPass(told),
    }
    again = functools.partial(spcompile, mode=mode, options=options)
    try:
        with limits.no_silent_fallback(gm, config), floats.no_restart(gm):
            compiled = told.compile(
                lambda more: _torch.compile_fx(gm, compiled_for, config_patches={**patches, **more})
            )
    except _SymbolicSizesFailed as why:  # on all ranks alike
        RECORDS.remove(record)
        text = f"symbolic sizes failed ({why}); each length is compiled for itself. Please report it."
        warnings.warn(f"spcompile: {text}", OneLengthEach, stacklevel=2)
        return spcompile(pristine, passed, mode=mode, options={**(options or {}), "lengths": "each"})
    boundary.settle(record.lent)
    if boundary.sizes and config.lengths == "symbolic":
        limits.symbolic(boundary.sizes.serve_others(group.size))
    watch.compiled(record)
    tell_gathers(record.gathers, config)

    own = served(boundary.around(compiled), frontend.lengths, pristine, places, again)

    def checked(*args: Any) -> Any:
        agreement.before_calling(inputs_of(args))
        return own(*args)

    return in_their_order(like(own, checked) if group.size > 1 else own, places)


@functools.cache
def source_hash() -> str:
    """A hash of spcompile's sources: Inductor's cache must not serve a graph that other passes wrote."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class JointPass(_torch.CustomGraphPass):
    """Inductor's hook on the joint graph.

    Args:
        symbolic: whether a size of the graph's inputs is a symbol.
    """

    def __init__(
        self, group: Group, config: Config, frontend: Frontend, told: Told, symbolic: bool
    ) -> None:
        self.group, self.config, self.told = group, config, told
        self.symbolic = symbolic and config.lengths == "symbolic"
        self.named = frontend.hints, frontend.parameters

    def __call__(self, graph: fx.Graph) -> None:
        watch.graph("before", graph)
        with self.told.record.timed("shard"):
            sharded = self._shard(graph)
        watch.graph("after", graph)
        # A graph that a cache serves never comes here: whatever its caller needs to know of it (and not only
        # reports) must be kept with what was told, and be taken from there in `Told._retell`.
        self.told.saw_joint(graph, sharded)
        if self.config.on_gather == "error":  # before Inductor spends its time
            tell_gathers(sharded.gathers, self.config)

    def _shard(self, graph: fx.Graph) -> Sharded:
        try:
            return shard_joint_graph(graph, self.group, self.config, *self.named)
        except SpcompileError:
            raise
        except Exception as why:
            if self.symbolic:
                raise _SymbolicSizesFailed(f"{type(why).__name__}: {str(why)[:200]}") from why
            raise

    def uuid(self) -> Any:
        return (source_hash(), self.config.key(), repr(self.group), repr(self.named), self.told.joint)


class WaitPass(_torch.CustomGraphPass):
    """Inductor's hook after its own passes on the forward, and later the backward, graph."""

    def __init__(self, told: Told) -> None:
        self.told = told

    def __call__(self, graph: fx.Graph) -> None:
        overlap.erase_dead_waits(graph)
        chunks.in_pieces(graph)
        close_ports(graph)
        self.told.saw_final(graph)

    def uuid(self) -> Any:
        return (source_hash(), chunks.LEAST_BYTES, chunks.PIECES)


def tell_gathers(gathers: Sequence[Any], config: Config) -> None:
    """Say which operators were computed whole, as the option ``on_gather`` wants it.

    Raises:
        SpcompileError: under ``on_gather="error"``.
    """
    if not gathers or config.on_gather == "ignore":
        return
    lines = [f"  {g.node} ({g.op}): {g.reason}; {g.bytes:,} bytes gathered; {g.source}" for g in gathers]
    text = "computed whole on every rank, because they cannot be sharded:\n" + "\n".join(lines)
    if config.on_gather == "error":
        raise SpcompileError(
            f"{text}\nRemedy: on_gather='warn' accepts this (right, slower); "
            "docs/adding.md says how to add a rule."
        )
    warnings.warn(f"spcompile: {text}", ForcedGather, stacklevel=2)
