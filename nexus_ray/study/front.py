"""What a study found: the Pareto front of its points, how sure it is, and the winner under the objective.

All comparisons are made on values turned so that lower is better. Legend: P points, K axes, S resamples of the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nexus_ray.errors import ConfigError
from nexus_ray.evaluate.bootstrap import interval
from nexus_ray.study.records import Trial
from nexus_ray.study.replicates import (
    HIGHER_IS_BETTER,
    METRICS,
    Estimate,
    Floats,
    Metric,
    Replicated,
    common_seeds,
    grouped,
    mean_interval,
    resampled_means,
)

NOISE_DEVIATIONS = 2.0
"""A difference of fewer standard deviations over seeds than this is within the noise."""
_SIGN = np.array([-1.0 if HIGHER_IS_BETTER[key] else 1.0 for key in METRICS])


@dataclass(frozen=True)
class Goal:
    """What a study is after, as one number per trial."""

    kind: Literal["new_under_forgetting", "weighted"] = "new_under_forgetting"
    max_forgetting: float | None = None
    """Bits per byte; a point whose mean forgets more is infeasible (`new_under_forgetting` only; None: no bound)."""
    weights: Mapping[Metric, float] | None = None
    """What a unit of each objective is worth (`weighted` only); forgetting and cost are subtracted."""

    def score(self, values: Floats) -> Floats:
        """[..., 3] -> [...], higher is better; the bound is looked at separately."""
        if self.kind == "new_under_forgetting":
            return np.asarray(values[..., 0])
        shares = np.array([(self.weights or {}).get(key, 0.0) for key in METRICS])
        return np.asarray(-(values * _SIGN) @ shares)

    def feasible(self, values: Floats) -> NDArray[np.bool_]:
        """[..., 3] -> [...]"""
        if self.kind == "weighted" or self.max_forgetting is None:
            return np.ones(values.shape[:-1], dtype=bool)
        return np.asarray(values[..., 1] <= self.max_forgetting)

    def best(self, values: Floats) -> NDArray[np.intp]:
        """Place of the best point: [..., P, 3] -> [...]. Without a feasible one, that which forgets least."""
        able = self.feasible(values)
        ranked = np.where(able, self.score(values), -np.inf)
        return np.where(able.any(axis=-1), ranked.argmax(axis=-1), values[..., 1].argmin(axis=-1))


@dataclass(frozen=True)
class Member:
    """A point and its place relative to the front."""

    replicated: Replicated
    estimates: Mapping[Metric, Estimate]
    on_front: bool
    """Whether no other point's means are at least as good everywhere and better somewhere."""
    probability: float | None
    """Share of the resampled seeds in which it is on the front; None if it ran with one seed."""
    feasible: bool
    feasible_probability: float | None
    """Share of the resampled seeds in which it keeps the bound on forgetting; None with one seed."""

    @property
    def id(self) -> str:
        return self.replicated.point.id


@dataclass(frozen=True)
class Rival:
    """Another point against the winner."""

    id: str
    gap: float
    """How much the winner's score is ahead."""
    noise: float | None
    """Two standard deviations over seeds of a point's score, pooled over both; None if neither has two seeds."""
    interval: tuple[float, float] | None
    """95 % interval of the gap, paired by seed; None with fewer than two seeds in common."""

    @property
    def within_noise(self) -> bool | None:
        """None if nobody knows: there is no second seed."""
        return None if self.noise is None else self.gap <= self.noise


@dataclass(frozen=True)
class Winner:
    """The best point under the objective."""

    id: str
    score: float
    feasible: bool
    """False: no point keeps the bound, and this one forgets least."""
    probability: float | None
    """Share of the resampled seeds in which it wins; None if no point has a second seed."""
    rivals: tuple[Rival, ...]
    """Other points that keep the bound, nearest first."""

    @property
    def within_noise(self) -> tuple[Rival, ...]:
        return tuple(rival for rival in self.rivals if rival.within_noise)


@dataclass(frozen=True)
class Front:
    """The Pareto front over `axes`."""

    axes: tuple[Metric, ...]
    members: tuple[Member, ...]
    """All points with a finished trial, in the study's order."""
    winner: Winner
    hypervolume: float
    """Volume between the front and the reference; comparable only for equal axes and reference."""
    hypervolume_interval: tuple[float, float] | None
    reference: tuple[float, ...]
    """One value per axis, in the objectives' own signs."""
    remarks: tuple[str, ...]
    """What the figures cannot say, in words."""

    def on_front(self) -> list[Member]:
        """Members of the front by falling score of the first axis."""
        best_first = -1 if HIGHER_IS_BETTER[self.axes[0]] else 1
        return sorted(
            (m for m in self.members if m.on_front), key=lambda m: best_first * m.estimates[self.axes[0]].mean
        )


