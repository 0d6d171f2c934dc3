"""Laws of replay: loss on the new domain and forgetting of the old as functions of budget and replay ratio.

Fitted to the ends of runs of one model, at several budgets and ratios (a loss in the middle of a run is not that of a
shorter run: its learning rate has not come down). The forms are in `law_forms.py`.

What is and is not recoverable: within the measured range, and a little beyond, predictions are; single parameters
mostly are not, as E trades against B and b wherever D spans less than a decade (two budgets leave a whole family). So
a weak prior (`Prior`) holds each parameter where published laws have it, the bootstrap redraws the prior along with
the data, and what the data leave open shows as a wide interval instead of a wild guess. `Fitted.parameters` says which
parameters are determined; a prediction is what a fit is for, with its interval and a warning outside what was measured.

Legend: P parameters, M settings (budget, ratio), S draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nexus_ray.errors import DataError
from nexus_ray.study.fitting import Fits, fit
from nexus_ray.study.law_forms import LAWS, Law, Quantity
from nexus_ray.study.replicates import Floats

STARTS = 96
DRAWS = 200
HUBER_DELTA = 0.01
"""Residuals beyond 1 % of the value (of the value and a twentieth of the range, for forgetting) count linearly."""
PRIOR_SCATTER = 0.005
"""Relative error of a setting that weighs as much as a parameter one standard deviation from its prior."""
MIN_SCATTER = 0.001
"""Relative scatter that is assumed even where a law goes through every setting."""
MIN_RATIOS, MIN_SETTINGS = 3, 4
"""Fewest replay ratios, and settings of ratio and budget, that a law is fitted to: fewer do not tell a curve from a
line."""
_REFITS = 3
"""Starts of each draw, so that equally good fits elsewhere are found too."""
_REACH = 5.0
"""Standard deviations around its prior that a parameter may have."""


@dataclass(frozen=True)
class Measurement:
    """The end of one run."""

    tokens: float
    """Tokens of the stage, replay included."""
    ratio: float
    """Share of them that was replay, 0 to 1."""
    new: float
    """Loss on the new domain, in any unit in which lower is better."""
    old: float
    """Loss on the old one in the same unit, or forgetting itself (with `base_old` 0)."""
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """Means over seeds of one quantity, by budget and ratio: what a law is fitted to. All arrays [M]."""

    tokens: Floats
    ratio: Floats
    value: Floats
    error: Floats
    """Standard error of the mean over seeds; 0 with one seed."""

    floor: float
    """Added to the size of a value where residuals are measured against it: forgetting may pass through zero."""

    @property
    def scale(self) -> Floats:
        """What a residual is measured against."""
        return np.abs(self.value) + self.floor

    def without(self, drop: Floats) -> Settings:
        """The settings where `drop` [M] is false."""
        keep = ~np.asarray(drop, dtype=bool)
        return Settings(self.tokens[keep], self.ratio[keep], self.value[keep], self.error[keep], self.floor)


@dataclass(frozen=True)
class Parameter:
    name: str
    value: float
    interval: tuple[float, float]
    """95 % of the draws, prior included."""
    determined: bool
    """Whether the data narrowed it to less than half of its prior's spread."""


