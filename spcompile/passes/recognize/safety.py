"""A failure inside recognition costs speed and nothing else: the graph is put back as it was."""

from __future__ import annotations

import traceback

from torch import fx

from spcompile.passes.sites import FAILED, Site

__all__ = ["Snapshot", "failed"]


class Snapshot:
    """A copy of Dynamo's graph and of those nested in it, to go back to."""

    def __init__(self, gm: fx.GraphModule) -> None:
        modules = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
        self.graphs = [(m, _copied(m.graph)) for m in modules]

    def restore(self) -> None:
        """Give every module the graph that it had."""
        for module, graph in self.graphs:
            module.graph = graph  # which compiles it again


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph(tracer_cls=graph._tracer_cls)
    output, old = copy.graph_copy(graph, {}, return_output_node=True)
    made = copy.output(output)
    made.meta = dict(old.meta)
    copy.set_codegen(graph._codegen)
    for mine, theirs in zip(copy.nodes, graph.nodes, strict=True):
        for name, value in vars(theirs).items():  # what Dynamo notes on nodes besides their meta
            vars(mine).setdefault(name, value)
    return copy


def failed(why: Exception) -> Site:
    """What the report says of a recognition that failed: what, and where in spcompile."""
    frames = traceback.extract_tb(why.__traceback__)
    ours = [f for f in frames if "spcompile" in f.filename] or frames
    where = f"{ours[-1].filename.replace(chr(92), '/').rsplit('/', 1)[-1]}:{ours[-1].lineno}"
    text = (str(why).strip().splitlines() or [""])[0][:200]
    reason = f"recognition failed and left the graph as it was: {type(why).__name__}: {text} ({where})"
    return Site(FAILED, "unknown", False, reason, "", "")
