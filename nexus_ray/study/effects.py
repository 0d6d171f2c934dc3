"""What each knob does to an objective, with an interval, however the points were chosen.

A full grid is read by its marginal means: for each level, the mean over matched settings of the other knobs. Points of
a random or adaptive search are read through an additive model (`additive.py`). A conditional knob (`lora_rank` only
with LoRA) is compared among the points that have it alone.

Invariant: an interval says what it covers, and where nothing varies that it could come from, there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nexus_ray.evaluate.bootstrap import LEVEL, interval
from nexus_ray.study.additive import additive_effects
from nexus_ray.study.records import Trial, Value, canonical
from nexus_ray.study.replicates import (
    METRICS,
    Floats,
    Metric,
    Replicated,
    common_tokens,
    grouped,
    is_number,
    t_quantile,
)

Pair = tuple[float, float]


@dataclass(frozen=True)
class Level:
    """One value of a knob."""

    value: Value
    mean: float
    """Objective at this value, the other knobs averaged out."""
    interval: Pair | None
    """95 %, of the difference to the mean over the levels, added to `mean`."""
    points: int


@dataclass(frozen=True)
class KnobEffect:
    """What one knob does, among the points that have it."""

    knob: str
    levels: tuple[Level, ...]
    """By value, numbers in order."""
    size: float
    """Largest less smallest mean over the levels."""
    contrast: Pair | None
    """95 % interval of the objective at the level of the highest mean less that of the lowest, any two considered."""
    among: int
    """Points that have this knob."""
    importance: float | None = None
    """What the additive model's out-of-bag R2 loses if this knob is shuffled; None for a grid."""

    @property
    def clear(self) -> bool | None:
        """Whether the interval of the largest contrast excludes zero; None if there is none."""
        return None if self.contrast is None else not self.contrast[0] <= 0.0 <= self.contrast[1]

    @property
    def numeric(self) -> bool:
        return all(is_number(level.value) for level in self.levels)


@dataclass(frozen=True)
class Effects:
    """All knobs' effects on one objective."""

    metric: Metric
    method: Literal["marginal means", "additive model"]
    knobs: tuple[KnobEffect, ...]
    """Largest effect first."""
    tokens: int | None
    """Where the trials were compared, in tokens trained; None: at the full budget."""
    explained: float | None
    """Out-of-bag R2 of the additive model: about 0 or less and it says nothing. None for a grid."""
    remarks: tuple[str, ...]


def knob_effects(trials: Sequence[Trial], metric: Metric, *, samples: int = 500, seed: int = 0) -> Effects | None:
    """Effects of all knobs that took at least two values; None if no two points can be compared.

    If trials were stopped early they are compared where all of them have a report: those that reached the full budget
    were chosen for their results, and an effect among them alone would be biased.
    """
    stopped = any(trial.status not in ("finished", "failed") and trial.reports for trial in trials)
    tokens = common_tokens(trials) if stopped else None
    points = grouped(trials, tokens=tokens)
    knobs = {knob: _values(points, knob) for knob in _knobs(points)}
    knobs = {knob: values for knob, values in knobs.items() if len(values) > 1}
    if not knobs:
        return None
    remarks = []
    if tokens is not None:
        remarks.append(f"Compared at {tokens:,} tokens, where every trial that did not fail has a report.")
    column, explained = METRICS.index(metric), None
    if all(_blocks(points, knob) is not None for knob in knobs):
        effects, method = [_marginal(points, knob, column) for knob in knobs], "marginal means"
        if all(effect.contrast is None for effect in effects):
            remarks.append("One seed and no matched settings: there is no interval.")
    else:
        method, (effects, explained) = "additive model", _additive(points, knobs, column, samples, seed)
        constant = all(effect.size == 0.0 for effect in effects)
        remarks.append(_CONSTANT if constant else _how_good(explained, len(points)))
    ordered = sorted(effects, key=lambda effect: -effect.size)
    return Effects(metric, method, tuple(ordered), tokens, explained, tuple(remarks))  # type: ignore[arg-type]


_CONSTANT = "It is the same at every point: no knob changes it."


def _how_good(explained: float | None, points: int) -> str:
    if explained is None:
        return f"{points} points are too few to say how well the additive model predicts; take its effects as a hint."
    if explained <= 0.1:
        return (
            f"The additive model predicts points left out no better than their mean does (R2 {explained:.2f}): "
            f"no effect can be read."
        )
    return f"Additive model, R2 {explained:.2f} on points left out; interactions between knobs are not in it."


def _knobs(points: Sequence[Replicated]) -> list[str]:
    return list(dict.fromkeys(knob for point in points for knob in point.point.params))


def _values(points: Sequence[Replicated], knob: str) -> dict[str, Value]:
    """Distinct values of a knob by their canonical text, numbers in order, others as met."""
    found = {canonical(p.point.params[knob]): p.point.params[knob] for p in points if knob in p.point.params}
    if all(is_number(value) for value in found.values()):
        return dict(sorted(found.items(), key=lambda item: float(item[1])))  # type: ignore[arg-type]
    return found


# --- a grid --------------------------------------------------------------------------------------------------------


