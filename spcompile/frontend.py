"""What happens to Dynamo's graph before autograd: attention is recognized, the user's hints are found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

import spcompile.attention  # noqa: F401  (registers the operators that a kept edit writes)
from spcompile.config import Config
from spcompile.hints import find
from spcompile.passes.einsums import split_einsums, without_opt_einsum
from spcompile.passes.sites import Site
from spcompile.replay import Kept
from spcompile.source import source_of

if TYPE_CHECKING:
    from spcompile.passes.lengths import Lengths

__all__ = ["Frontend", "prepare"]


@dataclass
class Frontend:
    """The attention sites seen; by the names of the joint graph's placeholders, the sequence dims hinted and
    which are parameters; for which sizes the graph is right (None: all)."""

    sites: list[Any] = field(default_factory=list)
    hints: dict[str, int] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    lengths: Lengths | None = None


def _called(gm: fx.GraphModule) -> list[Site]:
    """The operators that the graph calls already: known library calls (spcompile.library)."""
    ops = torch.ops.spcompile
    attention, scans = ops.linear_attention, (ops.affine_scan, ops.max_scan)
    sites = []
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.target in (attention, attention.default):
                mask = "causal" if node.args[6] else "all"
                sites.append(Site("linear", mask, True, "", source_of(node), node.name))
            elif node.target in (*scans, *(s.default for s in scans)):
                sites.append(Site("scan", "causal", True, "", source_of(node), node.name))
    return sites


def prepare(gm: fx.GraphModule, config: Config, version: str | None = None) -> Frontend:
    """Edit Dynamo's graph in place.

    Args:
        version: of all that decides on the edit besides the graph, if the edit may be kept for later starts.
    """
    hints, called = find(gm, config.sequence_dims), _called(gm)
    kept = Kept(gm, version) if version is not None and config.recognize else None
    found = kept.again() if kept is not None else None
    lengths: Lengths | None = None
    if found is None:
        found, lengths = _recognized(gm, config)
        split_einsums(gm)
        if kept is not None and lengths is None:
            kept.keep(found)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    trained = [isinstance(n.meta.get("example_value"), nn.Parameter) for n in placeholders]
    parameters = tuple(f"primals_{i + 1}" for i, is_one in enumerate(trained) if is_one)
    return Frontend(called + found, hints, parameters, lengths)


def _recognized(gm: fx.GraphModule, config: Config) -> tuple[list[Site], Lengths | None]:
    # Imported here: a start that makes a kept edit again does not need them.
    from spcompile.passes.lengths import recognize_lengths
    from spcompile.passes.recognize import recognize

    with without_opt_einsum():
        if config.recognize and config.lengths == "symbolic":
            return recognize_lengths(gm)
        return (recognize(gm) if config.recognize else []), None
