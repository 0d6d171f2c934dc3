"""Perplexity of texts under a frozen model, for `filters.perplexity`.

Invariant: what a text scores depends on that text alone. Matrix kernels add in another order when a batch has another
shape, so each text is a forward pass of its own, in its own length: no neighbour, no padding. On a CPU a row of a few
hundred tokens keeps the cores busy by itself. Bits are those of one kind of machine and number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nexus_ray.config.filters import PerplexityFilter
from nexus_ray.config.tree import ModelConfig
from nexus_ray.errors import ConfigError
from nexus_ray.models.build import build_model, context_length
from nexus_ray.models.fingerprint import model_fingerprint
from nexus_ray.models.score import decode_rows, token_nll
from nexus_ray.models.tokenizer import load_tokenizer
from nexus_ray.synthesis.rows import content_id


class ModelScorer:
    """A `Scorer` around a causal LM and its tokenizer; made by `model_scorer`."""

    def __init__(self, model: Any, tokenizer: Any, *, fingerprint: str, max_tokens: int) -> None:
        self.fingerprint = fingerprint
        self.tokenizer: str = content_id("tokenizer", tokenizer.backend_tokenizer.to_str())
        self._model, self._encode = model.eval(), tokenizer
        self._max_tokens = max_tokens
        self._device = model.get_input_embeddings().weight.device

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """exp of the mean negative log-likelihood of each text's tokens but the first; NaN for less than two."""
        return [self._perplexity(text) for text in texts]

    @torch.inference_mode()
    def _perplexity(self, text: str) -> float:
        ids = self._encode(text, add_special_tokens=False, truncation=False)["input_ids"][: self._max_tokens]
        if len(ids) < 2:
            return math.nan
        row = np.asarray([[~ids[0], *ids[1:]]], np.int32)
        nll = token_nll(self._model, decode_rows(torch.from_numpy(row).to(self._device)), single_segment=True)
        mean = float(nll.double().sum().cpu()) / (len(ids) - 1)
        return math.exp(mean) if mean < 700.0 else math.inf


def model_scorer(config: PerplexityFilter, *, threads: int | None = None, device: str = "cpu") -> ModelScorer:
    """The scorer of a config section, on `threads` threads of this process (they are part of what bits depend on).

    Raises ConfigError if no model is named, it cannot be read, or `max_tokens` exceeds its context.
    """
    if config.model is None:
        raise ConfigError("filters.perplexity.model=null: name the reference model, a folder or a Hugging Face id")
    if threads is not None:
        torch.set_num_threads(threads)
    model_config = ModelConfig(source=config.model, revision=config.revision)
    limit = context_length(model_config)
    if limit is not None and config.max_tokens > limit:
        raise ConfigError(
            f"filters.perplexity.max_tokens={config.max_tokens} exceeds the {limit} tokens that {config.model} is made "
            f"for; lower it"
        )
    tokenizer = load_tokenizer(model_config, field="filters.perplexity.model")
    sizes = {"vocab_size": len(tokenizer), "eos_id": int(tokenizer.eos_token_id or 0), "seed": 0}
    model = build_model(model_config, dtype=getattr(torch, config.dtype), **sizes).to(device)
    fingerprint = content_id("scorer", [model_fingerprint(model_config, **sizes), config.dtype, config.max_tokens])
    return ModelScorer(model, tokenizer, fingerprint=fingerprint, max_tokens=config.max_tokens)
