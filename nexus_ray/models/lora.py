"""Low-rank adapters (LoRA, Hu et al. 2021; rsLoRA 2312.03732; DoRA 2402.09353) on `peft`.

Invariants: an adapted model starts as exactly its base, a merged one holds `W + scale B A` computed in float32, and
undoing the merge gives back the base bit for bit (the weights are kept, not recomputed by subtraction). `scale` is
alpha / rank, or alpha / sqrt(rank) with rsLoRA.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from nexus_ray.errors import ConfigError
from nexus_ray.models.export import NOT_TOKENIZER
from nexus_ray.models.fingerprint import base_sha256 as sha256_of
from nexus_ray.models.fingerprint import plain_name
from nexus_ray.models.targets import Targets, find_targets

_NAME = "default"
_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_BASE = "base.json"


@dataclass
class _Undo:
    """What undoes a merge; held by the base model as `_nexus_merged`."""

    peft_model: PeftModel
    layers: dict[str, LoraLinear]
    weights: dict[str, Tensor]
    """Base weights on the CPU."""


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    rslora: bool = False,
    dora: bool = False,
    dropout: float = 0.0,
    targets: Targets = None,
    seed: int,
) -> PeftModel:
    """Freeze `model` and put trainable adapters on it, in place; the result computes the same function.

    `rank` and `alpha` are those of LoRA, `dropout` a probability; `targets` as in `find_targets`. The adapters are
    float32 whatever the model is, and a function of `seed`; the global random state stays as it was. The returned
    wrapper trains, generates and answers `config` and `dtype` as the model does. Enable activation checkpointing
    afterwards: `peft` makes the embeddings' output require a gradient where it is already on.

    Raises:
        ConfigError: naming `continual.lora_rank` or `continual.lora.*`.
    """
    found = find_targets(model, targets, field="continual.lora.targets")
    _check(found, rank=rank, alpha=alpha, dropout=dropout)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        target_modules=_shortest(model, list(found)),
        task_type=TaskType.CAUSAL_LM,
    )
    training = model.training
    with _seeded(seed):
        adapted = get_peft_model(model, config).train(training)
    for _, layer in _layers(adapted):
        if dora:
            _exact_magnitude(layer)
    return adapted


def adapter_size(model: nn.Module, *, rank: int, alpha: float, dora: bool, dropout: float, targets: Targets) -> int:
    """Parameters that `add_lora` would train, and its refusals; nothing is changed or allocated.

    Raises:
        ConfigError: as `add_lora`.
    """
    found = find_targets(model, targets, field="continual.lora.targets")
    _check(found, rank=rank, alpha=alpha, dropout=dropout)
    shapes = [linear.weight.shape for linear in found.values()]
    return sum(rank * (rows + columns) + (rows if dora else 0) for rows, columns in shapes)


def merge_lora(model: nn.Module, *, keep_base: bool = True) -> nn.Module:
    """The base model with its adapters merged into its weights, in place; without any, the model as it is.

    The result is a plain `transformers` model, all of it trainable, as if it had just been loaded. `keep_base` holds a
    copy of the adapted weights in host memory for `unmerge_lora`. Under ZeRO-3 use `merged_state` instead.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = dict(_layers(base))
    if not layers:
        return base
    assert isinstance(model, PeftModel)  # the wrapper that `add_lora` returned, not the model inside it
    weights = {}
    for name, layer in layers.items():
        plain = layer.get_base_layer()
        if keep_base:
            weights[name] = plain.get_parameter("weight").detach().to("cpu", copy=True)
        weight = plain.get_parameter("weight")
        weight.data.copy_(_merged(weight, _parts(layer), layer.scaling[_NAME]))
        _replace(base, name, plain)
    if keep_base:
        base._nexus_merged = _Undo(model, layers, weights)  # type: ignore[assignment]
    del base.peft_config  # else `transformers` and `peft` take it for an adapted model
    return base.requires_grad_(True)