def _blocks(points: Sequence[Replicated], knob: str) -> dict[str, dict[str, list[Replicated]]] | None:
    """Points by setting of the other knobs, then by level; None unless every setting has every level.

    The setting is made of the knobs that all points with this one have: what hangs on its value (the rank of LoRA, for
    the method) is averaged over.
    """
    having = [point for point in points if knob in point.point.params]
    shared = [k for k in _knobs(having) if k != knob and all(k in point.point.params for point in having)]
    blocks: dict[str, dict[str, list[Replicated]]] = {}
    for point in having:
        setting = canonical([point.point.params[k] for k in shared])
        blocks.setdefault(setting, {}).setdefault(canonical(point.point.params[knob]), []).append(point)
    levels = len(_values(points, knob))
    return blocks if all(len(block) == levels for block in blocks.values()) else None


def _marginal(points: Sequence[Replicated], knob: str, column: int) -> KnobEffect:
    """Means over blocks and common seeds."""
    blocks, values = _blocks(points, knob) or {}, _values(points, knob)
    having = [point for block in blocks.values() for part in block.values() for point in part]
    seeds = sorted(set.intersection(*(set(point.by_seed) for point in having)))
    table = _table(blocks, list(values), seeds, column)  # [blocks, levels, seeds]
    means, centred = table.mean(axis=(0, 2)), table - table.mean(axis=1, keepdims=True)
    high, low = int(means.argmax()), int(means.argmin())
    counts = [sum(len(block[key]) for block in blocks.values()) for key in values]
    levels = [
        Level(value, float(means[at]), _moved(crossed_interval(centred[:, at]), float(means.mean())), counts[at])
        for at, value in enumerate(values.values())
    ]
    contrast = crossed_interval(table[:, high] - table[:, low], _level_of_pairs(len(values)))
    return KnobEffect(knob, tuple(levels), float(means[high] - means[low]), contrast, len(having))


def crossed_interval(values: Floats, level: float = LEVEL) -> Pair | None:
    """Interval of the mean of values [blocks, seeds] that vary by block and by seed; None if there is one value.

    Variances of the mean over blocks and over seeds are added, with Satterthwaite's (1946) degrees of freedom; what
    varies by both is counted twice, on the safe side.
    """
    parts = []
    for axis in (0, 1):
        means = values.mean(axis=1 - axis)
        if len(means) > 1:
            parts.append((float(means.var(ddof=1)) / len(means), len(means) - 1))
    if not parts:
        return None
    total, mean = sum(variance for variance, _ in parts), float(values.mean())
    if total == 0.0:
        return mean, mean
    degrees = total**2 / sum(variance**2 / number for variance, number in parts)
    half = t_quantile((1 + level) / 2, max(1.0, degrees)) * math.sqrt(total)
    return mean - half, mean + half


def _level_of_pairs(levels: int) -> float:
    """Coverage for the most different two of so many levels, which were picked by looking (Bonferroni)."""
    return 1 - (1 - LEVEL) / max(1, levels * (levels - 1) // 2)


def _moved(pair: Pair | None, by: float) -> Pair | None:
    return None if pair is None else (pair[0] + by, pair[1] + by)


def _table(
    blocks: Mapping[str, Mapping[str, list[Replicated]]], levels: Sequence[str], seeds: Sequence[int], column: int
) -> Floats:
    """[blocks, levels, seeds], points of one cell averaged; one pseudo-seed, the mean, if the points share none."""

    def cell(part: Sequence[Replicated]) -> Floats:
        rows = [p.values()[[p.seeds.index(s) for s in seeds]] if seeds else p.values().mean(0)[None] for p in part]
        return np.asarray(np.mean(rows, axis=0)[:, column])

    return np.array([[cell(block[level]) for level in levels] for block in blocks.values()])


# --- a search --------------------------------------------------------------------------------------------------------


def _additive(
    points: Sequence[Replicated], knobs: Mapping[str, Mapping[str, Value]], column: int, samples: int, seed: int
) -> tuple[list[KnobEffect], float | None]:
    y = np.array([point.values()[:, column].mean() for point in points])
    params = [point.point.params for point in points]
    found, explained = additive_effects(params, y, {k: list(v.values()) for k, v in knobs.items()}, samples, seed=seed)
    effects = []
    for knob, curve in found.items():
        high, low = int(curve.means.argmax()), int(curve.means.argmin())
        drawn = curve.drawn
        counts = [sum(knob in p and _near(p[knob], value, curve.values) for p in params) for value in curve.values]
        levels = [
            Level(value, float(curve.means[at]), None if drawn is None else interval(drawn[:, at]), counts[at])
            for at, value in enumerate(curve.values)
        ]
        contrast = None if drawn is None else interval(drawn[:, high] - drawn[:, low], _level_of_pairs(drawn.shape[1]))
        among = sum(knob in p for p in params)
        effects.append(KnobEffect(knob, tuple(levels), float(np.ptp(curve.means)), contrast, among, curve.importance))
    return effects, explained


def _near(value: Value, level: Value, levels: Sequence[Value]) -> bool:
    """Whether `level` is the one that `value` counts for: the same, or the nearest of a numeric knob's."""
    if not is_number(value):
        return canonical(value) == canonical(level)
    return level == min(levels, key=lambda other: abs(float(other) - float(value)))  # type: ignore[arg-type]
