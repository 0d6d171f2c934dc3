"""Which matrices of a model a method adapts, and what it then trains.

Invariant: a target is a plain `torch.nn.Linear` of floating-point weights inside a decoder block, tied to nothing.
Whatever is not understood is refused with the reason, never skipped in silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from nexus_ray.errors import ConfigError
from nexus_ray.models.fingerprint import ADAPTER_PARAMETER

Targets = list[str] | Literal["all-linear"] | None
"""Names of matrices (`q_proj`, `mlp.up_proj`), every one of a block, or the default (see `find_targets`)."""

_ROUTERS = ("gate", "router", "shared_expert_gate")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = (
    ("norms", r"norm|(^|\.)ln_|layernorm"),
    ("experts", r"(^|\.)experts\."),
    ("routers", rf"(^|\.)({'|'.join(_ROUTERS)})\."),
    ("attention", r"attn|attention"),
    ("feed-forward", r"mlp|feed_forward|ffn|(^|\.)fc\d|shared_expert"),
    ("head", r"(^|\.)(lm_head|embed_out|output)\."),
)


def find_targets(model: nn.Module, targets: Targets, *, field: str) -> dict[str, nn.Linear]:
    """The matrices to adapt by full module name, in model order.

    `None`: every linear layer of attention and feed-forward in all decoder blocks. In a mixture of experts its fused
    experts and its routers stay frozen: the former are no matrices but stacks, and another router sends tokens to
    experts that were not trained on them. `all-linear` is the same where blocks hold nothing else, and an error where
    they do. A list takes the layers whose dotted name ends in one of its entries. Embeddings and head are never
    targets: they may be tied, and adapting one would change the other at the merge.

    Raises:
        ConfigError: naming `field`: a name that matches nothing, or a module that is quantised, shared or unknown.
    """
    _check_plain(model, field)
    blocks = block_names(model, field)
    inside = {
        name: module
        for name, module in model.named_modules()
        if any(name.startswith(f"{block}.") for block in blocks)
        and any(p.ndim >= 2 for p in module.parameters(recurse=False))
    }
    if isinstance(targets, list):
        chosen = _named(model, inside, targets, field)
    else:
        stacks = [name for name, module in inside.items() if not _is_plain(module) and _is_expert(name, module)]
        if targets == "all-linear" and stacks:
            raise ConfigError(
                f"{field}=all-linear: {stacks[0]} ({type(inside[stacks[0]]).__name__}) is a stack of experts, not a "
                f"linear layer, and would stay frozen; leave {field} unset to adapt the linear layers alone"
            )
        chosen = [name for name, module in inside.items() if not _is_router(name) and not _is_expert(name, module)]
    found = {name: _checked(name, inside[name], field) for name in chosen}
    if not found:
        raise ConfigError(f"{field}: {type(model).__name__} has no linear layer in its blocks; use full training")
    _check_unshared(model, found, field)
    return found


def block_names(model: nn.Module, field: str) -> list[str]:
    """Full names of the decoder blocks, in order."""
    config = getattr(model, "config", None)
    count = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise ConfigError(
            f"{field}: {type(model).__name__} has {len(outer)} lists of {count} decoder blocks instead of one, so "
            f"what to adapt is not known; use full training or training.freeze"
        )
    return [f"{outer[0]}.{number}" for number in range(len(model.get_submodule(outer[0])))]  # type: ignore[arg-type]


def _named(model: nn.Module, inside: dict[str, nn.Module], targets: list[str], field: str) -> list[str]:
    chosen = set()
    for target in targets:
        hits = [name for name in inside if _ends_in(name, target)]
        for name in hits:
            if _is_router(name):
                raise ConfigError(f"{field}: {target!r} is the router {name}; routers stay frozen, drop this entry")
        if not hits or any(_is_expert(name, inside[name]) for name in hits):
            raise ConfigError(f"{field}: {target!r} {_why_nothing(model, inside, target)}")
        chosen.update(hits)
    return [name for name in inside if name in chosen]


def _why_nothing(model: nn.Module, inside: dict[str, nn.Module], target: str) -> str:
    known = sorted({name.rpartition(".")[2] for name, module in inside.items() if _is_plain(module)})
    way_out = f"use names such as {', '.join(known)}" if known else "use full training"
    stacks = [name for name, p in model.named_parameters() if p.ndim > 2 and "expert" in name]
    if any(_ends_in(name, target) or _ends_in(name.rpartition(".")[0], target) for name in stacks):
        return f"is a stack of experts, not a linear layer; {way_out}"
    if any(_ends_in(name, target) for name, _ in model.named_modules()):
        return f"is no matrix inside a decoder block (embeddings and head cannot be adapted); {way_out}"
    return f"matches no module of {type(model).__name__}; {way_out}"


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _is_router(name: str) -> bool:
    return name.rpartition(".")[2] in _ROUTERS


def _is_expert(name: str, module: nn.Module) -> bool:
    return "expert" in name and any(p.ndim > 2 for p in module.parameters(recurse=False))


def _checked(name: str, module: nn.Module, field: str) -> nn.Linear:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if not _is_plain(module):
        raise ConfigError(
            f"{field}: {name} is a {kind}, not a torch.nn.Linear, and its layout is not known here; name other "
            f"modules, or use full training"
        )
    assert isinstance(module, nn.Linear)
    if module.weight.dtype not in _FLOATS:
        raise ConfigError(f"{field}: {name} holds {module.weight.dtype} weights; load the model unquantised")
    return module


def _check_plain(model: nn.Module, field: str) -> None:
    adapted = next((name for name, _ in model.named_parameters() if re.search(ADAPTER_PARAMETER, name)), None)
    if adapted is not None:
        raise ConfigError(f"{field}: the model is adapted already ({adapted}); merge it first")
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ConfigError(
            f"{field}: the model is quantised, and an update merged into quantised weights is rounded away; "
            f"set model.source to its unquantised form"
        )


def _check_unshared(model: nn.Module, found: dict[str, nn.Linear], field: str) -> None:
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for name, module in found.items():
        others = [other for other in holders[id(module.weight)] if other != f"{name}.weight"]
        if others:
            raise ConfigError(f"{field}: the weight of {name} is shared with {others[0]}; name other modules")


# --- what is trained -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KindCount:
    """Parameters of one kind of module; those of an adapter count with the module that it adapts."""

    kind: str
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable part of the total, 0 to 1."""
        return self.trainable / self.total if self.total else 0.0


def trainable_report(model: nn.Module) -> list[KindCount]:
    """Trainable and total parameters per kind of module, in model order, and of `all` in the last row.

    Tied parameters count once, with the module that comes first. Parameters that ZeRO-3 has partitioned count in full.
    """
    embeddings = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        for kind in (_kind(name, embeddings), "all"):
            row = counts.setdefault(kind, [0, 0])
            row[0] += size if parameter.requires_grad else 0
            row[1] += size
    rows = [KindCount(kind, *row) for kind, row in counts.items()]
    return [row for row in rows if row.kind != "all"] + [row for row in rows if row.kind == "all"]


def _kind(name: str, embeddings: set[str]) -> str:
    if any(name.startswith(prefix) for prefix in embeddings):
        return "embeddings"
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "other")
