"""Block expansion: copies of transformer blocks that start as the identity, so that new text has room of its own.

After LLaMA-Pro (Wu et al. 2024, arXiv 2401.02415), for any number of blocks, at any positions, and for architectures
with other norm placements (`nexus_ray.models.blocks`).

Invariants: an expanded model computes the same logits as its base, bit for bit, as `expand_blocks` checks before it
returns; a function that raises leaves the model as it was; `remove_blocks` gives the base back bit for bit. Expansions
stack, and are removed last first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from transformers import PreTrainedModel

from nexus_ray.errors import ConfigError
from nexus_ray.models.blocks import block_prefix, decoder_blocks, grown_config, number_blocks, silent_copy
from nexus_ray.models.identity import check_identity, probe_rows, still_logits


@dataclass(frozen=True)
class Expansion:
    """What was inserted into a model, and what it takes to find it again and to undo it. Survives JSON."""

    model_type: str
    """The config's `model_type`."""
    layers_before: int
    """Number of layers of the model that was expanded."""
    positions: tuple[int, ...]
    """Layers of that model (from 0, ascending) which a copy follows."""
    new_blocks: tuple[int, ...]
    """Indices of the copies in the grown model, ascending."""
    parameters: tuple[str, ...]
    """Names of the copies' parameters in the grown model, in model order."""
    config_before: dict[str, Any]
    """The config fields that were changed, with their values before."""

    @property
    def layers_after(self) -> int:
        """Number of layers of the grown model."""
        return self.layers_before + len(self.positions)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Expansion:
        """The inverse of `to_dict`."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)


def expansion_positions(num_layers: int, count: int, positions: Sequence[int] | None = None) -> tuple[int, ...]:
    """After which layers of the model (from 0) the `count` copies are inserted, ascending. Pure.

    Without `positions` they are spread evenly, the last one behind the last layer; where `count` divides `num_layers`
    these are the places of LLaMA-Pro.

    Raises:
        ConfigError: no or too many copies; positions that are out of range, repeated, unsorted or not `count`.
    """
    if not 1 <= count <= num_layers:
        raise ConfigError(
            f"continual.expand_blocks={count} is outside 1..{num_layers}: each of the model's {num_layers} layers can "
            f"be followed by one copy; use at most {num_layers}, and expand again in a later stage for more"
        )
    if positions is None:
        return tuple((k + 1) * num_layers // count - 1 for k in range(count))
    field = f"continual.expansion.positions={list(positions)}"
    for position in positions:
        if not 0 <= position < num_layers:
            raise ConfigError(f"{field}: {position} is no layer of the model; use numbers in 0..{num_layers - 1}")
    for left, right in pairwise(positions):
        if left >= right:
            what = "is repeated" if left == right else f"stands before {right}"
            raise ConfigError(f"{field}: {left} {what}; name each layer once, in ascending order")
    if len(positions) != count:
        raise ConfigError(f"{field} names {len(positions)} layers, continual.expand_blocks={count}; make them agree")
    return tuple(positions)


def expand_blocks(model: PreTrainedModel, count: int, *, positions: Sequence[int] | None = None) -> Expansion:
    """Insert `count` silent copies of blocks into `model`, in place; config, layer indices and cache slots follow.

    `model` is a causal LM in float32 or bfloat16, not yet wrapped or partitioned. Its new parameters are trainable, the
    others keep their flags. On PyTorch's `meta` device the structure is grown and nothing is computed. Not seen by the
    logits: a router's balancing loss (`output_router_logits`) counts the copied layers too.

    Raises:
        ConfigError: the architecture, a config field or a position does not allow it, or logits would change.
    """
    blocks = decoder_blocks(model)
    chosen = expansion_positions(len(blocks), count, positions)
    changes = grown_config(model.config, chosen)
    before = {name: getattr(model.config, name) for name in changes}
    rows = None if model.device.type == "meta" else probe_rows(model)
    base_logits = None if rows is None else still_logits(model, rows)
    copies = [silent_copy(blocks[position], model.config) for position in chosen]

    for position, twin in reversed(list(zip(chosen, copies, strict=True))):
        blocks.insert(position + 1, twin)
    _set_config(model, changes)
    number_blocks(blocks)
    new_blocks = tuple(position + k + 1 for k, position in enumerate(chosen))
    expansion = Expansion(
        model_type=model.config.model_type,
        layers_before=len(blocks) - count,
        positions=chosen,
        new_blocks=new_blocks,
        parameters=_parameters_of(model, new_blocks),
        config_before=before,
    )
    if rows is not None and base_logits is not None:
        try:
            check_identity(base_logits, model, rows)
        except ConfigError:
            remove_blocks(model, expansion)
            raise
    return expansion


def remove_blocks(model: PreTrainedModel, expansion: Expansion) -> None:
    """Take the blocks of `expansion` out again, in place: weights and config are the base's, bit for bit.

    Raises:
        ConfigError: the model is not one that `expansion` grew, or was expanded again since.
    """
    check_belongs(model, expansion)
    blocks = model.get_decoder().layers
    for index in reversed(expansion.new_blocks):
        del blocks[index]
    _set_config(model, expansion.config_before)
    number_blocks(blocks)


def only_new_blocks(model: PreTrainedModel, expansion: Expansion) -> tuple[str, ...]:
    """Train the blocks of `expansion` alone: sets `requires_grad` of all parameters; returns the trainable names."""
    check_belongs(model, expansion)
    new = frozenset(expansion.parameters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new)
    return expansion.parameters


def unfreeze_names(
    model: PreTrainedModel, expansion: Expansion, which: Literal["neighbours", "all"]
) -> tuple[str, ...]:
    """Names of the parameters to open beside the new blocks, in model order; none of the new blocks' own.

    `neighbours` are the blocks right before and after a new one; `all` is everything, with embeddings (tied ones by
    the name of the input embeddings), final norm and head.
    """
    check_belongs(model, expansion)
    new = frozenset(expansion.parameters)
    if which == "all":
        return tuple(name for name, _ in model.named_parameters() if name not in new)
    around = {index + step for index in expansion.new_blocks for step in (-1, 1)} - set(expansion.new_blocks)
    return _parameters_of(model, [index for index in sorted(around) if index < expansion.layers_after])


def check_belongs(model: PreTrainedModel, expansion: Expansion) -> None:
    """Raise ConfigError unless `model` has the shape that `expansion` left it in."""
    found = (model.config.model_type, model.config.num_hidden_layers)
    if found != (expansion.model_type, expansion.layers_after):
        raise ConfigError(
            f"the expansion belongs to a {expansion.model_type} grown from {expansion.layers_before} to "
            f"{expansion.layers_after} layers; this is a {found[0]} of {found[1]}: use the model it grew, and where "
            f"expansions are stacked, remove the last one first"
        )


def _parameters_of(model: PreTrainedModel, indices: Sequence[int]) -> tuple[str, ...]:
    prefixes = tuple(block_prefix(model, index) for index in indices)
    return tuple(name for name, _ in model.named_parameters() if name.startswith(prefixes))


def _set_config(model: PreTrainedModel, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(model.config, name, value)
