"""Learning rate over the steps of one stage: re-warm, then cosine, WSD, infinite or constant. Pure.

Sources: re-warm and re-decay, Ibrahim et al. 2024 (arXiv:2403.08763, equation 2 and section 7.2 for the infinite
schedule); warm-up-stable-decay, Hu et al. 2024 (arXiv:2404.06395).
"""

from __future__ import annotations

import math

from nexus_ray.config.tree import RunConfig, ScheduleConfig


def factor(step: int, *, total_steps: int, warmup_steps: int, config: ScheduleConfig, rewarm: bool = True) -> float:
    """Learning rate of optimizer step `step` (0-based, of `total_steps`) as a share of the peak.

    `warmup_steps` steps rise linearly, the last of them at the peak; a warm-up longer than the stage is clipped to it.
    Without `rewarm` the whole stage runs at `config.min_factor`, where a decaying stage before it ended.
    """
    if not rewarm:
        return config.min_factor
    warmup = min(warmup_steps, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)  # 0 at the peak, 1 at the last step
    if config.kind == "constant":
        return 1.0
    if config.kind == "cosine":
        return _cosine(progress, 1.0, config.min_factor)
    if config.kind == "wsd":
        return _decay(progress, 1.0 - config.decay_fraction, 1.0, config.min_factor)
    if progress < config.cooldown_fraction:
        return _cosine(progress / config.cooldown_fraction, 1.0, config.constant_factor)
    return _decay(progress, 1.0 - config.decay_fraction, config.constant_factor, config.min_factor)


def stage_factors(config: RunConfig, stage_index: int) -> list[float]:
    """`factor` of every step of a stage; `config` is the stage's own."""
    return [
        factor(
            step,
            total_steps=config.training.steps,
            warmup_steps=config.continual.warmup_steps,
            config=config.training.schedule,
            rewarm=config.continual.warmup_on_new or stage_index == 0,
        )
        for step in range(config.training.steps)
    ]


def _cosine(progress: float, high: float, low: float) -> float:
    return low + (high - low) * (1.0 + math.cos(math.pi * min(1.0, progress))) / 2.0


def _decay(progress: float, begin: float, high: float, low: float) -> float:
    """Constant at `high` until `begin`, then exponentially to `low` (linearly if either is 0, or next to it)."""
    if progress <= begin or begin >= 1.0:
        return high
    share = min(1.0, (progress - begin) / (1.0 - begin))
    exponential = low > 0 and high > 0 and math.isfinite(low / high)
    return high * (low / high) ** share if exponential else high + (low - high) * share
