"""Tiny random models of every architecture that block expansion accepts; nothing in them is trivially zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from nexus_ray.models.score import Rows, decode_rows

VOCAB = 128
LAYERS = 4
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
_GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
    "layer_types": _SLIDING,
    "attention_bias": True,
}
_MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


def _config(name: str, **own: Any) -> Callable[..., PretrainedConfig]:
    def build(**changes: Any) -> PretrainedConfig:
        shape = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "tie_word_embeddings": False,
        }
        return getattr(transformers, name)(**{**shape, **own, **changes})

    return build


CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": _config("LlamaConfig"),
    "llama-biases": _config("LlamaConfig", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": _config("MistralConfig", sliding_window=6),
    "mixtral": _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _config("Qwen2Config", use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "qwen2-tied": _config("Qwen2Config", tie_word_embeddings=True),
    "qwen3": _config("Qwen3Config", head_dim=8, use_sliding_window=True, sliding_window=6, layer_types=_SLIDING),
    "qwen2_moe": _config(
        "Qwen2MoeConfig", **_MOE, shared_expert_intermediate_size=24, decoder_sparse_step=2, mlp_only_layers=[3]
    ),
    "qwen2_moe-sliding": _config(
        "Qwen2MoeConfig",
        **_MOE,
        shared_expert_intermediate_size=24,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    ),
    "qwen3_moe": _config("Qwen3MoeConfig", **_MOE, head_dim=8, mlp_only_layers=[1], norm_topk_prob=True),
    "olmoe": _config("OlmoeConfig", num_experts=4, num_experts_per_tok=2, clip_qkv=4.0),
    "phi3": _config("Phi3Config", sliding_window=6),
    "smollm3": _config("SmolLM3Config", no_rope_layer_interval=2, attention_bias=True, tie_word_embeddings=True),
    "smollm3-sliding": _config(
        "SmolLM3Config", no_rope_layers=[1, 0, 0, 1], use_sliding_window=True, sliding_window=6, mlp_bias=True
    ),
    "olmo2": _config("Olmo2Config", attention_bias=True),
    "gemma2": _config("Gemma2Config", **_GEMMA, tie_word_embeddings=True),
    "gemma3_text": _config("Gemma3TextConfig", **_GEMMA, tie_word_embeddings=True),
    "gemma3_text-untied": _config("Gemma3TextConfig", **_GEMMA),
}


def expandable(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model of `CONFIGS[name]` whose norms, biases and matrices are all far from their initial values."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](**changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.3))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def random_rows(seed: int = 0, count: int = 3, length: int = 20) -> Rows:
    """Rows of random tokens, longer than the sliding windows above; two documents in each."""
    generator = torch.Generator().manual_seed(seed)
    wire = torch.randint(1, VOCAB, (count, length + 1), generator=generator)
    wire[:, 0] = ~wire[:, 0]
    wire[:, length // 4] = ~wire[:, length // 4]
    return decode_rows(wire)
