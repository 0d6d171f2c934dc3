"""What a stage leaves for others: a plain model, or an adapter with the base it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nexus_ray.models.export import export_model
from nexus_ray.models.methods import Adapted

MODEL = "model"
BLOCKS = "blocks.safetensors"


def export_stage(adapted: Adapted, tokenizer_dir: Path, folder: Path, *, state_dict: dict[str, Tensor]) -> list[Path]:
    """Write `model/` into a stage's local folder, and what the stage added alone beside it; returns what was written.

    `state_dict` holds the weights of `adapted.model` by its names, in full shape. Where adapters are not merged,
    `model/` is what `peft` loads on their base (`transformers` finds both by itself). Where a stage trained new blocks
    and nothing else, `blocks.safetensors` holds these alone, for `nexus_ray.models.block_file.load_blocks`.
    """
    if adapted.base is not None:
        from nexus_ray.models import lora

        base = {"base_reference": adapted.base.reference, "base_sha256": adapted.base.sha256}
        if adapted.earlier:
            parts = [*adapted.earlier, lora.adapter_parts(adapted.model, state_dict)]
            lora.export_stacked(parts, folder / MODEL, tokenizer_dir=tokenizer_dir, **base)
        else:
            lora.export_adapter(
                adapted.model, folder / MODEL, tokenizer_dir=tokenizer_dir, state_dict=state_dict, **base
            )
        return [folder / MODEL]
    export_model(_skeleton(adapted.model), tokenizer_dir, folder / MODEL, state_dict=plain_state(adapted, state_dict))
    if not _trains_blocks_alone(adapted):
        return [folder / MODEL]
    from nexus_ray.models.block_file import save_blocks

    blocks = save_blocks(adapted.model, adapted.expansions[-1], folder / BLOCKS, state_dict=state_dict)
    return [folder / MODEL, blocks]


def _trains_blocks_alone(adapted: Adapted) -> bool:
    trained = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    return bool(adapted.expansions) and trained == set(adapted.expansions[-1].parameters)


def _skeleton(model: Any) -> Any:
    """The plain model's modules without storage, to name and arrange what is saved."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    empty.tie_weights()
    empty.generation_config = model.generation_config
    return empty


def plain_state(adapted: Adapted, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and weights of a model without adapters."""
    if adapted.adapter:
        from nexus_ray.models import lora

        return lora.merged_state(adapted.model, state_dict)
    from nexus_ray.models import osft

    return osft.merged_state(adapted.model, state_dict)
