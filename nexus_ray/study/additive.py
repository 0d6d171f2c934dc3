"""An additive model of a few dozen points: ridge regression with the bootstrap around it. Pure numpy.

    y(point) = constant + sum over its knobs of f_knob(value)

A categorical knob has one centred coefficient per value; a numeric one a line and a parabola over its scaled range
(logarithmic if its positive values span a factor of ten). The columns of a conditional knob are zero where it is
absent, so that its curve is judged among the points that have it; its being there gets a column of its own, unless the
knob that it hangs on says so already. Ridge (Hoerl & Kennard 1970) with the
penalty of least leave-one-out error keeps it sound when there are hardly more points than columns; it pulls effects
towards zero, so sizes are cautious. Importance is the loss of out-of-bag accuracy when a knob is shuffled (Breiman
2001, section 10).

Legend: N points, C columns, S resamples, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nexus_ray.study.records import Value, canonical
from nexus_ray.study.replicates import Floats

MIN_POINTS = 6
"""Fewer points than this give no intervals."""
MAX_LEVELS = 7
"""Places of a numeric knob with more values at which its curve is given."""
_ROUNDING = 1e-12
"""Relative range of an objective below which it is constant."""
_PENALTIES = 10.0 ** np.arange(-3, 3.5, 0.5)


@dataclass(frozen=True)
class Curve:
    """One knob's part of the model."""

    values: tuple[Value, ...]
    means: Floats
    """[L] the objective at each value, all else averaged over the points that have the knob."""
    drawn: Floats | None
    """[S, L] the same of resampled points; None with too few."""
    importance: float | None


@dataclass(frozen=True)
class _Knob:
    name: str
    levels: tuple[Value, ...]
    log: bool
    low: float
    high: float
    """Scaled range; equal for a categorical knob."""
    presence: bool = False
    """Whether the model has a column for the knob being there at all."""

    @property
    def width(self) -> int:
        return int(self.presence) + (2 if self.high > self.low else len(self.levels))

    def columns(self, value: Value) -> list[float]:
        if self.high > self.low:
            x = 2 * (self._scaled(value) - self.low) / (self.high - self.low) - 1
            return [x, x * x - 1 / 3]
        return [float(canonical(value) == canonical(level)) - 1 / len(self.levels) for level in self.levels]

    def _scaled(self, value: Value) -> float:
        return math.log(float(value)) if self.log else float(value)  # type: ignore[arg-type]

    def places(self) -> tuple[Value, ...]:
        """Values at which the curve is given."""
        if len(self.levels) <= MAX_LEVELS or self.high <= self.low:
            return self.levels
        grid = np.linspace(self.low, self.high, MAX_LEVELS)
        return tuple(float(f"{math.exp(x) if self.log else x:.4g}") for x in grid)


def additive_effects(
    params: Sequence[Mapping[str, Value]],
    y: Floats,
    knobs: Mapping[str, Sequence[Value]],
    samples: int,
    *,
    seed: int,
) -> tuple[dict[str, Curve], float | None]:
    """Curves by knob, and the out-of-bag R2 (None with fewer than `MIN_POINTS` points, or a constant objective).

    `params`: knobs of the N points. `y`: their objective [N]. `knobs`: the values of each knob that varies.
    """
    described = _with_presence([_describe(name, values) for name, values in knobs.items()], params)
    design = np.stack([_row(described, point) for point in params])
    constant = float(np.ptp(y)) <= _ROUNDING * float(np.abs(y).max())
    mean, spread = float(y.mean()), 1.0 if constant else float(y.std())
    target = np.zeros(len(y)) if constant else (y - mean) / spread
    penalty = _best_penalty(design, target)
    weights = np.ones((1, len(y)))
    point_fit = _ridge(design, target, weights, penalty)  # [1, 1 + C]
    drawn = None
    explained: float | None = None
    losses: dict[str, float] = {}
    if len(y) >= MIN_POINTS and not constant:
        generator = np.random.default_rng([seed, len(y)])
        counts = generator.multinomial(len(y), np.full(len(y), 1 / len(y)), size=samples).astype(float)
        drawn = _ridge(design, target, counts, penalty)
        explained, losses = _out_of_bag(design, target, counts, drawn, described, generator)
    curves = {}
    for knob in described:
        evaluate = np.stack([_row(described, {**_typical(params, knob.name), knob.name: v}) for v in knob.places()])
        rest = _mean_rest(design, described, knob, params)
        part = _slice(described, knob)
        rows = np.tile(rest, (len(evaluate), 1))
        rows[:, part] = evaluate[:, part]
        full = np.c_[np.ones(len(rows)), rows]
        means = (full @ point_fit[0]) * spread + mean
        many = None if drawn is None else (drawn @ full.T) * spread + mean
        curves[knob.name] = Curve(knob.places(), means, many, losses.get(knob.name))
    return curves, explained


