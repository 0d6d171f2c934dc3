"""Points with their seeds: what was measured once per seed, its mean, and how sure the seeds make it.

Invariant: seeds are replicates. Points that ran with the same seeds are resampled together (the same seeds are drawn
for all of them), because equal seeds read the same data in the same order; so what the seed does to all points alike
cancels in their differences. A single seed gives no interval: None, never a guess.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nexus_ray.study.records import Objectives, Point, Report, Trial

Floats = NDArray[np.float64]
Metric = Literal["new", "forgetting", "cost"]
METRICS: tuple[Metric, ...] = ("new", "forgetting", "cost")
"""In the order of the columns of every array of objectives here."""
HIGHER_IS_BETTER: Mapping[Metric, bool] = {"new": True, "forgetting": False, "cost": False}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    interval: tuple[float, float] | None
    """95 %, Student's t over the seeds; None with a single seed."""
    seeds: int


@dataclass(frozen=True)
class Replicated:
    """A point and its objectives by seed."""

    point: Point
    by_seed: Mapping[int, Objectives]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted(self.by_seed))

    def values(self) -> Floats:
        """Objectives [seeds, 3], rows in order of seeds, columns as in `METRICS`."""
        return np.array([[getattr(self.by_seed[seed], key) for key in METRICS] for seed in self.seeds], dtype=float)

    def estimate(self, metric: Metric) -> Estimate:
        """Mean over the seeds with its interval."""
        values = self.values()[:, METRICS.index(metric)]
        return Estimate(float(values.mean()), mean_interval(values), len(values))


def grouped(trials: Iterable[Trial], *, tokens: int | None = None) -> list[Replicated]:
    """Points with at least one measured seed, in the order in which the study met them.

    `tokens` None: objectives at the full budget, of finished trials alone. Else those of each trial's last report at
    no more than this many tokens, of every trial whose reports reach that far; failed trials never count.
    """
    points: dict[str, Point] = {}
    found: dict[str, dict[int, Objectives]] = {}
    for trial in trials:
        objectives = trial.final if tokens is None else _at(trial, tokens)
        if objectives is not None and all(math.isfinite(getattr(objectives, key)) for key in METRICS):
            points.setdefault(trial.point.id, trial.point)
            found.setdefault(trial.point.id, {})[trial.seed] = objectives
    return [Replicated(points[key], seeds) for key, seeds in found.items()]


def _at(trial: Trial, tokens: int) -> Objectives | None:
    if trial.status == "failed" or not trial.reports or trial.reports[-1].tokens < tokens:
        return None
    reached: list[Report] = [report for report in trial.reports if report.tokens <= tokens]
    return reached[-1].objectives if reached else None


def common_tokens(trials: Sequence[Trial]) -> int | None:
    """The most tokens at which every trial that reported and did not fail has a report; None if there are none."""
    ends = [trial.reports[-1].tokens for trial in trials if trial.reports and trial.status != "failed"]
    return min(ends) if ends else None


def mean_interval(values: Floats) -> tuple[float, float] | None:
    """95 % interval of the mean of independent values [n] (Student's t); None for fewer than two."""
    if len(values) < 2:
        return None
    half = t_quantile(0.975, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def t_quantile(share: float, degrees: float) -> float:
    """The value that Student's t stays below with probability `share` (0.5 to 1); `degrees` need not be whole.

    By the substitution t = sqrt(degrees) tan(angle), under which the density is a power of the cosine.
    """
    if degrees < 1 or not 0.5 <= share < 1:
        raise ValueError(f"t_quantile is for at least one degree of freedom and shares in [0.5, 1): {share}, {degrees}")
    angles = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (degrees - 1)
    area = np.r_[0.0, np.cumsum((density[1:] + density[:-1]) / 2)]
    angle = np.interp(2 * share - 1, area / area[-1], angles)
    return math.sqrt(degrees) * math.tan(float(angle))


def resampled_means(points: Sequence[Replicated], samples: int, *, seed: int) -> Floats:
    """Means over resampled seeds [samples, points, 3]; a point with one seed keeps its value in all of them.

    Of n seeds n - 1 are drawn with replacement: the resampled means then vary by exactly the unbiased variance of the
    mean (McCarthy & Snowden 1985), which n draws would understate by a third with three seeds. Points with the same
    seeds share the draws; others are drawn apart. A function of the arguments alone.
    """
    out = np.empty((samples, len(points), len(METRICS)))
    weights: dict[tuple[int, ...], Floats] = {}
    for place, point in enumerate(points):
        if (seeds := point.seeds) not in weights:
            weights[seeds] = seed_weights(seeds, samples, seed=seed)
        out[:, place] = weights[seeds] @ point.values()
    return out


def seed_weights(seeds: tuple[int, ...], samples: int, *, seed: int) -> Floats:
    """Shares [samples, seeds] with which each seed enters a resampled mean; they depend on the set of seeds alone."""
    number = len(seeds)
    if number == 1:
        return np.ones((samples, 1))
    generator = np.random.default_rng([seed, zlib.crc32(repr(seeds).encode())])
    return generator.multinomial(number - 1, np.full(number, 1 / number), size=samples) / (number - 1)


def is_number(value: object) -> bool:
    """Whether a knob's value can be put on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def common_seeds(first: Replicated, second: Replicated) -> list[int]:
    """Seeds that both points ran with."""
    return sorted(set(first.by_seed) & set(second.by_seed))
