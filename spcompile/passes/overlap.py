"""After Inductor's own passes: collectives start early, waits come late, and none is left that nobody needs.

A wait counts as having side effects, so neither fx nor the partitioner drops a dead one: the backward would
gather again what the forward gathered, for nobody.

NOTE [Who orders waits]: a strategy writes start, intra-chunk work, wait, and the graph keeps that order.
Inductor's scheduler then moves operators to lower the peak of memory, which can put the work behind the wait
again; its own pass ``sink_waits`` runs after that and puts it back. On GPUs that is ``sink_waits_iterative``,
which goes as far as the peak of memory allows: the other put what all layers compute again behind the first
gather of a backward (KDA's). On a CPU the iterative one leaves waits where they are. The scheduler can also
put the start behind work that does not need it; another pass of Inductor's moves it up.

What is moved must stay behind what it waits for, and up to torch 2.13 the scheduler forgets that a kernel
reads what a wait has written: ``spcompile/_torch.py`` mends it (``tests/test_waits.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

__all__ = ["erase_dead_waits", "on_gpu", "scheduler"]

_SINK = {True: "sink_waits_iterative", False: "sink_waits"}


def on_gpu(inputs: Iterable[Any]) -> bool:
    """Whether a graph with such inputs is one for a GPU."""
    return any(isinstance(x, Tensor) and x.device.type not in ("cpu", "meta") for x in inputs)


def scheduler(gpu: bool) -> dict[str, Any]:
    """Inductor's options for several ranks; see NOTE [Who orders waits]."""
    passes = ["reorder_communication_preserving_peak_memory", _SINK[gpu]]
    return {
        "reorder_for_compute_comm_overlap": True,
        "reorder_for_compute_comm_overlap_passes": passes,
    }


def erase_dead_waits(graph: fx.Graph) -> None:
    """Erase waits without users, with the collectives that they waited for."""
    for node in reversed(graph.nodes):
        collective = getattr(node.target, "namespace", "") == "_c10d_functional"
        if node.op == "call_function" and not node.users and collective:
            graph.erase_node(node)