@dataclass(frozen=True)
class Prediction:
    """What one run is expected to measure."""

    value: float
    interval: tuple[float, float]
    """95 %: what the law leaves open and the scatter around it."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """A law with the parameters that fit."""

    law: Law
    unit: float
    """Tokens by which budgets are divided."""
    level: float
    """What amplitudes are multiplied with."""
    theta: Floats
    """[P] transformed, see `Law.curve`."""
    draws: Floats = field(repr=False)
    """[S, P] of the bootstrap."""
    scatter: float
    """Standard deviation of the residuals over their scale."""
    settings: Settings = field(repr=False)

    def curve(self, tokens: Floats, ratio: Floats) -> Floats:
        """The law at budgets and ratios, [M]."""
        return self._at(self.theta[None], tokens, ratio)[0]

    def drawn(self, tokens: Floats, ratio: Floats) -> Floats:
        """The same for every draw of the bootstrap, [S, M]."""
        return self._at(self.draws, tokens, ratio)

    def _at(self, theta: Floats, tokens: Floats, ratio: Floats) -> Floats:
        return self.level * self.law.curve(theta, np.asarray(tokens) / self.unit, np.asarray(ratio))

    def predict(self, tokens: float, ratio: float) -> Prediction:
        """The value expected of a run of `tokens` at `ratio`."""
        at = np.array([tokens]), np.array([ratio])
        drawn = self.drawn(*at)[:, 0]
        noise = np.random.default_rng([len(drawn), 1]).normal(size=len(drawn))
        found = np.quantile(drawn + noise * self.scatter * (np.abs(drawn) + self.settings.floor), [0.025, 0.975])
        warnings = outside(self.settings, tokens, ratio)
        return Prediction(float(self.curve(*at)[0]), (float(found[0]), float(found[1])), tuple(warnings))

    def parameters(self) -> list[Parameter]:
        """Each parameter with its interval, and whether the data say anything about it."""
        out = []
        for at, (name, prior) in enumerate(self.law.priors.items()):
            low, high = np.quantile(self.draws[:, at], [0.025, 0.975])
            low, value, high = (
                float(x if prior.signed else np.exp(x)) * (self.level if prior.amplitude else 1.0)
                for x in (low, self.theta[at], high)
            )
            narrowed = float(self.draws[:, at].std()) < prior.spread / 2
            out.append(Parameter(name, value, (low, high), narrowed))
        return out


def settings_of(measurements: Sequence[Measurement], quantity: Quantity, base_old: float = 0.0) -> Settings:
    """Means over seeds by (tokens, ratio), in order. `base_old`: the old domain's loss before the stage.

    Raises:
        DataError: a value is not a finite number, or a budget or ratio is out of range.
    """
    cells: dict[tuple[float, float], list[float]] = {}
    for m in measurements:
        value = m.new if quantity == "new" else m.old - base_old
        if not np.isfinite([m.tokens, m.ratio, value]).all() or m.tokens <= 0 or not 0 <= m.ratio <= 1:
            raise DataError(
                f"law of {quantity}: a run of {m.tokens} tokens at replay ratio {m.ratio} has the value {value}; "
                f"budgets are positive, ratios in [0, 1] and losses finite; leave failed runs out"
            )
        cells.setdefault((m.tokens, m.ratio), []).append(value)
    rows = sorted(
        (*key, np.mean(v), np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0) for key, v in cells.items()
    )
    table = np.array(rows, dtype=float).reshape(-1, 4)
    floor = 0.05 * float(np.ptp(table[:, 2])) if quantity == "forgetting" else 0.0
    tokens, ratio, mean, error = table.T
    return Settings(tokens, ratio, mean, error, floor)


def fit_law(name: str, settings: Settings, *, draws: int = DRAWS, seed: int = 0) -> Fitted:
    """Fit one of `LAWS`, from `STARTS` starts, with a bootstrap.

    Each draw moves every setting around the fit by the larger of the scatter and the error of its mean over seeds,
    moves the prior within its own spread, and fits again from the best fit and from random starts: draws of the
    posterior by randomised maximisation (Bardsley et al. 2014). With `draws` 0 there is the best fit alone.

    Raises:
        DataError: fewer than three ratios or four settings: no curve can be told from a line; or all values are 0.
    """
    law, number = LAWS[name], len(settings.value)
    if not settings.scale.all():
        raise DataError(f"law {name!r}: {law.of} is 0 at every budget and ratio, so there is nothing to fit")
    if len(set(settings.ratio.tolist())) < MIN_RATIOS or number < MIN_SETTINGS:
        raise DataError(
            f"law {name!r}: {number} settings with {len(set(settings.ratio.tolist()))} replay ratios; at least four "
            f"settings with three ratios are needed, better five ratios at each of two budgets"
        )
    unit = float(np.exp(np.log(settings.tokens).mean()))
    level = float(settings.value.min() if law.of == "new" else np.abs(settings.value).max()) or 1.0
    generator = np.random.default_rng([seed, number])
    centre, spread = law.centre()
    starts = generator.normal(centre, spread, size=(STARTS, len(centre)))
    theta = _fit(law, settings, unit, level, starts, settings.value, centre).best()
    fitted = level * law.curve(theta[None], settings.tokens / unit, settings.ratio)[0]
    residual = (fitted - settings.value) / settings.scale
    scatter = max(float(np.sqrt((residual**2).sum() / max(1, number - 3))), MIN_SCATTER)
    if not draws:
        return Fitted(law, unit, level, theta, theta[None], scatter, settings)
    size = np.maximum(scatter * settings.scale, settings.error)
    targets = fitted + size * generator.normal(size=(draws, number))
    centres = generator.normal(centre, spread, size=(draws, len(centre)))
    starts = np.stack([np.tile(theta, (draws, 1)), centres, generator.normal(centre, spread, centres.shape)], axis=1)
    repeated = [np.repeat(part, _REFITS, axis=0) for part in (targets, centres)]
    found = _fit(law, settings, unit, level, starts.reshape(-1, len(centre)), *repeated)
    best = found.losses.reshape(draws, _REFITS).argmin(axis=1)
    drawn = found.parameters.reshape(draws, _REFITS, -1)[np.arange(draws), best]
    return Fitted(law, unit, level, theta, drawn, scatter, settings)


def _fit(
    law: Law, settings: Settings, unit: float, level: float, starts: Floats, target: Floats, centre: Floats
) -> Fits:
    """Huber's loss of the scaled residuals, the parameters' distances from the prior counting as further residuals."""
    budget, (mean, spread) = settings.tokens / unit, law.centre()
    weight = PRIOR_SCATTER / spread

    def curve(theta: Floats) -> Floats:
        values = level * law.curve(theta, budget, settings.ratio) / settings.scale
        return np.concatenate([values, theta * weight], axis=1)

    goal = np.concatenate([target / settings.scale, centre * weight], axis=-1)
    box = np.stack([mean - _REACH * spread, mean + _REACH * spread], axis=1)
    return fit(curve, starts, goal, np.ones(goal.shape[-1]), box, delta=HUBER_DELTA)


def outside(settings: Settings, tokens: float, ratio: float) -> list[str]:
    """Plain words on how far a setting lies outside the fitted ones; empty inside."""
    words, (low, high) = [], (settings.tokens.min(), settings.tokens.max())
    if low == high and tokens != low:
        words.append(f"all fitted runs have {low:,.0f} tokens: this fit says nothing about {tokens:,.0f}")
    elif tokens > high:
        words.append(f"{tokens:,.0f} tokens are {tokens / high:.3g} times the longest fitted budget ({high:,.0f})")
    elif tokens < low:
        words.append(f"{tokens:,.0f} tokens are {tokens / low:.3g} of the shortest fitted budget ({low:,.0f})")
    low, high = settings.ratio.min(), settings.ratio.max()
    if ratio > high:
        words.append(f"replay ratio {ratio:.3g} is {ratio - high:.3g} above the highest fitted ({high:.3g})")
    elif ratio < low:
        words.append(f"replay ratio {ratio:.3g} is {low - ratio:.3g} below the lowest fitted ({low:.3g})")
    return words
