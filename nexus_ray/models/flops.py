"""Floating-point operations of training one token, by what is trained: what methods are compared at, and timed against.

Counts multiply-adds of matrices and attention as two operations each (Kaplan et al. 2020, section 2.1): forward once;
backward once more for the gradients of the inputs, wherever something before them is trained; and once more for the
gradients of the weights that are trained. Norms, activations and the optimizer are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nexus_ray.config import RunConfig, stage_config
from nexus_ray.models.targets import block_names


@dataclass(frozen=True)
class Flops:
    """Per token."""

    forward: float
    input_gradients: float
    weight_gradients: float

    @property
    def total(self) -> float:
        return self.forward + self.input_gradients + self.weight_gradients


def training_flops(model: Any, seq_len: int) -> Flops:
    """Of a model whose `requires_grad` says what is trained; works on PyTorch's `meta` device.

    Rows are taken as full, `seq_len` tokens of one segment. Activation checkpointing would add the forward part of the
    blocks once more.
    """
    names = block_names(model, "flops")
    modules = dict(model.named_modules())
    blocks = [modules[name] for name in names]
    head = model.get_output_embeddings()
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    reached = any(p.requires_grad for p in model.parameters() if id(p) not in inside and p is not head.weight) or (
        model.get_input_embeddings().weight.requires_grad
    )
    forward = inputs = weights = 0.0
    for block in blocks:
        reached = reached or any(parameter.requires_grad for parameter in block.parameters())
        matrices = [p for p in block.parameters() if p.ndim >= 2]
        attention = 2.0 * seq_len * _attention_width(model)  # scores and values, half of them masked
        forward += attention + sum(2.0 * p.numel() for p in matrices)
        if reached:
            inputs += 2.0 * attention + sum(2.0 * p.numel() for p in matrices)
        weights += sum(2.0 * p.numel() for p in matrices if p.requires_grad)
    size = 2.0 * head.weight.numel()
    forward += size
    if reached:
        inputs += size
    if head.weight.requires_grad:
        weights += size
    return Flops(forward, inputs, weights)


def run_flops(config: RunConfig, vocab_size: int) -> list[float]:
    """Operations per token of training each stage of a run, from the shapes alone.

    What a schedule opens to training in the middle of a stage (`expansion.unfreeze`) is not counted; of OSFT neither
    is its low-rank core, a few percent.
    """
    from nexus_ray.models.build import meta_model
    from nexus_ray.models.methods import Adapted, begin, end

    adapted, out = Adapted(meta_model(config.model, vocab_size)), []
    for index in range(len(config.stages)):
        own = stage_config(config, index)
        if own.continual.method == "osft":
            for parameter in adapted.model.parameters():
                parameter.requires_grad_(parameter.ndim < 2)
        else:
            adapted = begin(adapted, own, reference="scratch")
        out.append(training_flops(adapted.model, own.training.seq_len).total)
        if own.continual.method == "lora":
            adapted = end(adapted, own)
    return out


def _attention_width(model: Any) -> int:
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size * config.num_attention_heads)
