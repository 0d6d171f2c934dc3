"""The best point between a stage's first and last weights, chosen on held-out text (WiSE-FT).

Invariant: every worker measures the same candidates in the same order and chooses the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nexus_ray.models.interpolate import choose_factor, interpolated
from nexus_ray.train import checkpoint as ckpt
from nexus_ray.train.agree import WorkerContext
from nexus_ray.train.engine import full_shape

Select = Callable[[nn.Module, WorkerContext], dict[str, float]]
"""Nats per token by domain on held-out text, over all workers."""


@dataclass(frozen=True)
class Between:
    """What was chosen."""

    factor: float
    """Share of the way from the first to the last weights."""
    losses: dict[float, dict[str, float]]
    """By factor and domain, nats per token."""
    model: nn.Module
    """With the chosen weights."""


def best_between(
    first: nn.Module,
    last: ckpt.Checkpoint,
    factors: Sequence[float],
    *,
    context: WorkerContext,
    select: Select,
    new_domains: Collection[str],
) -> Between:
    """Try `factors`, and both ends; `first` is used up. New domains together count one half, all others the other.

    Raises:
        TrainingError: no candidate has finite losses.
    """
    trained = {name for group in last.info.parameters for name in group}
    start = {name: value.detach() for name, value in first.named_parameters() if name in trained}
    with ckpt.portable(last, rank=context.rank, world=context.world) as states:
        end = {name: full_shape(states[name]["fp32"], value) for name, value in start.items()}
    start = {name: value.clone() for name, value in start.items()}
    candidate = first.to(context.device)
    losses = {}
    for factor in sorted({0.0, 1.0, *factors}):
        _set_weights(candidate, interpolated(start, end, factor))
        losses[factor] = select(candidate, context)
    chosen = choose_factor(losses, _weights(losses[1.0], new_domains))
    _set_weights(candidate, interpolated(start, end, chosen))
    return Between(chosen, losses, candidate)


def _weights(domains: Collection[str], new_domains: Collection[str]) -> dict[str, float]:
    new = [name for name in domains if name in new_domains]
    old = [name for name in domains if name not in new]
    return {name: 1.0 / len(new) for name in new} | {name: 1.0 / len(old) for name in old}


def _set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
