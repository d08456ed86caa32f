"""The rule table: what each operator does to the factors it runs over. docs/adding.md says how a row is
added.

Every row is proved by brute force in tests/test_rules.py. An operator that is not here is computed whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spcompile.rules import (
    attention,
    contractions,
    creation,
    filling,
    flips,
    indexing,
    kernels,
    pointwise,
    ports,
    reductions,
    routing,
    scans,
    views,
)
from spcompile.rules.base import Call, Context, Factors, Rule, Split, parse

__all__ = ["COMMITS", "PULLED", "RULES", "Call", "Context", "Factors", "Rule", "Split", "commits", "rule_for"]

aten, prims = torch.ops.aten, torch.ops.prims

RULES: dict[Any, str | Callable[[Call], Rule | None]] = {
    **contractions.CONTRACTIONS,
    aten.addmm.default: contractions.add_contraction,
    aten.baddbmm.default: contractions.add_contraction,
    # Views
    aten.view.default: views.reshape,
    aten._unsafe_view.default: views.reshape,
    aten.reshape.default: views.reshape,
    aten.squeeze.dim: views.reshape,
    aten.squeeze.dims: views.reshape,
    aten.squeeze.default: views.reshape,
    aten.unsqueeze.default: views.reshape,
    aten.permute.default: views.permute,
    aten.expand.default: views.expand,
    aten.select.int: views.Select,
    aten.slice.Tensor: views.window,
    aten.constant_pad_nd.default: views.pad,
    aten.slice_scatter.default: views.slice_scatter,
    # Reductions
    **dict.fromkeys(reductions.REDUCED_BY, reductions.reduction),
    aten.mean.default: reductions.mean,
    aten.mean.dim: reductions.mean,
    aten.var.correction: reductions.Variance,
    aten.var_mean.correction: reductions.Variance,
    aten.cumsum.default: scans.Cumsum,
    scans.reverse_cumsum: scans.Cumsum,
    aten.cumprod.default: reductions.rowwise,
    aten.logcumsumexp.default: reductions.rowwise,
    aten.cummax.default: reductions.rowwise,
    aten.cummin.default: reductions.rowwise,
    aten.topk.default: reductions.rowwise,
    aten.sort.default: routing.sort,
    aten.sort.stable: routing.sort,
    aten._softmax.default: reductions.rowwise,
    aten._log_softmax.default: reductions.rowwise,
    aten.glu.default: reductions.rowwise,
    aten.glu_backward.default: reductions.rowwise,
    # Several tensors side by side along one dim
    aten.cat.default: views.Concatenation,
    aten.flip.default: flips.Flip,
    prims.rev.default: flips.Flip,
    aten.repeat.default: views.repeat,
    aten.select_scatter.default: views.SelectScatter,
    aten.unbind.int: views.unbind,
    # The last dim holds the two parts of a complex number.
    aten.view_as_complex.default: "... c -> ...; whole c; linear 0",
    aten.view_as_real.default: "... -> ... c; whole c; linear 0",
    # Indexing
    # A row of the table for each index: any row may be asked for.
    aten.embedding.default: "v d, ... -> ... d; whole v; linear 0",
    aten.gather.default: routing.gather,
    aten.masked_scatter.default: filling.MaskedScatter,
    aten.masked_scatter_backward.default: filling.MaskedScatterBackward,
    aten.scatter.value: indexing.scatter,
    aten.scatter.src: routing.scatter,
    aten.scatter.reduce: indexing.scatter,
    aten.scatter.value_reduce: indexing.scatter,
    aten.scatter_reduce.two: indexing.scatter,
    aten.scatter_add.default: routing.scatter_add,
    aten.bucketize.Tensor: indexing.searchsorted,
    aten.searchsorted.Tensor: indexing.searchsorted,
    aten.index.Tensor: routing.index,
    aten.index_put.default: routing.index_put,
    aten._unsafe_masked_index_put_accumulate.default: indexing.index_put,
    aten.histc.default: routing.histogram,
    aten._grouped_mm.default: routing.grouped_mm,
    # Creation
    aten.full.default: creation.full,
    aten.new_empty_strided.default: creation.like,
    prims.iota.default: creation.iota,
    aten.rand.default: creation.random("rand"),
    aten.randn.default: creation.random("randn"),
    **kernels.KERNELS,
    **attention.RULES,
}

# Operators of other libraries, by name: they are there once the library is imported.
LIBRARIES: dict[str, Callable[[Call], Rule | None]] = {
    "transformers::grouped_mm_fallback": routing.grouped_mm,
    "transformers::grouped_mm_fallback_backward": routing.grouped_mm_with_gradients,
}

# Same entries under other dims: pulled by each consumer in the placement that it needs, so that a gather
# happens at the root of a chain of views, once.
PULLED = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.unsqueeze.default,
        aten.permute.default,
        aten.expand.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.constant_pad_nd.default,
        aten.slice_scatter.default,
        aten.select_scatter.default,
        aten.alias.default,
        aten.clone.default,
        ports.LEND,
    }
)

# Too much work (or chance) to do again for each consumer: computed once, in one placement, even where every
# operand is an input of the graph.
COMMITS = frozenset(
    {
        *attention.RULES,
        *contractions.CONTRACTIONS,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.embedding.default,
        aten.rand.default,
        aten.randn.default,
        aten.sort.default,
        aten.sort.stable,
        aten.topk.default,
        *kernels.KERNELS,
        *ports.COMMITS,
    }
)


def commits(op: Any) -> bool:
    """Whether ``op`` is computed once: it is much work, or draws."""
    return op in COMMITS or _draws(op)


def _draws(op: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


def _drops_nothing(call: Call) -> bool:
    """Fused attention counts as drawing, which it does only with a dropout."""
    names = [a.name for a in call.op._schema.arguments]
    return "dropout_p" in names and call.argument(names.index("dropout_p"), "dropout_p", 0.0) == 0.0


def rule_for(call: Call) -> Rule | None:
    """The rule of this call, or None: then it is computed whole on every rank."""
    entry = RULES.get(call.op, ports.PORTS.get(call.op)) or LIBRARIES.get(call.op._name)
    if entry is None:
        if _draws(call.op) and not _drops_nothing(call):
            return creation.OneDraw(call)
        return pointwise.pointwise(call) if pointwise.is_pointwise(call.op) else None
    return parse(entry, call) if isinstance(entry, str) else entry(call)
