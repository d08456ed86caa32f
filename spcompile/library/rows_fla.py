"""Rows of flash-linear-attention: entry points of its kernels, its references in plain PyTorch, its short
convolution."""

from __future__ import annotations

from typing import Any

import torch

from spcompile.library.decays import (
    gated,
    lightning,
    parallel,
    parallel_loop,
    parallel_retention,
    retention,
    rwkv6,
)
from spcompile.library.delta import delta_rule
from spcompile.library.features import based, linear, rebased
from spcompile.library.packed import fla_convolution
from spcompile.library.row import Row
from spcompile.library.scans import hgrn

__all__ = ["ROWS"]

_STATE = "initial_state=None, output_final_state=False"
_FLOAT = {"compute": torch.float32}
_FREE = frozenset({"chunk_size", "cu_seqlens_cpu"})
_SUMMED = {"gk": "g"}


def _row(path: str, signature: str, adapter: Any, names: Any = None, **fixed: Any) -> Row:
    module, name = f"fla.ops.{path}".rsplit(".", 1)
    return Row(module, name, signature, adapter, names or {}, fixed, free=_FREE)


# The kernels take [B, T, H, D]; they compute in the dtype of q, with sums and states in float32.
_KERNELS = [
    _row(
        "linear_attn.chunk.chunk_linear_attn",
        f"q, k, v, scale=None, {_STATE}, normalize=True, cu_seqlens=None",
        linear,
    ),
    _row(
        "linear_attn.fused_chunk.fused_chunk_linear_attn",
        f"q, k, v, scale=None, {_STATE}, normalize=True, cu_seqlens=None",
        linear,
    ),
    _row(
        "linear_attn.fused_recurrent.fused_recurrent_linear_attn",
        f"q, k, v, scale=None, {_STATE}, reverse=False, normalize=False, cu_seqlens=None",
        linear,
    ),
    _row(
        "simple_gla.chunk.chunk_simple_gla",
        f"q, k, v, g=None, g_gamma=None, scale=None, {_STATE}, state_v_first=False, cu_seqlens=None, "
        "cu_seqlens_cpu=None, **kwargs",
        gated,
    ),
    _row(
        "simple_gla.fused_chunk.fused_chunk_simple_gla",
        f"q, k, v, g=None, g_gamma=None, scale=None, {_STATE}, cu_seqlens=None",
        gated,
    ),
    _row(
        "simple_gla.fused_recurrent.fused_recurrent_simple_gla",
        f"q, k, v, g=None, g_gamma=None, scale=None, {_STATE}, reverse=False, state_v_first=False, "
        "cu_seqlens=None, **kwargs",
        gated,
    ),
    _row(
        "simple_gla.parallel.parallel_simple_gla",
        "q, k, v, g=None, scale=None, output_attentions=False, cu_seqlens=None, cu_seqlens_cpu=None",
        parallel,
    ),
    _row(
        "retention.chunk.chunk_retention",
        f"q, k, v, scale=None, {_STATE}, cu_seqlens=None, **kwargs",
        retention,
    ),
    _row(
        "retention.fused_chunk.fused_chunk_retention",
        f"q, k, v, scale=None, {_STATE}, cu_seqlens=None",
        retention,
    ),
    _row(
        "retention.fused_recurrent.fused_recurrent_retention",
        f"q, k, v, scale=None, {_STATE}, reverse=False, state_v_first=False, cu_seqlens=None, **kwargs",
        retention,
    ),
    _row(
        "retention.parallel.parallel_retention",
        "q, k, v, scale=None, output_attentions=False, cu_seqlens=None",
        parallel_retention,
    ),
    _row(
        "lightning_attn.chunk.chunk_lightning_attn",
        f"q, k, v, layer_idx, num_layers, scale=None, {_STATE}, cu_seqlens=None, **kwargs",
        lightning,
    ),
    _row(
        "lightning_attn.fused_recurrent.fused_recurrent_lightning_attn",
        f"q, k, v, layer_idx, num_layers, scale=None, {_STATE}, reverse=False, cu_seqlens=None",
        lightning,
    ),
    _row(
        "gla.chunk.chunk_gla",
        f"q, k, v, g, scale=None, {_STATE}, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None",
        gated,
    ),
    _row(
        "gla.fused_recurrent.fused_recurrent_gla",
        f"q, k, v, gk=None, gv=None, scale=None, {_STATE}, reverse=False, state_v_first=False, "
        "cu_seqlens=None, **kwargs",
        gated,
        _SUMMED,
    ),
    _row(
        "rwkv6.chunk.chunk_rwkv6",
        f"r, k, v, w, u, scale=None, {_STATE}, cu_seqlens=None, cu_seqlens_cpu=None, **kwargs",
        rwkv6,
        {"r": "q"},
    ),
    _row(
        "rwkv6.fused_recurrent.fused_recurrent_rwkv6",
        f"r, k, v, w, u, scale=None, {_STATE}, reverse=False, cu_seqlens=None",
        rwkv6,
        {"r": "q"},
    ),
    _row(
        "delta_rule.chunk.chunk_delta_rule",
        f"q, k, v, beta, scale=None, {_STATE}, use_qk_l2norm_in_kernel=False, cu_seqlens=None, "
        "cu_seqlens_cpu=None, **kwargs",
        delta_rule,
    ),
    _row(
        "delta_rule.fused_recurrent.fused_recurrent_delta_rule",
        f"q, k, v, beta=None, scale=None, {_STATE}, use_qk_l2norm_in_kernel=False, cu_seqlens=None",
        delta_rule,
    ),
    Row(
        "fla.ops.gated_delta_rule.chunk",
        "chunk_gated_delta_rule",
        f"q, k, v, g, beta, scale=None, {_STATE}, use_qk_l2norm_in_kernel=False, "
        "use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, "
        "cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs",
        delta_rule,
        extra={"use_gate_in_kernel": False, "A_log": None, "dt_bias": None},
        free=_FREE,
    ),
    _row(
        "gated_delta_rule.fused_recurrent.fused_recurrent_gated_delta_rule",
        f"q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, {_STATE}, "
        "use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None, dt_bias=None, "
        "use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, "
        "**kwargs",
        delta_rule,
    ),
    Row(
        "fla.ops.kda.chunk",
        "chunk_kda",
        f"q, k, v, g, beta, scale=None, {_STATE}, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, "
        "use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False, lower_bound=None, "
        "disable_recompute=False, return_intermediate_states=False, state_v_first=False, cu_seqlens=None, "
        "cu_seqlens_cpu=None, cp_context=None, use_graph=False, max_num_seqs=None, **kwargs",
        delta_rule,
        extra={"A_log": None, "dt_bias": None},
        free=_FREE | {"safe_gate", "disable_recompute"},
    ),
    _row(
        "kda.fused_recurrent.fused_recurrent_kda",
        f"q, k, v, g, beta, A_log=None, dt_bias=None, scale=None, {_STATE}, use_qk_l2norm_in_kernel=False, "
        "use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, "
        "lower_bound=None, state_v_first=False, cu_seqlens=None, **kwargs",
        delta_rule,
    ),
    _row("hgrn.chunk.chunk_hgrn", f"x, g, {_STATE}", hgrn),
    _row("hgrn.fused_recurrent.fused_recurrent_hgrn", f"x, g, {_STATE}, cu_seqlens=None", hgrn),
    _row(
        "based.parallel.parallel_based",
        "q, k, v, scale=None, use_norm=True",
        based,
        order="bthd",
        wide=True,
    ),
    _row(
        "based.fused_chunk.fused_chunk_based",
        "q, k, v, scale=None, use_norm=True",
        based,
        order="bthd",
        wide=True,
    ),
    _row(
        "rebased.parallel.parallel_rebased",
        "q, k, v, eps=1e-05, use_scale=True, use_normalize=True, return_both=False",
        rebased,
        {"use_normalize": "use_norm"},
        order="bthd",
        wide=True,
    ),
]

