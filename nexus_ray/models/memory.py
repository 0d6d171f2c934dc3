"""How much memory one training worker needs, estimated from the config before anything is started.

Follows the ZeRO paper (Rajbhandari et al. 2020, table 1): fp32 trains with 4 + 4 + 8 bytes per parameter (weights,
gradients, Adam moments), bf16 with 2 + 2 + 12 (the 12: fp32 master weights and moments); stages 1, 2, 3 share
optimizer state, gradients and weights over the workers. Activations are a rough upper figure.
"""

from __future__ import annotations

from typing import Any

from nexus_ray.config.tree import RunConfig
from nexus_ray.models.build import count_parameters, llama_config, meta_model, model_config
from nexus_ray.models.methods import rehearse, trains_all


def memory_estimate(config: RunConfig, vocab_size: int | None = None) -> dict[str, int]:
    """Bytes per worker: `weights`, `gradients`, `optimizer`, `activations`, `logits`, their `total`, and `host`.

    `vocab_size` is the tokenizer's; default: the configured size of a trained one. `host` is optimizer state kept in
    host memory (`training.offload_optimizer`), not part of the total. `precision: auto` counts as fp32, the larger.
    For a hub model this reads its config.json (`ConfigError` if it cannot).
    """
    training, workers = config.training, config.cluster.num_workers
    vocab = vocab_size or config.model.tokenizer.vocab_size
    half = training.precision == "bf16"
    zero = (1 if half else 0) if training.zero_stage == "auto" else training.zero_stage
    parameters, trainable = _counts(config, vocab)

    def share(size: int, from_stage: int) -> int:
        return -(-size // workers) if zero >= from_stage else size

    weights = share((2 if half else 4) * parameters, 3)
    gradients = share((2 if half else 4) * trainable, 2)
    optimizer = share((12 if half else 8) * trainable, 1)
    activations, logits = _activations(config, vocab, bytes_per_value=2 if half else 4)
    resident = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 0 if training.offload_optimizer else optimizer,
        "activations": activations,
        "logits": logits,
    }
    return {
        **resident,
        "total": sum(resident.values()),
        "host": optimizer if training.offload_optimizer else 0,
    }


def _counts(config: RunConfig, vocab_size: int) -> tuple[int, int]:
    """All and trained parameters."""
    if trains_all(config):
        return (count_parameters(config.model, vocab_size),) * 2
    return rehearse(meta_model(config.model, vocab_size), [config])[0]


def _activations(config: RunConfig, vocab_size: int, bytes_per_value: int) -> tuple[int, int]:
    """Bytes kept for the backward pass of one micro batch: inside the blocks, and around the logits."""
    shape = _shape(config, vocab_size)
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    heads = shape.num_attention_heads
    feed_forward = getattr(shape, "intermediate_size", None) or 4 * hidden
    seq_len = config.training.seq_len
    tokens = config.training.micro_batch_size * seq_len
    # Per token: two norms (input and fp32 copy each), q, k, v, attention output and residuals; gate, up, their product.
    per_token = 12 * hidden + 4 * feed_forward
    if config.model.attention == "eager":
        per_token += 3 * heads * seq_len
    if config.training.activation_checkpointing:
        inside = tokens * (layers * hidden + per_token)
    else:
        inside = tokens * layers * per_token
    copies = 8 if bytes_per_value == 4 else 2 + 4 + 4  # logits, (fp32 copy,) log-softmax
    return inside * bytes_per_value, tokens * shape.vocab_size * copies


def _shape(config: RunConfig, vocab_size: int) -> Any:
    if config.model.source == "scratch":
        return llama_config(config.model.architecture, vocab_size=vocab_size)
    return model_config(config.model).get_text_config()
