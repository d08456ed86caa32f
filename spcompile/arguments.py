"""The inputs of Dynamo's graph as the user knows them: ``input_ids``, or the parameter ``embed.weight``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from spcompile._torch import source_name

__all__ = ["Argument", "arguments_of", "examples_of"]

_STEP = r"_modules\['([^']+)'\]"
_STATE = re.compile(rf"\.({_STEP}|_parameters\[|_buffers\[|grad\b)|^L\['self'\]|^G\[")
_OWN = re.compile(r"\._(parameters|buffers)\['([^']+)'\]$")
_KEYWORDS = re.compile(r"^(kwargs|kw|kwds)\['(\w+)'\]")


@dataclass(frozen=True)
class Argument:
    """One input of a graph.

    Args:
        name: as the user would write it.
        kind: ``"argument"``, what a call passes; or ``"parameter"``, ``"buffer"``, ``"state"``, what is there
            before it. Dynamo lifts all of them to inputs.
    """

    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} `{self.name}`"


def arguments_of(gm: fx.GraphModule) -> list[Argument]:
    """The graph's placeholders, in their order."""
    return [_argument(n) for n in gm.graph.nodes if n.op == "placeholder"]


def examples_of(gm: fx.GraphModule) -> list[Any]:
    """What Dynamo traced the graph with: fake tensors, and symbols of sizes."""
    return [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]


def _argument(node: fx.Node) -> Argument:
    source = source_name(node)
    own = _OWN.search(source)
    if own is not None:
        path = ".".join([*re.findall(_STEP, source), own[2]])
        return Argument(path, own[1].removesuffix("s"))
    kind = "state" if _STATE.search(source) else "argument"
    if isinstance(node.meta.get("example_value"), nn.Parameter):
        kind = "parameter"
    return Argument(_spelt(source) or str(node.target), kind)


def _spelt(source: str) -> str:
    """``L['x'].size()[1]`` as ``x.size()[1]``; an entry of ``**kwargs`` by its key."""
    text = re.sub(r"[LG]\['(\w+)'\]", r"\1", source)
    return _KEYWORDS.sub(r"\2", text)

