"""What a study's laws are good for: the ratio for a longer budget, and how far to trust it.

Between the laws of one quantity the one that predicts settings left out best is used; that is said, and the measured
error beside the plain baseline (the nearest measured setting) is part of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nexus_ray.errors import DataError
from nexus_ray.evaluate.bootstrap import interval
from nexus_ray.study.law_forms import LAWS, Quantity
from nexus_ray.study.laws import (
    DRAWS,
    MIN_RATIOS,
    MIN_SETTINGS,
    Fitted,
    Measurement,
    Settings,
    fit_law,
    outside,
    settings_of,
)
from nexus_ray.study.replicates import Floats

MAX_RATIO = 0.9
_RATIOS = np.linspace(0.0, MAX_RATIO, 361)


@dataclass(frozen=True)
class Tested:
    """One setting that the fit did not see."""

    tokens: float
    ratio: float
    measured: float
    predicted: float
    nearest: float
    """What the nearest fitted setting had measured: the baseline."""
    covered: bool | None
    """Whether the prediction's interval holds it; None where none was made."""


@dataclass(frozen=True)
class HeldOut:
    """Predictions of settings that a fit did not see. Relative errors are shares of the measured value."""

    rows: tuple[Tested, ...]
    error: float
    """Mean absolute relative error."""
    interval: tuple[float, float] | None
    """95 %, settings resampled; None for a single one."""
    baseline: float
    """The same error of the nearest measured setting."""
    absolute: float
    """Mean absolute error; the one to read for forgetting near zero."""


@dataclass(frozen=True)
class Laws:
    """The two laws of a study, each the better one at predicting settings left out."""

    new: Fitted
    forgetting: Fitted
    new_error: HeldOut | None
    """Each ratio left out in turn, at all budgets; None where too few would be left."""
    forgetting_error: HeldOut | None


@dataclass(frozen=True)
class Advice:
    """The replay ratio for a budget."""

    tokens: float
    max_forgetting: float
    ratio: float | None
    """The best for the new domain among those whose expected forgetting keeps the bound; None if there is none."""
    interval: tuple[float, float] | None
    """95 % over the draws of both laws that find one; None if fewer than half do."""
    found: float
    """Share of the draws in which any ratio keeps the bound."""
    new: float | None
    forgetting: float | None
    """Expected at that ratio."""
    warnings: tuple[str, ...]


def fit_laws(measurements: Sequence[Measurement], *, base_old: float = 0.0, draws: int = DRAWS, seed: int = 0) -> Laws:
    """Fit all laws and keep the better one of each quantity, by the error at ratios left out; where none can be left
    out, the one of fewer parameters, whose error nobody knows.

    Raises:
        DataError: too few settings, see `fit_law`.
    """
    chosen: dict[Quantity, tuple[Fitted, HeldOut | None]] = {}
    for quantity in ("new", "forgetting"):
        settings = settings_of(measurements, quantity, base_old)
        names = [law.name for law in LAWS.values() if law.of == quantity]
        if any(_is_enough(settings.without(settings.ratio == ratio)) for ratio in settings.ratio):
            errors = {name: left_out(name, settings, by="ratio") for name in names}
            best = min(names, key=lambda name: errors[name].absolute)
            chosen[quantity] = (fit_law(best, settings, draws=draws, seed=seed), errors[best])
        else:
            simple = min(names, key=lambda name: len(LAWS[name].priors))
            chosen[quantity] = (fit_law(simple, settings, draws=draws, seed=seed), None)
    return Laws(chosen["new"][0], chosen["forgetting"][0], chosen["new"][1], chosen["forgetting"][1])


def left_out(name: str, settings: Settings, *, by: Literal["ratio", "tokens"]) -> HeldOut:
    """Each ratio (or budget) in turn predicted from the others; those at the ends are extrapolated, and count.

    What leaves too little to fit is skipped.

    Raises:
        DataError: nothing can be left out.
    """
    column = settings.ratio if by == "ratio" else settings.tokens
    rows: list[Tested] = []
    for value in sorted(set(column.tolist())):
        kept, left = settings.without(column == value), settings.without(column != value)
        if _is_enough(kept):
            rows += _tested(fit_law(name, kept, draws=0), left, intervals=False)
    if not rows:
        raise DataError(
            f"law {name!r}: no {by} can be left out of {len(settings.value)} settings; measure at least four ratios, "
            f"better at two budgets"
        )
    return _held_out(rows)


