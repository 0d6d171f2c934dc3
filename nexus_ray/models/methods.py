"""What a stage trains: everything, parts, low-rank adapters, new blocks, or an orthogonal subspace.

A method changes a model at the beginning of a stage (`begin`) and may change it back at its end (`end`). Both are pure
functions of the model and the config, so that the model of any stage is rebuilt by going through the stages before
it, each with the weights that it trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nexus_ray.config.tree import RunConfig, exact_fraction
from nexus_ray.models.build import apply_freeze

if TYPE_CHECKING:
    from nexus_ray.models.expand import Expansion
    from nexus_ray.models.lora import Parts

# The methods' own modules are imported where they are used: `peft` alone takes longer than a small stage's start.


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to."""

    reference: str
    """Folder or hub id."""
    sha256: str


@dataclass(frozen=True)
class Adapted:
    """A model in the shape that the stages so far gave it."""

    model: Any
    """A `transformers` causal LM; with an adapter, `peft`'s layers are inside it."""
    expansions: tuple[Expansion, ...] = ()
    """Blocks that were inserted, first to last."""
    adapter: bool = False
    """Whether it carries an adapter that is not merged."""
    base: Base | None = None
    """What adapters are exported for: the model before the first of them that later stages build on."""
    earlier: tuple[Parts, ...] = ()
    """Adapters of the stages before, merged into `model`, where every stage has its own."""


def begin(adapted: Adapted, config: RunConfig, *, reference: str = "") -> Adapted:
    """The model as a stage of this config trains it: `requires_grad` says what. `reference` is where others find the
    model as it is now.

    Raises:
        ConfigError: the method does not fit the model.
    """
    continual = config.continual
    if continual.method != "lora":
        adapted = replace(_merged(adapted) if adapted.adapter else adapted, base=None, earlier=())
    model = adapted.model
    if continual.method == "lora":
        return adapted if adapted.adapter else _with_adapter(adapted, config, reference)
    if continual.method == "expand":
        from nexus_ray.models.expand import expand_blocks, only_new_blocks

        if not adapted.expansions or continual.expansion.across_stages == "stack":
            expansion = expand_blocks(model, continual.expand_blocks, positions=continual.expansion.positions)
            adapted = replace(adapted, expansions=(*adapted.expansions, expansion))
        only_new_blocks(model, adapted.expansions[-1])
        return adapted
    if continual.method == "osft":
        from nexus_ray.models.osft import add_osft

        add_osft(model, unfreeze_rank_ratio=continual.osft.unfreeze_rank_ratio, targets=continual.osft.targets)
        return adapted
    model.requires_grad_(True)
    apply_freeze(model, config.training.freeze)
    return adapted


def end(adapted: Adapted, config: RunConfig) -> Adapted:
    """The model as the next stage finds it."""
    continual = config.continual
    if continual.method == "lora" and continual.lora.across_stages == "merge":
        return replace(_merged(adapted), base=None, earlier=())
    if continual.method == "lora" and continual.lora.across_stages == "new":
        from nexus_ray.models.lora import adapter_parts

        earlier = (*adapted.earlier, adapter_parts(adapted.model)) if adapted.base else ()
        return replace(_merged(adapted), earlier=earlier)
    if continual.method == "osft":
        from nexus_ray.models.osft import merge_osft

        merge_osft(adapted.model)
    return adapted


def rehearse(model: Any, configs: Sequence[RunConfig]) -> list[tuple[int, int]]:
    """(All, trained) parameters of every stage, from a model without storage (`meta_model`), which is used up.

    Raises:
        ConfigError: the method of a stage does not fit the model as the stages before leave it.
    """
    adapted, counts = Adapted(model), []
    for config in configs:
        continual = config.continual
        extra = 0
        if continual.method == "lora":
            from nexus_ray.models.lora import adapter_size

            trained = extra = adapter_size(model, dora=continual.lora.dora, **_lora_numbers(config))
        elif continual.method == "osft":
            from nexus_ray.models.osft import core_size

            osft = continual.osft
            trained = extra = core_size(model, unfreeze_rank_ratio=osft.unfreeze_rank_ratio, targets=osft.targets)
        else:
            adapted = begin(adapted, config)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        counts.append((extra + sum(p.numel() for p in model.parameters()), trained))
    return counts


