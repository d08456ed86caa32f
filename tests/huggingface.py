"""Small random-init models of transformers, as a user would build them: nothing of them is changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

VOCAB, HIDDEN = 128, 64
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE: dict[str, Any] = _SPECIAL | {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def llama(attention: str = "sdpa") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_LLAMA_LIKE, attn_implementation=attention))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_LLAMA_LIKE, head_dim=16))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "ffn_dim": 128, "word_embed_proj_dim": HIDDEN}
    size = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**shape, **size, **_SPECIAL))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": VOCAB, "n_positions": 256, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**shape, **_SPECIAL, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    shape = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"intermediate_size": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**shape, **rest, pad_token_id=0, max_position_embeddings=256))


_WINDOW: dict[str, Any] = _LLAMA_LIKE | {"head_dim": 16, "sliding_window": 7}
_MIXED: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
_EAGER: dict[str, Any] = {"attn_implementation": "eager"}


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_WINDOW))


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**_WINDOW, query_pre_attn_scalar=16, **_EAGER))


def gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**_WINDOW, query_pre_attn_scalar=16, **_MIXED))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "batched_mm"}
    return GptOssForCausalLM(GptOssConfig(**_WINDOW, **_MIXED, **experts, **_EAGER))


# Windows, soft caps, sinks.
BANDED: dict[str, Callable[[], nn.Module]] = {
    "mistral": mistral,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt_oss": gpt_oss,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-eager": lambda: llama("eager"),
    "qwen3": qwen3,
    "opt": opt,
    "gpt2": gpt2,
    "bert": bert,
}


def build(name: str, length: int, **inputs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A float64 model in train mode and its keyword arguments, labels included."""
    torch.manual_seed(0)
    ids: Tensor = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))
    return (MODELS | BANDED)[name]().double().train(), {"input_ids": ids, "labels": ids.clone()} | inputs
