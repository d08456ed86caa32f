"""Known functions of other libraries that compute linear attention become one operator in Dynamo's graph.

Dynamo would break the graph at them (they launch kernels), or unroll their loops. ``register`` tells Dynamo
what to trace in their place; called outside ``torch.compile`` they are what they were. The table of functions
is ``table.py``; what their arguments mean is in the adapters.
"""

from spcompile.library.registry import Status, UnknownVersion, known, register, watch

__all__ = ["Status", "UnknownVersion", "known", "register", "watch"]
