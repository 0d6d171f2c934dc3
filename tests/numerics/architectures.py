"""Tiny random models of many architectures, with biases and norm gains that are not the trivial ones."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCAB_SIZE = 64
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8},
    "Olmo2": {},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
"""Name of the `transformers` config class without `Config`, and what it needs beyond the common settings."""


def tiny(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Two blocks of width 32 and half as many key-value heads as heads, in evaluation mode."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": 0,
    }
    config = getattr(transformers, f"{name}Config")(**{**settings, **ARCHITECTURES.get(name, {}), **changes})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tokens(*, rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB_SIZE, (rows, length), generator=generator)


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """What the training loop asks of a model, without a gradient."""
    ids = tokens() if ids is None else ids
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None].expand(len(ids), -1, -1, -1)
    additive = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=additive, position_ids=positions, use_cache=False).logits


def train(model: Any, *, steps: int, learning_rate: float, weight_decay: float = 0.1) -> list[float]:
    """Losses in nats of `steps` AdamW steps on one batch of random tokens."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=weight_decay)
    ids, losses = tokens(rows=8), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def frozen_bytes(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all parameters that are not trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def same_bits(model: Any, kept: dict[str, torch.Tensor]) -> bool:
    """Whether every kept parameter still has the same bits."""
    now = dict(model.named_parameters())
    return all(torch.equal(now[name].view(torch.uint8), value.view(torch.uint8)) for name, value in kept.items())