def unmerge_lora(model: nn.Module) -> PeftModel:
    """The adapted model that `merge_lora` made `model` from, in place: base weights bit for bit, adapters as they were.

    Only what the merge touched is put back: what was trained since in other places stays.

    Raises:
        ConfigError: the model was not merged, or merged without `keep_base`.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    merged = getattr(base, "_nexus_merged", None)
    if merged is None:
        raise ConfigError("unmerge: this model holds no kept base weights; merge it with keep_base=True")
    base.requires_grad_(False)
    for name, layer in merged.layers.items():
        layer.get_base_layer().get_parameter("weight").data.copy_(merged.weights[name])
        _replace(base, name, layer)
        for part in _parts(layer).values():
            part.requires_grad_(True)
    del base._nexus_merged
    base.peft_config = merged.peft_model.base_model.peft_config
    return merged.peft_model


def merged_state(model: PeftModel, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Names and weights of the merged base model; `model` stays as it is.

    `state_dict` holds the weights by `model`'s names where its own are partitioned or of lower precision. Untouched
    weights are the given tensors themselves, so that tied ones still share memory.
    """
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for name, layer in _layers(model):
        parts = {part: state.pop(key) for part, key in _part_keys(name, layer).items()}
        weight = state[f"{name}.base_layer.weight"]
        state[f"{name}.base_layer.weight"] = _merged(weight, parts, layer.scaling[_NAME]).to(weight.dtype)
    return {plain_name(name): tensor for name, tensor in state.items()}


# --- files ---------------------------------------------------------------------------------------------------------