def _describe(name: str, values: Sequence[Value]) -> _Knob:
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values) or len(numbers) < 3:
        return _Knob(name, tuple(values), False, 0.0, 0.0)
    log = min(numbers) > 0 and max(numbers) / min(numbers) >= 10
    scaled = [math.log(v) if log else v for v in numbers]
    return _Knob(name, tuple(values), log, min(scaled), max(scaled))


def _with_presence(knobs: Sequence[_Knob], params: Sequence[Mapping[str, Value]]) -> list[_Knob]:
    """The knobs, with a column for being there where no linear combination of the others' columns says it."""
    out = list(knobs)
    for place, knob in enumerate(knobs):
        there = np.array([float(knob.name in point) for point in params])
        others = np.stack([_row([k for k in out if k is not knob], point) for point in params])
        full = np.c_[np.ones(len(params)), others]
        rest = there - full @ np.linalg.lstsq(full, there, rcond=None)[0]
        out[place] = replace(knob, presence=float(np.abs(rest).max()) > 1e-6)
    return out


def _row(knobs: Sequence[_Knob], point: Mapping[str, Value]) -> Floats:
    """[C] columns of each knob, all zero if the point does not have it."""
    out: list[float] = []
    for knob in knobs:
        if knob.name not in point:
            out += [0.0] * knob.width
        else:
            out += [*([1.0] if knob.presence else []), *knob.columns(point[knob.name])]
    return np.array(out)


def _slice(knobs: Sequence[_Knob], wanted: _Knob) -> slice:
    start = sum(knob.width for knob in knobs[: [k.name for k in knobs].index(wanted.name)])
    return slice(start, start + wanted.width)


def _typical(params: Sequence[Mapping[str, Value]], knob: str) -> Mapping[str, Value]:
    return next(point for point in params if knob in point)


def _mean_rest(design: Floats, knobs: Sequence[_Knob], knob: _Knob, params: Sequence[Mapping[str, Value]]) -> Floats:
    """Mean row [C] of the points that have the knob."""
    return np.asarray(design[[knob.name in point for point in params]].mean(axis=0))


def _ridge(design: Floats, target: Floats, weights: Floats, penalty: float) -> Floats:
    """Weighted ridge fits [S, 1 + C], the constant free of the penalty, for weights [S, N]."""
    full = np.c_[np.ones(len(design)), design]
    gram = np.einsum("sn,ni,nj->sij", weights, full, full)
    gram += np.diag([1e-9, *np.full(design.shape[1], penalty)])
    return np.asarray(np.linalg.solve(gram, np.einsum("sn,ni,n->si", weights, full, target)[..., None])[..., 0])


def _best_penalty(design: Floats, target: Floats) -> float:
    """The penalty of least leave-one-out error, in closed form (Allen 1974)."""
    full, errors = np.c_[np.ones(len(design)), design], []
    for penalty in _PENALTIES:
        inner = full.T @ full + np.diag([1e-9, *np.full(design.shape[1], penalty)])
        hat = full @ np.linalg.solve(inner, full.T)
        errors.append(float((((target - hat @ target) / np.maximum(1 - np.diag(hat), 1e-6)) ** 2).mean()))
    return float(_PENALTIES[int(np.argmin(errors))])


def _out_of_bag(
    design: Floats,
    target: Floats,
    counts: Floats,
    fits: Floats,
    knobs: Sequence[_Knob],
    generator: np.random.Generator,
) -> tuple[float, dict[str, float]]:
    """R2 on points that a resample left out, and what of it is lost if a knob's columns are shuffled."""
    out = counts == 0

    def accuracy(rows: Floats) -> float:
        errors = (np.einsum("si,ni->sn", fits, np.c_[np.ones(len(rows)), rows]) - target) ** 2
        return 1.0 - float(errors[out].mean()) / float(np.tile(target**2, (len(out), 1))[out].mean())

    whole, losses = accuracy(design), dict[str, float]()
    for knob in knobs:
        part, shuffled = _slice(knobs, knob), []
        for _ in range(10):
            rows = design.copy()
            rows[:, part] = rows[generator.permutation(len(rows))][:, part]
            shuffled.append(accuracy(rows))
        losses[knob.name] = max(0.0, whole - sum(shuffled) / len(shuffled))
    return whole, losses
