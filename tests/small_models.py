"""Small models to try: transformers' architectures by the names of their sizes, or a file of builders."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.third_party import load

__all__ = ["VOCAB", "architecture", "architectures", "built", "inputs_of", "of_file"]

VOCAB = 128
LARGEST = 100_000_000  # parameters: what has more was not made small

_SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (VOCAB, ("vocab_size", "vocab_size_per_layer_input")),
    (64, ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim")),
    (
        128,
        ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner"),
    ),
    (128, ("ffn_hidden_size", "intermediate_size_mlp")),
    (2, ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")),
    (2, ("num_decoder_layers", "num_encoder_layers", "num_key_value_heads", "num_experts_per_tok", "moe_k")),
    (2, ("moe_topk", "linear_num_key_heads", "mamba_expand", "num_global_key_value_heads")),
    (4, ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")),
    (4, ("encoder_attention_heads", "linear_num_value_heads")),
    (4, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")),
    (4096, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length")),
    (16, ("head_dim", "global_head_dim", "sliding_window", "attention_chunk_size", "kv_lora_rank")),
    (16, ("qk_nope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "state_size")),
    (16, ("mamba_d_state", "mamba_d_head", "hidden_size_per_layer_input")),
    (8, ("qk_rope_head_dim", "mamba_n_heads", "rotary_dim")),
    (24, ("q_lora_rank",)),
    (32, ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size")),
    (1, ("n_group", "topk_group", "first_k_dense_replace", "num_expert_groups", "bos_token_id")),
    (0, ("pad_token_id",)),
)
_SMALL: dict[str, Any] = {name: size for size, found in _SIZES for name in found} | {
    "eos_token_id": 2,
    "is_decoder": True,
    "use_cache": False,
}

# What the names of sizes do not say: shapes that a configuration checks against each other.
_ALSO: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 500,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64, "cross_attn_k": 2},
        "cross_attn_k": 2,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 64}},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds": False},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
_RANDOM = ("dropout", "pdrop", "layerdrop", "jitter_noise", "drop_path")


def architectures() -> dict[str, str]:
    """Type of model -> its class, of every causal language model."""
    found: dict[str, str] = load("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return dict(found)


def architecture(name: str) -> nn.Module:
    """A small model of an architecture, random, in float64 and train mode, without anything at random.

    Raises:
        Exception: whatever its configuration says of such sizes.
    """
    made = getattr(load("transformers"), architectures()[name])
    config = _shrunk(made.config_class, **_ALSO.get(name, {}))
    torch.manual_seed(0)
    with torch.device("meta"):
        count = sum(p.numel() for p in made(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters, whatever sizes are given")
    model: nn.Module = made(config)
    return model.double().train()


def _shrunk(configuration: Any, **also: Any) -> Any:
    """A configuration with the sizes that it has by name, and its parts' likewise."""
    default = configuration()
    derived = {key for key in _SMALL if isinstance(getattr(configuration, key, None), property)}
    sizes = {key: size for key, size in _SMALL.items() if _has(default, key) and key not in derived}
    if "qk_rope_head_dim" in sizes:
        sizes["head_dim"] = sizes["qk_rope_head_dim"]  # of rotary embeddings, there
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # of latent attention: not grouped
    chances = {
        key: type(x)(0) for key, x in vars(default).items() if x and any(word in key for word in _RANDOM)
    }
    parts = {key: getattr(default, key, None) for key in getattr(configuration, "sub_configs", {})}
    small = {key: _shrunk(type(part), **also.get(key, {})) for key, part in parts.items() if part is not None}
    return configuration(**(sizes | chances | also | small))


def _has(config: Any, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:  # an attribute that differs by layer cannot be read of all of them
        return False


def inputs_of(length: int) -> dict[str, Any]:
    """Tokens and labels."""
    ids = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone(), "use_cache": False}


def of_file(path: Path) -> dict[str, Callable[..., Any]]:
    """The builders of a Python file: functions of ``seq`` in its dicts, that give a model and its inputs."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tables = [x for n, x in vars(module).items() if isinstance(x, dict) and not n.startswith("_")]
    return {name: make for table in tables for name, make in table.items() if callable(make)}


def built(name: str, length: int, builders: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """A model in float64, and its inputs.

    Raises:
        Exception: whatever it says of such sizes, or of a library that is not there.
    """
    if builders is None:
        return architecture(name), inputs_of(length)
    model, inputs = of_file(builders)[name](seq=length)
    return model.double().train(), inputs