def export_adapter(
    model: PeftModel,
    folder: str | Path,
    *,
    base_reference: str,
    base_sha256: str,
    tokenizer_dir: str | Path,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write what plain `peft` loads (`PeftModel.from_pretrained(base, folder)`) to `folder`, replacing it.

    `base_reference` is the hub id or folder that `AutoPeftModelForCausalLM` finds the base at; `base_sha256` that of
    its weights, kept beside them in `base.json`. `state_dict` as in `merged_state`. Returns `folder`.
    """
    # Without save_embedding_layers=False, peft asks the hub for the base's config.
    weights = get_peft_model_state_dict(
        model, state_dict=None if state_dict is None else dict(state_dict), save_embedding_layers=False
    )
    config = copy.copy(model.peft_config[_NAME])
    return _write_adapter(
        config, weights, Path(folder), reference=base_reference, sha256=base_sha256, tokenizer_dir=tokenizer_dir
    )


def _write_adapter(
    config: LoraConfig,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    reference: str,
    sha256: str,
    tokenizer_dir: str | Path,
) -> Path:
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(tokenizer_dir, beside, ignore=shutil.ignore_patterns(*NOT_TOKENIZER))
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in weights.items()}
    save_file(plain, beside / _WEIGHTS, metadata={"format": "pt"})
    # Not in the metadata: safetensors writes more than one entry in random order, so equal adapters would differ.
    (beside / _BASE).write_text(json.dumps({"reference": reference, "sha256": sha256}, indent=2) + "\n")
    config.base_model_name_or_path = reference
    config.inference_mode = True
    assert config.target_modules is not None
    # As a set, it would have another order in every process.
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(beside))
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return folder


Parts = dict[str, tuple[Tensor, Tensor]]
"""Of one adapter, by the names of its modules in the base: A [rank, I] and B [O, rank], whose product is the update."""


def adapter_parts(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> Parts:
    """The adapter on `model` as matrices whose product is its update, float32 copies on the CPU; DoRA has none.

    `state_dict` as in `merged_state`.
    """
    state = model.state_dict() if state_dict is None else state_dict
    parts: Parts = {}
    for name, layer in _layers(model):
        down, up = (state[_part_keys(name, layer)[part]].detach().to("cpu", torch.float32) for part in "AB")
        parts[name.removeprefix(_PREFIX)] = down.clone(), up * layer.scaling[_NAME]
    return parts


def export_stacked(
    adapters: Sequence[Parts], folder: str | Path, *, base_reference: str, base_sha256: str, tokenizer_dir: str | Path
) -> Path:
    """Several adapters of one base as the one whose update is the sum of theirs; otherwise as `export_adapter`."""
    names = sorted({name for parts in adapters for name in parts})
    weights, ranks = {}, {}
    for name in names:
        found = [parts[name] for parts in adapters if name in parts]
        weights[f"{_PREFIX}{name}.lora_A.weight"] = torch.cat([down for down, _ in found]).contiguous()
        weights[f"{_PREFIX}{name}.lora_B.weight"] = torch.cat([up for _, up in found], dim=1).contiguous()
        ranks[name] = sum(len(down) for down, _ in found)
    most = max(ranks.values())
    config = LoraConfig(
        r=most,
        lora_alpha=most,  # the scale is 1: it is part of B
        target_modules=names,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != most},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != most},
        task_type=TaskType.CAUSAL_LM,
    )
    return _write_adapter(
        config, weights, Path(folder), reference=base_reference, sha256=base_sha256, tokenizer_dir=tokenizer_dir
    )


def load_adapter(model: nn.Module, folder: str | Path) -> PeftModel:
    """The adapter in `folder`, trainable, on its base `model`, in place.

    Raises:
        ConfigError: no adapter of ours is there, or it was trained on other weights; both hashes are named.
    """
    for name in (_WEIGHTS, _BASE):
        if not (Path(folder) / name).is_file():
            raise ConfigError(f"adapter {folder} has no {name}; name a folder that export_adapter wrote")
    base = json.loads((Path(folder) / _BASE).read_text())
    actual = sha256_of(model)
    if actual != base["sha256"]:
        raise ConfigError(
            f"adapter {folder} was trained on {base['reference']} with sha256 {base['sha256']}, but this model's "
            f"weights have sha256 {actual}; set model.source to the base that the adapter belongs to, in the "
            f"precision it had"
        )
    with _seeded(0):
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


# --- inside --------------------------------------------------------------------------------------------------------


def _check(found: dict[str, nn.Linear], *, rank: int, alpha: float, dropout: float) -> None:
    if rank < 1:
        raise ConfigError(f"continual.lora_rank={rank} is not positive; use at least 1")
    name, limit = min(((name, min(m.weight.shape)) for name, m in found.items()), key=lambda pair: pair[1])
    if rank > limit:
        raise ConfigError(
            f"continual.lora_rank={rank} exceeds the smallest dimension of {name} ({limit}); use at most {limit}, or "
            f"leave that module out of continual.lora.targets"
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"continual.lora_alpha={alpha} is not positive; use the rank, or twice the rank")
    if not 0 <= dropout < 1:
        raise ConfigError(f"continual.lora.dropout={dropout} is no probability below 1; use 0 to 0.1")


def _shortest(model: nn.Module, names: list[str]) -> list[str]:
    """Last components of the names where these pick the same modules (what other tools expect), else full names."""
    last = sorted({name.rpartition(".")[2] for name in names})
    picked = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in last]
    return last if sorted(picked) == sorted(names) else names


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Adapters are drawn on the CPU; only its generator is set, and put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    yield from [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]


def _part_keys(name: str, layer: LoraLinear) -> dict[str, str]:
    keys = {"A": f"{name}.lora_A.{_NAME}.weight", "B": f"{name}.lora_B.{_NAME}.weight"}
    if _NAME in layer.lora_magnitude_vector:
        keys["magnitude"] = f"{name}.lora_magnitude_vector.{_NAME}.weight"
    return keys


def _parts(layer: LoraLinear) -> dict[str, Tensor]:
    return {part: layer.get_parameter(key.removeprefix("x.")) for part, key in _part_keys("x", layer).items()}


@torch.no_grad()
def _merged(weight: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """`W + scale B A` in float32; with DoRA each row of it scaled to its magnitude."""
    direction = weight.float() + scale * (parts["B"].float() @ parts["A"].float())
    if "magnitude" not in parts:
        return direction
    return direction * (parts["magnitude"].float() / torch.linalg.norm(direction, dim=1))[:, None]


@torch.no_grad()
def _exact_magnitude(layer: LoraLinear) -> None:
    """peft 0.21.2 takes the row norms in the base's precision and compares them with float32 ones: no identity."""
    magnitude = layer.lora_magnitude_vector[_NAME]
    magnitude.weight.data = torch.linalg.norm(layer.get_base_layer().get_parameter("weight").float(), dim=1)


def _replace(model: nn.Module, name: str, module: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
