"""Rows of other libraries: mamba_ssm's kernels, performer_pytorch."""

from __future__ import annotations

from spcompile.library.features import performer, performer_whole
from spcompile.library.mamba import fused_ssd, selective_scan, ssd
from spcompile.library.packed import causal_convolution
from spcompile.library.row import Row

__all__ = ["ROWS"]

ROWS = [
    Row(
        "mamba_ssm.ops.triton.ssd_combined",
        "mamba_chunk_scan_combined",
        "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, "
        "cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, "
        "return_varlen_states=False",
        ssd,
        fixed={"restore": True},
        free=frozenset({"chunk_size"}),
        also=(
            "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, "
            "dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False",
        ),
    ),
    Row(
        "mamba_ssm.ops.triton.ssd_combined",
        "mamba_split_conv1d_scan_combined",
        "zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, seq_idx=None, "
        "dt_limit=(0.0, inf), return_final_states=False, activation='silu', rmsnorm_weight=None, "
        "rmsnorm_eps=1e-6, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, "
        "norm_before_gate=True",
        fused_ssd,
        free=frozenset({"chunk_size"}),
    ),
    Row(
        "mamba_ssm.ops.selective_scan_interface",
        "selective_scan_fn",
        "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False",
        selective_scan,
        fixed={"kernel": True},
        also=(
            "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, "
            "return_last_state=False, cu_seqlens=None",
        ),
    ),
    Row(
        "causal_conv1d.causal_conv1d_interface",
        "causal_conv1d_fn",
        "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
        "final_states_out=None, activation=None",
        causal_convolution,
    ),
    Row(
        "performer_pytorch.performer_pytorch",
        "causal_linear_attention_noncuda",
        "q, k, v, chunk_size=128, eps=1e-6",
        performer,
        free=frozenset({"chunk_size"}),
    ),
    Row(
        "performer_pytorch.performer_pytorch",
        "linear_attention",
        "q, k, v",
        performer_whole,
    ),
]
