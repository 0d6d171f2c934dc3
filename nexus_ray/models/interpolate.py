"""Interpolation between the weights before and after a stage (WiSE-FT, Wortsman et al. 2021, arXiv 2109.01903).

Invariant: factor 0 is the start and factor 1 the end, bit for bit. Costs forward passes only, no training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nexus_ray.errors import ConfigError, TrainingError


@torch.no_grad()
def interpolated(start: Mapping[str, Tensor], end: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """`start + factor (end - start)` per tensor, computed in float32, in the precision and on the device of `end`.

    Tensors that share memory on both sides (tied ones) still do in the result. Tensors of integers are those of `end`.

    Raises:
        ConfigError: the factor is outside [0, 1], or names or shapes differ.
    """
    if not 0 <= factor <= 1:
        raise ConfigError(f"interpolation factor={factor} is outside 0 (the start) to 1 (the end); use one inside")
    _check_alike(start, end)
    done: dict[tuple[int, int, torch.Size], Tensor] = {}
    result = {}
    for name, last in end.items():
        key = (start[name].data_ptr(), last.data_ptr(), last.shape)
        if key not in done:
            done[key] = _between(start[name], last, factor)
        result[name] = done[key]
    return result


def _between(first: Tensor, last: Tensor, factor: float) -> Tensor:
    if factor == 1 or not last.is_floating_point():
        return last.detach().clone()
    first = first.to(last.device)
    if factor == 0:
        return first.detach().to(last.dtype, copy=True)
    return torch.lerp(first.float(), last.float(), factor).to(last.dtype)


def _check_alike(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
    lone = sorted(start.keys() ^ end.keys())
    if lone:
        raise ConfigError(
            f"interpolation: {lone[0]} is in only one of the two models; merge adapters, and interpolate before blocks "
            f"are added"
        )
    for name in end:
        if start[name].shape != end[name].shape:
            here, there = tuple(start[name].shape), tuple(end[name].shape)
            raise ConfigError(f"interpolation: {name} is {here} before and {there} after; use models of one shape")


def choose_factor(losses: Mapping[float, Mapping[str, float]], weights: Mapping[str, float]) -> float:
    """The factor with the lowest weighted mean of held-out losses; the largest (most learned) of equal ones.

    `losses[factor][domain]` are of one unit throughout (nats per token, or bits per byte); `weights[domain]` are not
    negative, and domains that lack one do not count. A factor with a non-finite loss is never chosen: the path
    between two models may cross a ridge.

    Raises:
        ConfigError: a weighted domain has no loss, or nothing has a weight.
        TrainingError: no factor has finite losses.
    """
    counted = {domain: weight for domain, weight in weights.items() if weight}
    if not losses or not counted or not all(math.isfinite(w) and w > 0 for w in counted.values()):
        raise ConfigError(f"interpolation: weights={dict(weights)} of {len(losses)} factors; give positive weights")
    means: dict[float, float] = {}
    for factor, row in losses.items():
        missing = sorted(counted.keys() - row.keys())
        if missing:
            raise ConfigError(f"interpolation: factor {factor} has no loss on {missing[0]}; evaluate that domain too")
        means[factor] = math.fsum(weight * row[domain] for domain, weight in counted.items())
    finite = {factor: mean for factor, mean in means.items() if math.isfinite(mean)}
    if not finite:
        raise TrainingError("interpolation: no factor has finite held-out losses; lower training.learning_rate")
    return max(factor for factor, mean in finite.items() if mean == min(finite.values()))