def study_front(
    trials: Sequence[Trial],
    goal: Goal | None = None,
    *,
    axes: Sequence[Metric] = METRICS,
    reference: Sequence[float] | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> Front:
    """The front of a study's finished trials, over two or three of the objectives.

    `reference`: the point that bounds the hypervolume, one value per axis; default: the worst mean of each axis.

    Raises:
        ConfigError: no trial has finished, or axes or reference do not fit.
    """
    axes = tuple(axes)
    if len(set(axes)) != len(axes) or len(axes) < 2 or not set(axes) <= set(METRICS):
        raise ConfigError(f"axes={list(axes)} of a front are two or three different ones of {', '.join(METRICS)}")
    if reference is not None and len(reference) != len(axes):
        raise ConfigError(f"reference={list(reference)} needs one value for each of the axes {', '.join(axes)}")
    points = candidates(trials)
    if not points:
        raise ConfigError(
            "no trial of this study has finished whose point goes on, so there is no front; wait for one or resume it"
        )
    goal, columns = goal or Goal(), [METRICS.index(axis) for axis in axes]
    means = np.stack([point.values().mean(axis=0) for point in points])
    drawn = resampled_means(points, samples, seed=seed)
    turned, turned_drawn = (means * _SIGN)[:, columns], (drawn * _SIGN)[..., columns]
    corner = turned.max(axis=0) if reference is None else np.asarray(reference) * _SIGN[columns]
    certain = all(len(point.by_seed) < 2 for point in points)
    mask, share = non_dominated(turned), non_dominated(turned_drawn).mean(axis=0)
    kept = goal.feasible(drawn).mean(axis=0)
    members = tuple(
        Member(
            point,
            {key: point.estimate(key) for key in METRICS},
            bool(mask[place]),
            float(share[place]) if len(point.by_seed) > 1 else None,
            bool(goal.feasible(means)[place]),
            float(kept[place]) if len(point.by_seed) > 1 else None,
        )
        for place, point in enumerate(points)
    )
    volumes = None if certain else interval(np.array([hypervolume(part, corner) for part in turned_drawn[:200]]))
    winner = _winner(points, means, drawn, goal, certain=certain)
    return Front(
        axes,
        members,
        winner,
        hypervolume(turned, corner),
        volumes,
        tuple(float(value) for value in corner * _SIGN[columns]),
        tuple(_remarks(points, trials, winner)),
    )


def non_dominated(values: Floats) -> NDArray[np.bool_]:
    """Which points no other dominates, lower being better: [..., P, K] -> [..., P]. Equal points do not."""
    first, second = values[..., :, None, :], values[..., None, :, :]  # [..., P, Q, K]
    beaten = (second <= first).all(axis=-1) & (second < first).any(axis=-1)
    return np.asarray(~beaten.any(axis=-1))


def hypervolume(values: Floats, reference: Floats) -> float:
    """Volume that points [P, K] dominate within `reference` [K], lower being better (Zitzler & Thiele 1998).

    Exact, by slices along the last axis; meant for two or three axes and some hundred points.
    """
    values = values[(values < reference).all(axis=-1)]
    if not len(values):
        return 0.0
    if values.shape[1] == 1:
        return float(reference[0] - values.min())
    edges = np.unique(values[:, -1])
    depths = np.diff([*edges, reference[-1]])
    below = (values[values[:, -1] <= edge, :-1] for edge in edges)
    return float(sum(depth * hypervolume(part, reference[:-1]) for depth, part in zip(depths, below, strict=True)))


def _winner(points: Sequence[Replicated], means: Floats, drawn: Floats, goal: Goal, *, certain: bool) -> Winner:
    place, scores, able = int(goal.best(means)), goal.score(means), goal.feasible(means)
    others = [at for at in range(len(points)) if at != place and able[at]] if able[place] else []
    rivals = [_rival(points[place], points[at], float(scores[place] - scores[at]), goal) for at in others]
    return Winner(
        points[place].point.id,
        float(scores[place]),
        bool(able[place]),
        None if certain else float((goal.best(drawn) == place).mean()),
        tuple(sorted(rivals, key=lambda rival: rival.gap)),
    )


def _rival(winner: Replicated, other: Replicated, gap: float, goal: Goal) -> Rival:
    scores = [goal.score(point.values()) for point in (winner, other)]
    degrees = sum(len(part) - 1 for part in scores)
    squares = sum(float(((part - part.mean()) ** 2).sum()) for part in scores)
    noise = NOISE_DEVIATIONS * (squares / degrees) ** 0.5 if degrees else None
    shared = common_seeds(winner, other)
    first, second = (
        np.array([part[point.seeds.index(seed)] for seed in shared])
        for point, part in zip((winner, other), scores, strict=True)
    )
    return Rival(other.point.id, gap, noise, mean_interval(first - second))


def candidates(trials: Sequence[Trial]) -> list[Replicated]:
    """Points with a finished trial, but for those that were stopped, by a signal of another seed perhaps."""
    stopped = {trial.point.id for trial in trials if trial.status == "stopped"}
    return [point for point in grouped(trials) if point.point.id not in stopped]


def _remarks(points: Sequence[Replicated], trials: Sequence[Trial], winner: Winner) -> list[str]:
    single, remarks = sum(len(point.by_seed) == 1 for point in points), []
    if single == len(points):
        remarks.append("Every point ran with one seed: there is no interval, and no difference can be told from noise.")
    elif single:
        remarks.append(
            f"{single} of {len(points)} points ran with one seed: they have no interval and are taken as exact where "
            f"others are compared with them."
        )
    fewest = min((len(point.by_seed) for point in points if len(point.by_seed) > 1), default=0)
    if 2 <= fewest <= 4:
        remarks.append(f"With {fewest} seeds the shares of resamples are coarse; read them as a rough guide.")
    if stopped := sum(trial.status == "stopped" for trial in trials):
        remarks.append(f"{stopped} trials were stopped early; their points are no candidates here.")
    if paused := sum(trial.status == "paused" for trial in trials):
        remarks.append(f"{paused} trials are paused at a rung, short of their budgets, and are no candidates here.")
    if failed := sum(trial.status == "failed" for trial in trials):
        remarks.append(f"{failed} trials failed and are left out.")
    if own := [trial.seed for trial in trials if trial.status == "failed" and trial.point.id == winner.id]:
        seeds = ", ".join(str(seed) for seed in own)
        remarks.append(f"The winner failed with seed {seeds} and is judged by its other seeds alone.")
    return remarks
