"""How memory states, keys and values cross ranks: one file and one row per strategy.

A strategy is written as ordinary functions of this rank's tensors; the communication pass traces them into
the graph.
"""

from spcompile.strategies.allgather import LinearAllGather, SoftmaxAllGather
from spcompile.strategies.protocol import LinearStrategy, SoftmaxStrategy

__all__ = ["LINEAR", "SOFTMAX", "LinearStrategy", "SoftmaxStrategy"]

# name (the value of the options ``linear`` and ``softmax``) -> strategy
LINEAR: dict[str, LinearStrategy] = {
    "allgather": LinearAllGather(),  # LASP-2
}
SOFTMAX: dict[str, SoftmaxStrategy] = {
    "allgather": SoftmaxAllGather(),  # LASP-2H
}
