"""After Inductor's own passes: collectives start early, waits come late, and none is left that nobody needs.

A wait counts as having side effects, so neither fx nor the partitioner drops a dead one: the backward would
gather again what the forward gathered, for nobody.

NOTE [Who orders waits]: a strategy writes start, intra-chunk work, wait, and the graph keeps that order.
Inductor's scheduler then moves operators to lower the peak of memory, which can put the work behind the wait
again; its own pass ``sink_waits_iterative`` runs after that and puts it back, as far as the peak of memory
allows (``sink_waits``, which does not look at it, put what all layers compute again behind the first gather
of a backward). It can also put the start behind work that does not need it; the other pass moves it up.
"""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["SCHEDULER", "erase_dead_waits"]

SCHEDULER: dict[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": [
        "reorder_communication_preserving_peak_memory",
        "sink_waits_iterative",
    ],
}
"""Inductor's options for several ranks; see NOTE [Who orders waits]."""


def erase_dead_waits(graph: fx.Graph) -> None:
    """Erase waits without users, with the collectives that they waited for."""
    for node in reversed(graph.nodes):
        collective = getattr(node.target, "namespace", "") == "_c10d_functional"
        if node.op == "call_function" and not node.users and collective:
            graph.erase_node(node)