def _is_enough(settings: Settings) -> bool:
    return len(set(settings.ratio.tolist())) >= MIN_RATIOS and len(settings.value) >= MIN_SETTINGS


def held_out(fitted: Fitted, settings: Settings) -> HeldOut:
    """A fit against settings it has not seen, such as those of a third, longer budget."""
    return _held_out(_tested(fitted, settings, intervals=True))


def _tested(fitted: Fitted, settings: Settings, *, intervals: bool) -> list[Tested]:
    rows = []
    for tokens, ratio, measured in zip(settings.tokens, settings.ratio, settings.value, strict=True):
        expected = fitted.predict(float(tokens), float(ratio))
        low, high = expected.interval
        covered = bool(low <= measured <= high) if intervals else None
        nearest = _nearest(fitted.settings, float(tokens), float(ratio))
        rows.append(Tested(float(tokens), float(ratio), float(measured), expected.value, nearest, covered))
    return rows


def _nearest(settings: Settings, tokens: float, ratio: float) -> float:
    """Value of the measured setting of the nearest budget and, there, the nearest ratio."""
    budgets = np.abs(np.log(settings.tokens / tokens))
    place = np.lexsort((np.abs(settings.ratio - ratio), budgets))[0]
    return float(settings.value[place])


def _held_out(rows: Sequence[Tested]) -> HeldOut:
    measured = np.array([row.measured for row in rows])
    size = np.maximum(np.abs(measured), 1e-9)
    errors = np.abs(np.array([row.predicted for row in rows]) - measured)
    baseline = np.abs(np.array([row.nearest for row in rows]) - measured)
    return HeldOut(
        tuple(rows),
        float((errors / size).mean()),
        _spread(errors / size),
        float((baseline / size).mean()),
        float(errors.mean()),
    )


def _spread(errors: Floats) -> tuple[float, float] | None:
    if len(errors) < 2:
        return None
    places = np.random.default_rng([len(errors)]).integers(len(errors), size=(2000, len(errors)))
    return interval(errors[places].mean(axis=1))


def best_ratio(laws: Laws, *, tokens: float, max_forgetting: float) -> Advice:
    """The ratio of the lowest expected loss on the new domain whose expected forgetting keeps the bound.

    Ratios up to `MAX_RATIO` are looked at, also beyond the fitted ones; a warning says so, and by how far.
    """
    budgets = np.full(len(_RATIOS), tokens)
    new, lost = laws.new.curve(budgets, _RATIOS), laws.forgetting.curve(budgets, _RATIOS)
    place = _choose(new, lost, max_forgetting)
    many = zip(laws.new.drawn(budgets, _RATIOS), laws.forgetting.drawn(budgets, _RATIOS), strict=True)
    drawn = [_RATIOS[at] for n, f in many if (at := _choose(n, f, max_forgetting)) is not None]
    found = len(drawn) / len(laws.new.draws)
    ratio = None if place is None else float(_RATIOS[place])
    warnings = outside(
        laws.forgetting.settings, tokens, float(laws.forgetting.settings.ratio.max()) if ratio is None else ratio
    )
    if ratio is None:
        warnings.append(f"no replay ratio up to {MAX_RATIO} is expected to keep forgetting below {max_forgetting:g}")
    elif found < 0.95:
        warnings.append(f"in {1 - found:.0%} of the draws no ratio keeps the bound")
    return Advice(
        tokens,
        max_forgetting,
        ratio,
        interval(np.array(drawn)) if found >= 0.5 else None,
        found,
        None if place is None else float(new[place]),
        None if place is None else float(lost[place]),
        tuple(warnings),
    )


def _choose(new: Floats, lost: Floats, bound: float) -> int | None:
    able = np.flatnonzero(lost <= bound)
    return int(able[new[able].argmin()]) if len(able) else None
