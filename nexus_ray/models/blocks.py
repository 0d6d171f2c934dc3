"""What block expansion has to know of each architecture: where its blocks are, what silences one, which config fields
describe layers one by one.

Invariant: nothing is guessed. A model type, a block or a per-layer config field that is not known here is refused.

"Silenced" means that a block adds exactly zero to the residual stream, while it can still learn from the first step:

- Where a sublayer's output goes straight into the residual sum (pre-norm), its output projections are zeroed, weights
  and biases (LLaMA-Pro, Wu et al. 2024, arXiv 2401.02415).
- Where a norm stands between the sublayer and the sum (post- or sandwich-norm), that norm's gain is zeroed instead. A
  zero *input* to it would give the same function, but a derivative of 1/sqrt(eps) ~ 1000, so that the first optimizer
  step throws the model far off.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from nexus_ray.errors import ConfigError


@dataclass(frozen=True)
class Silence:
    """Which parameters of a block are set to `value`, so that the block adds zero; names are relative to the block."""

    attention: frozenset[str]
    feed_forward: frozenset[str]
    value: float = 0.0

    def parameters(self, block: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that are set, by name; empty if one of the two sublayers has none (an unknown block)."""
        found: dict[str, nn.Parameter] = {}
        for owners in (self.attention, self.feed_forward):
            part = {
                n: p for n, p in block.named_parameters() if n.removesuffix(".weight").removesuffix(".bias") in owners
            }
            if not part:
                return {}
            found |= part
        return found


def _owner(parameter_name: str) -> str:
    return parameter_name.removesuffix(".weight").removesuffix(".bias")


_PRE_NORM = Silence(
    frozenset({"self_attn.o_proj"}),
    # dense; all experts in one tensor; Qwen2-MoE's expert for every token
    frozenset({"mlp.down_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj"}),
)
_POST_NORM = Silence(frozenset({"post_attention_layernorm"}), frozenset({"post_feedforward_layernorm"}))
_GEMMA_NORM = Silence(_POST_NORM.attention, _POST_NORM.feed_forward, value=-1.0)  # its gain is 1 + weight

SILENCE = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "mixtral": _PRE_NORM,
    "olmoe": _PRE_NORM,
    "phi3": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen2_moe": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "qwen3_moe": _PRE_NORM,
    "smollm3": _PRE_NORM,
    "olmo2": _POST_NORM,
    "gemma2": _GEMMA_NORM,
    "gemma3_text": _GEMMA_NORM,
}
"""The accepted architectures: `model_type` of the `transformers` config to how a block is silenced."""