# The references say in their own code what they compute in and what they return.
_NAIVE = [
    _row(
        "linear_attn.naive.naive_recurrent_linear_attn",
        f"q, k, v, scale=None, {_STATE}, normalize=False",
        linear,
        states="loop",
        **_FLOAT,
    ),
    _row(
        "linear_attn.naive.naive_chunk_linear_attn",
        "q, k, v, scale=None, normalize=False",
        linear,
        states="alone",
    ),
    _row(
        "simple_gla.naive.naive_chunk_simple_gla",
        f"q, k, v, g, {_STATE}, chunk_size=64, scale=None",
        gated,
        restore=False,
        **_FLOAT,
    ),
    _row(
        "simple_gla.naive.naive_recurrent_simple_gla",
        "q, k, v, g, scale=None, initial_state=None, output_final_state=True",
        gated,
        contiguous=False,
        **_FLOAT,
    ),
    _row(
        "simple_gla.naive.naive_parallel_simple_gla",
        "q, k, v, g, scale=None",
        parallel_loop,
    ),
    _row("retention.naive.naive_retention", "q, k, v", retention, order="bhtd", alone=True, **_FLOAT),
    _row("gla.naive.naive_recurrent_gla", f"q, k, v, gk, {_STATE}", gated, _SUMMED, **_FLOAT),
    _row(
        "rwkv6.recurrent_naive.naive_recurrent_rwkv6",
        f"q, k, v, w, u, scale=None, {_STATE}",
        rwkv6,
        order="bhtd",
        **_FLOAT,
    ),
    _row(
        "rwkv6.chunk_naive.naive_chunk_rwkv6",
        "q, k, v, w, u, chunk_size=32",
        rwkv6,
        order="bhtd",
        scale=1.0,
        alone=True,
        **_FLOAT,
    ),
    _row(
        "delta_rule.naive.delta_rule_recurrence",
        "q, k, v, beta, initial_state=None, output_final_state=True",
        delta_rule,
        order="bhtd",
        **_FLOAT,
    ),
    _row(
        "delta_rule.naive.delta_rule_chunkwise",
        "q, k, v, beta, chunk_size=32",
        delta_rule,
        order="bhtd",
        output_final_state=True,
    ),
    _row(
        "gated_delta_rule.naive.naive_recurrent_gated_delta_rule",
        f"q, k, v, beta, g, scale=None, {_STATE}",
        delta_rule,
        restore="",
        **_FLOAT,
    ),
    _row(
        "gated_delta_rule.naive.naive_chunk_gated_delta_rule",
        f"q, k, v, g, beta, chunk_size=64, scale=None, {_STATE}",
        delta_rule,
        restore="product",
        contiguous=False,
        **_FLOAT,
    ),
    _row(
        "kda.naive.naive_recurrent_kda",
        f"q, k, v, g, beta, scale=None, {_STATE}",
        delta_rule,
        restore="v",
        **_FLOAT,
    ),
    _row(
        "kda.naive.naive_chunk_kda",
        f"q, k, v, g, beta, scale=None, {_STATE}, chunk_size=64",
        delta_rule,
        restore="v",
        **_FLOAT,
    ),
    _row("hgrn.naive.naive_recurrent_hgrn", f"x, g, {_STATE}", hgrn),
    _row("hgrn.naive.naive_chunk_hgrn", f"x, g, {_STATE}, chunk_size=64", hgrn),
    _row("based.naive.naive_parallel_based", "q, k, v, scale=None, use_norm=True", based),
    _row("based.naive.naive_chunk_based", "q, k, v, chunk_size=256", based, wide=True),
    _row("rebased.naive.naive_parallel_rebased", "q, k, v, scale=None, use_norm=True", rebased),
]

_CONVOLUTION = Row(
    "fla.modules.causal_conv1d.ops",
    "causal_conv1d",
    "x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, "
    "activation=None, backend='triton', cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, "
    "cp_context=None, **kwargs",
    fla_convolution,
    free=frozenset({"backend", "cu_seqlens_cpu", "chunk_indices"}),
)

ROWS = [*_KERNELS, *_NAIVE, _CONVOLUTION]