def trains_all(config: RunConfig) -> bool:
    """Whether a stage of this config trains every weight of its model."""
    return config.continual.method == "full" and not config.training.freeze


def restructures(config: RunConfig) -> bool:
    """Whether a stage of this config leaves a model with other parameters than it found."""
    return config.continual.method == "expand"


def inserts_blocks(config: RunConfig, before: Sequence[RunConfig]) -> bool:
    """Whether a stage of this config inserts new blocks, `before` being the configs of the stages before it."""
    if config.continual.method != "expand":
        return False
    return config.continual.expansion.across_stages == "stack" or not any(restructures(each) for each in before)


def continues(before: RunConfig, config: RunConfig) -> bool:
    """Whether a stage trains exactly the parameters of the stage before it, as that one left them."""
    one, other = before.continual, config.continual
    if one.method != other.method:
        return False
    if one.method == "full":
        return before.training.freeze == config.training.freeze
    if one.method == "lora":
        return one.lora.across_stages == "carry" and _lora_settings(before) == _lora_settings(config)
    return one.method == "expand" and other.expansion.across_stages == "carry"


def openings(config: RunConfig, steps: int) -> frozenset[int]:
    """Numbers of steps of a stage after which the unfreezing schedule opens more of the model."""
    if config.continual.method != "expand":
        return frozenset()
    return frozenset(_opening(step.at, steps) for step in config.continual.expansion.unfreeze) - {0, steps}


def _opening(at: float, steps: int) -> int:
    return math.ceil(exact_fraction(at) * steps)


def opened(adapted: Adapted, config: RunConfig, done: int, steps: int) -> Mapping[str, float]:
    """Parameters that the unfreezing schedule trains beside the new blocks once `done` of `steps` steps are done, with
    their learning rate as a share of the new blocks'. Sets `requires_grad`."""
    factors: dict[str, float] = {}
    if config.continual.method == "expand":
        from nexus_ray.models.expand import unfreeze_names

        for each in config.continual.expansion.unfreeze:
            if done >= _opening(each.at, steps):
                for name in unfreeze_names(adapted.model, adapted.expansions[-1], each.open):
                    factors.setdefault(name, each.lr_factor)
        for name, parameter in adapted.model.named_parameters():
            if name in factors:
                parameter.requires_grad_(True)
    return factors


def _lora_settings(config: RunConfig) -> tuple[Any, ...]:
    continual = config.continual
    return continual.lora_rank, continual.lora_alpha, continual.lora.model_copy(update={"across_stages": "carry"})


def _lora_numbers(config: RunConfig) -> dict[str, Any]:
    continual, lora = config.continual, config.continual.lora
    return {
        "rank": continual.lora_rank,
        "alpha": continual.lora_alpha or 2.0 * continual.lora_rank,
        "dropout": lora.dropout,
        "targets": lora.targets,
    }


def _with_adapter(adapted: Adapted, config: RunConfig, reference: str) -> Adapted:
    from nexus_ray.models.fingerprint import base_sha256
    from nexus_ray.models.lora import add_lora

    lora = config.continual.lora
    base = adapted.base
    if base is None and lora.across_stages != "merge" and reference != "scratch":
        base = Base(reference, base_sha256(adapted.model))
    numbers = _lora_numbers(config)
    model = add_lora(adapted.model, rslora=lora.rslora, dora=lora.dora, seed=config.seed, **numbers)
    return replace(adapted, model=model, adapter=True, base=base)


def _merged(adapted: Adapted) -> Adapted:
    from nexus_ray.models.lora import merge_lora

    return replace(adapted, model=merge_lora(adapted.model, keep_base=False), adapter=False)