_PER_LAYER = ("layer_types", "no_rope_layers")
_NOT_PER_LAYER = frozenset({"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "mlp_only_layers"})
_DTYPES = (torch.float32, torch.bfloat16)


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a causal language model, in order.

    Raises:
        ConfigError: the model cannot be expanded: unknown architecture, an adapter inside, another precision.
    """
    _check_known(model)
    blocks = model.get_decoder().layers
    if len(blocks) != model.config.num_hidden_layers:
        raise ConfigError(
            f"the model has {len(blocks)} blocks, its config says num_hidden_layers="
            f"{model.config.num_hidden_layers}; load it anew"
        )
    if any(name.endswith("base_layer") for name, _ in blocks.named_modules()):
        raise ConfigError(
            "the model holds adapters (LoRA), and a copied block would share their names; merge them first"
        )
    for name, parameter in blocks.named_parameters():
        if parameter.dtype not in _DTYPES:
            raise ConfigError(
                f"block parameter {name} has dtype {str(parameter.dtype).removeprefix('torch.')}; expansion copies "
                f"float32 and bfloat16 blocks: load the model in one of these"
            )
    return blocks


def block_prefix(model: PreTrainedModel, index: int) -> str:
    """What the names of the parameters of block `index` start with, such as `model.layers.3.`"""
    blocks = model.get_decoder().layers
    name = next(name for name, module in model.named_modules() if module is blocks)
    return f"{name}.{index}."


def number_blocks(blocks: nn.ModuleList) -> None:
    """Give every module inside a block the block's index: it names the block's slot in the key-value cache."""
    for index, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 (a plain number, no tensor, as the stubs have it)


def silent_copy(block: nn.Module, config: PretrainedConfig) -> nn.Module:
    """A trainable copy of `block` that adds zero to the residual stream; it shares the model's `config` object.

    Raises:
        ConfigError: the block is not built as its architecture's blocks usually are.
    """
    twin = copy.deepcopy(block, {id(config): config})  # a config of its own would miss later changes of the attention
    silenced = SILENCE[config.model_type].parameters(twin)
    if not silenced:
        raise ConfigError(
            f"a block of this {config.model_type} model lacks the output parameters that expansion sets (it has "
            f"{', '.join(name for name, _ in block.named_parameters())}); use the model class of transformers itself"
        )
    with torch.no_grad():
        for parameter in silenced.values():
            parameter.fill_(SILENCE[config.model_type].value)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    return twin


def grown_config(config: PretrainedConfig, positions: Sequence[int]) -> dict[str, Any]:
    """The config fields that change, with their new values, if a copy follows each layer in `positions`. Pure.

    Raises:
        ConfigError: a field seems to describe layers one by one, and is not known here.
    """
    layers = config.num_hidden_layers
    _check_fields(config, layers)
    origins = [layer for layer in range(layers) for _ in range(1 + (layer in positions))]
    changes: dict[str, Any] = {"num_hidden_layers": len(origins)}
    for name in _PER_LAYER:
        values = getattr(config, name, None)
        if values is not None:
            changes[name] = [values[layer] for layer in origins] + list(values[layers:])
    first_windowed = getattr(config, "max_window_layers", None)
    if first_windowed is not None:
        changes["max_window_layers"] = first_windowed + sum(position < first_windowed for position in positions)
    return changes | _grown_sparsity(config, origins)


def _grown_sparsity(config: PretrainedConfig, origins: Sequence[int]) -> dict[str, Any]:
    """Which layers of a Qwen MoE are dense; `every n-th layer` cannot be said of the grown model, so all are listed."""
    step = getattr(config, "decoder_sparse_step", None)
    if step is None or config.num_experts == 0:
        return {}
    dense = [i for i, layer in enumerate(origins) if layer in config.mlp_only_layers or (layer + 1) % step]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def _check_known(model: Any) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in SILENCE:
        hint = ", and for Gemma 3 load the text model (Gemma3ForCausalLM)" if kind == "gemma3" else ""
        raise ConfigError(
            f"continual.expand_blocks: model type {kind} is not known here. Where a model's norms stand and which "
            f"parameters write to its residual stream decides what makes a block the identity, which is not guessed; "
            f"use one of {', '.join(sorted(SILENCE))}{hint}, or another method (continual.use_lora, full training)"
        )
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ConfigError(
            f"continual.expand_blocks: {type(model).__name__} is no causal language model of transformers; expand the "
            f"plain model before it is wrapped (by peft, DeepSpeed or torch.compile)"
        )


def _check_fields(config: PretrainedConfig, layers: int) -> None:
    if getattr(config, "is_heterogeneous", False):
        raise ConfigError("the config's per_layer_config makes layers differ in shape; such models cannot be expanded")
    for name, value in config.to_dict().items():
        if not isinstance(value, list | tuple) or name in _NOT_PER_LAYER:
            continue
        if name in _PER_LAYER and len(value) < layers:
            raise ConfigError(f"the config's {name} has {len(value)} entries for {layers} layers; correct config.json")
        if name not in _PER_LAYER and len(value) == layers:
            raise ConfigError(
                f"the config's {name}={list(value)} has one entry per layer ({layers}), and what it means is not known "
                f"here, so it cannot be extended; remove it from config.json if the model does not need it"
            )
