"""Loops over tokens (or chunks) that Dynamo has unrolled are re-rolled: a state that they carry becomes one
scan, and everything else in the body is computed for all steps at once.

    for t in range(T):                                        a, b  = the body, for all t
        S = decay[:, :, t] * S + k[:, :, t].mT @ v[:, :, t]   S     = affine_scan(a, b), or linear_attention
        o[:, :, t] = q[:, :, t] @ S                           o     = the body, for all t

1. `runs`: the loop is a periodic run of labels in the shadow.
2. `families`: the Values of all steps as one; every edge is invariant, same-iteration, carried or external.
3. `surroundings`: what the rest of the graph wants of the loop; which of its writes may go.
4. `affine`, `named`, `scans`: the carried state's update as a sum of products; the op that it is.
5. `evaluate`, `emission`: the body for all steps, traced on fake tensors, and put before the loop.

Whatever is not proved on the way is refused, before anything is edited.
"""

from __future__ import annotations

from spcompile.passes.recognize.edit import Editor, Refused
from spcompile.passes.recognize.loops.families import Loop
from spcompile.passes.recognize.loops.rewrite import rewrite
from spcompile.passes.recognize.loops.runs import Run, runs
from spcompile.passes.recognize.loops.surroundings import Surroundings
from spcompile.passes.shadow import Shadow
from spcompile.passes.sites import Site
from spcompile.source import source_of

__all__ = ["recognize"]


def recognize(shadow: Shadow, editor: Editor) -> list[tuple[int, Site]]:
    """Re-roll the loops of Dynamo's graph in place.

    Returns:
        (time, Site) of each that carried a state, or that was rewritten. If one was rewritten the shadow is
        out of date.
    """
    values = [v for v in shadow.values if v.node is not None and v.name not in ("input", "opaque")]
    taken: list[tuple[int, int]] = []
    sites: list[tuple[int, Site]] = []
    refused: list[Run] = []
    for run in runs(values):
        if any(run.start < stop and start < run.stop for start, stop in taken):
            continue
        if any(r.start <= run.start and run.stop <= r.stop + r.period for r in refused):
            continue  # several of its steps at a time
        loop = Loop(values, run)
        source = source_of(loop.body[0].node)
        try:
            around = Surroundings(shadow, loop).plan()
            kinds, node = rewrite(around, editor)
        except (Refused, RecursionError) as why:
            refused.append(run)
            if loop.carries:
                name = loop.body[0].node.name if loop.body[0].node is not None else ""
                sites.append((loop.body[0].time, Site("loop", "causal", False, str(why), source, name)))
            continue
        taken.append((run.start, run.stop))
        for kind in kinds:
            sites.append((loop.body[0].time, Site(kind, "causal", True, "", source, node)))
    return sites
