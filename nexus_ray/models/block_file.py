"""New blocks alone as one small safetensors file, which knows the weights it belongs to.

Invariant: a file is whole or not there, and its blocks are put into no other base than the one they were trained in:
the file holds the SHA-256 of the base's weights. The hash is over values in float32, so that a bfloat16 base is the
same base when it was loaded as float32. Stacked expansions are files of their own, loaded in the order of training.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from nexus_ray.errors import ConfigError
from nexus_ray.models.blocks import block_prefix, decoder_blocks
from nexus_ray.models.expand import Expansion, check_belongs, expand_blocks, remove_blocks

_FORMAT = "nexus-ray blocks 1"


def base_fingerprint(
    model: PreTrainedModel, expansion: Expansion | None = None, *, state_dict: Mapping[str, torch.Tensor] | None = None
) -> str:
    """SHA-256 (64 hex digits) of the weights' names, shapes and float32 values, tied ones once.

    Of an expanded model it leaves `expansion`'s blocks out and gives the base's own fingerprint. `state_dict` holds the
    weights where the model's own are partitioned.
    """
    names = _base_names(model, expansion)
    weights = dict(model.named_parameters()) if state_dict is None else state_dict
    digest = hashlib.sha256()
    for base_name, name in sorted(names.items()):
        values = weights[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{base_name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()


def save_blocks(
    model: PreTrainedModel,
    expansion: Expansion,
    path: str | Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write `expansion`'s blocks to the safetensors file `path`, replacing it; returns the path.

    `state_dict` holds all weights where the model's own are partitioned or of lower precision.
    """
    check_belongs(model, expansion)
    path = Path(path)
    weights = dict(model.named_parameters()) if state_dict is None else state_dict
    metadata = {
        "format": "pt",
        "nexus_ray": _FORMAT,
        "expansion": json.dumps(expansion.to_dict()),
        "base_sha256": base_fingerprint(model, expansion, state_dict=state_dict),
    }
    beside = path.with_name(f".{path.name}.writing")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: weights[n].detach().to("cpu").contiguous() for n in expansion.parameters}, beside, metadata=metadata)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    return path


def load_blocks(model: PreTrainedModel, path: str | Path) -> Expansion:
    """Insert the blocks of a file that `save_blocks` wrote into their base `model`, in place.

    Raises:
        ConfigError: no such file, another base, or a model of lower precision than the blocks. The model is as before.
    """
    expansion, expected, blocks = _read(Path(path))
    layers = len(decoder_blocks(model))
    if (model.config.model_type, layers) != (expansion.model_type, expansion.layers_before):
        raise ConfigError(
            f"{path} holds blocks for a {expansion.model_type} of {expansion.layers_before} layers, the model is a "
            f"{model.config.model_type} of {layers}; load the base they were trained in, and stacked files in order"
        )
    found = base_fingerprint(model)
    if found != expected:
        raise ConfigError(
            f"{path} belongs to a base with weights sha256 {expected}, this model's are sha256 {found}; load the base "
            f"that the blocks were trained in, and any blocks that were below them, in order"
        )
    for name, tensor in blocks.items():
        if torch.promote_types(tensor.dtype, model.dtype) != model.dtype:
            raise ConfigError(
                f"{path}: {name} is {_plain(tensor.dtype)}, the model {_plain(model.dtype)}, which would round it; "
                f"load the base as {_plain(tensor.dtype)}"
            )
    grown = expand_blocks(model, len(expansion.positions), positions=expansion.positions)
    parameters = dict(model.named_parameters())
    fits = grown == expansion and all(blocks[name].shape == parameters[name].shape for name in grown.parameters)
    if not fits:
        remove_blocks(model, grown)
        raise ConfigError(f"{path} does not fit the model: its blocks have other parameters; write the file again")
    with torch.no_grad():
        for name in grown.parameters:
            parameters[name].copy_(blocks[name])
    return grown


def _read(path: Path) -> tuple[Expansion, str, dict[str, torch.Tensor]]:
    """The file's expansion, its base's hash and its tensors by name."""
    if not path.is_file():
        raise ConfigError(f"{path} is no file; name one that save_blocks wrote")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            blocks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ConfigError(f"{path} is no whole safetensors file ({error}); copy or write it again") from error
    if metadata.get("nexus_ray") != _FORMAT:
        raise ConfigError(
            f"{path} holds no expansion blocks (metadata nexus_ray={metadata.get('nexus_ray')}, expected {_FORMAT}); "
            f"name a file that save_blocks wrote"
        )
    expansion = Expansion.from_dict(json.loads(metadata["expansion"]))
    if set(expansion.parameters) != blocks.keys():
        raise ConfigError(f"{path} lacks blocks of its own expansion; copy or write it again")
    return expansion, metadata["base_sha256"], blocks


def _base_names(model: PreTrainedModel, expansion: Expansion | None) -> dict[str, str]:
    """Name in the base to name in the grown model, for all parameters that are the base's."""
    names = [name for name, _ in model.named_parameters()]
    if expansion is None:
        return {name: name for name in names}
    check_belongs(model, expansion)
    kept = [index for index in range(expansion.layers_after) if index not in expansion.new_blocks]
    prefixes = {block_prefix(model, index): block_prefix(model, number) for number, index in enumerate(kept)}
    new = frozenset(expansion.parameters)
    renamed = {}
    for name in names:
        if name not in new:
            old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            renamed[name if old is None else prefixes[old] + name.removeprefix(old)] = name
    return renamed


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
