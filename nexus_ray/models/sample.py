"""Continuations of a prompt, a pure function of (weights, prompt, seed)."""

from __future__ import annotations

from typing import Any

import torch


def continue_text(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> str:
    """What the model writes after `prompt`, without the prompt; ends early at the end of a document.

    `temperature` 0 always takes the likeliest token. The prompt's start is cut off where prompt and continuation
    would not fit the model's positions. The global random state and the model's mode stay as they were.
    """
    inner = getattr(model, "module", model)
    if max_new_tokens < 1:
        return ""
    device = next(inner.parameters()).device
    ids = tokenizer.encode(prompt, add_special_tokens=False) or [tokenizer.eos_token_id]
    limit = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - 1)
        ids = ids[-(limit - max_new_tokens) :]
    input_ids = torch.tensor([ids], device=device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    was_training = inner.training
    inner.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            output = inner.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
                **(sampling or {"do_sample": False}),
            )
    finally:
        inner.train(was_training)
    return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
