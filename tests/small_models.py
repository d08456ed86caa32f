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

_SIZES: dict[Any, tuple[str, ...]] = {
    VOCAB: ("vocab_size",),
    64: ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"),
    128: (
        *("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner"),
        "ffn_hidden_size",
    ),
    2: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
        *("num_decoder_layers", "num_encoder_layers", "num_key_value_heads", "num_experts_per_tok", "moe_k"),
        *("moe_topk", "linear_num_key_heads", "mamba_expand"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
        *(
            "encoder_attention_heads",
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
        ),
        "linear_num_value_heads",
    ),
    4096: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"),
    16: (
        *(
            "head_dim",
            "sliding_window",
            "attention_chunk_size",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "v_head_dim",
        ),
        *("linear_key_head_dim", "linear_value_head_dim", "state_size", "mamba_d_state", "mamba_d_head"),
    ),
    8: ("qk_rope_head_dim", "mamba_n_heads", "rotary_dim"),
    24: ("q_lora_rank",),
    32: ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"),
    1: ("n_group", "topk_group", "first_k_dense_replace", "num_expert_groups", "bos_token_id"),
    0: ("pad_token_id",),
}
_SMALL = {name: size for size, found in _SIZES.items() for name in found} | {
    "eos_token_id": 2,
    "is_decoder": True,
    "use_cache": False,
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
    configuration = load("transformers.models.auto.configuration_auto").CONFIG_MAPPING[name]
    default = configuration()
    derived = {key for key in _SMALL if isinstance(getattr(configuration, key, None), property)}
    sizes = {key: size for key, size in _SMALL.items() if hasattr(default, key) and key not in derived}
    if "qk_rope_head_dim" in sizes:
        sizes["head_dim"] = sizes["qk_rope_head_dim"]  # of rotary embeddings, there
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # of latent attention: not grouped
    chances = {key: 0.0 for key in vars(default) if any(word in key for word in _RANDOM)}
    torch.manual_seed(0)
    made = getattr(load("transformers"), architectures()[name])
    config = configuration(**sizes, **chances)
    with torch.device("meta"):
        count = sum(p.numel() for p in made(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters, whatever sizes are given")
    model: nn.Module = made(config)
    return model.double().train()


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
