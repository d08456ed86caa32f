"""A pre-autograd ATen trace of Dynamo's graph, for recognizers to read.

Dynamo's graph speaks the user's language (methods, composite functions, in-place updates); recognizers want
one spelling of everything. The shadow is that: an `fx.Interpreter` runs Dynamo's graph under
`make_fx(pre_dispatch=True)` on fake tensors, and every ATen call becomes a `Value`, pure and immutable.
Nothing is ever compiled from the shadow: retracing a whole graph loses the custom backward of
`autograd_function_apply`. It is only read, and each Value knows the Dynamo node that made it, so that the
edit can be made on Dynamo's own graph.

`values` says what a shadow is made of, `spelling` how each operation is spelled, `build` makes Values of
calls (NOTE [How mutation is made functional]), `trace` runs the graph.
"""

from __future__ import annotations

from spcompile.passes.shadow.purity import is_pure
from spcompile.passes.shadow.trace import trace
from spcompile.passes.shadow.values import Record, Shadow, Value, Write, values_in

__all__ = ["Record", "Shadow", "Value", "Write", "is_pure", "trace", "values_in"]
