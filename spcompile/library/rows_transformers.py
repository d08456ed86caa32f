"""Rows of transformers: what it computes in plain PyTorch, mostly where it has no library of kernels."""

from __future__ import annotations

import torch

from spcompile.library.delta import delta_rule
from spcompile.library.lightning import minimax
from spcompile.library.mamba import selective_scan, ssd
from spcompile.library.row import Row

__all__ = ["ROWS"]

_QKV = {"query": "q", "key": "k", "value": "v"}
_CHUNK = frozenset({"chunk_size"})
_GATED = {"compute": torch.float32, "root": False}
_KIMI = {"compute": torch.float32, "root": True}

_GATED_SIGNATURE = (
    "query, key, value, g, beta, {}initial_state=None, output_final_state=False, "
    "use_qk_l2norm_in_kernel=False, **kwargs"
)
_KIMI_CHUNK = (
    "query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False, "
    "use_qk_l2norm_in_kernel=False, **kwargs"
)
_KIMI_LOOP = (
    "query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel=False, **kwargs"
)
_SSD = (
    "hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False, "
    "dt_limit=(0.0, inf), return_final_states=False, **kwargs"
)
_SELECTIVE = (
    "hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, "
    "return_last_state=False, use_mambapy=False, use_associative_scan=False, **kwargs"
)


def _module(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}"


def _gated(model: str) -> list[Row]:
    chunk, loop = _GATED_SIGNATURE.format("chunk_size=64, "), _GATED_SIGNATURE.format("")
    return [
        Row(_module(model), "torch_chunk_gated_delta_rule", chunk, delta_rule, _QKV, _GATED, free=_CHUNK),
        Row(_module(model), "torch_recurrent_gated_delta_rule", loop, delta_rule, _QKV, _GATED),
    ]


def _kimi(model: str) -> list[Row]:
    return [
        Row(_module(model), "chunk_kimi_delta_attention", _KIMI_CHUNK, delta_rule, _QKV, _KIMI, free=_CHUNK),
        Row(_module(model), "recurrent_kimi_delta_attention", _KIMI_LOOP, delta_rule, _QKV, _KIMI),
    ]


def _mamba2(model: str) -> Row:
    return Row(_module(model), "mamba2_chunk_scan", _SSD, ssd, {"hidden_states": "x"}, free=_CHUNK)


def _mamba(model: str) -> Row:
    """However it is computed there (a loop, an associative scan, a library), it is the same recurrence."""
    names, free = {"hidden_states": "u", "dt": "delta"}, frozenset({"use_mambapy", "use_associative_scan"})
    return Row(_module(model), "mamba_selective_scan", _SELECTIVE, selective_scan, names, free=free)


_MINIMAX = Row(
    _module("minimax"),
    "MiniMaxLightningAttention.forward",
    "self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs",
    minimax,
    free=frozenset({"position_embeddings", "**kwargs"}),
    sources=("8fdb279575f866ac",),
)

ROWS = [
    *(row for m in ("olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen4_exp") for row in _gated(m)),
    *(row for m in ("bailing_hybrid", "glm5_next", "kimi_linear") for row in _kimi(m)),
    *map(_mamba2, ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2")),
    *map(_mamba, ("falcon_mamba", "jamba", "mamba", "zamba")),
    _MINIMAX,
]
