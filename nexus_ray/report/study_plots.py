"""Drawings of a study: parallel coordinates, effects of knobs, learning curves and laws, in the manner of `plots.py`.

Every mark can be reached with the keyboard and says in words what it shows; the page has a table beside each drawing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from nexus_ray.report.plots import Chart, Series, colour_class, line_chart, short, tick_labels, ticks
from nexus_ray.study.advice import Laws
from nexus_ray.study.effects import KnobEffect
from nexus_ray.study.laws import Fitted
from nexus_ray.study.records import Value, canonical
from nexus_ray.study.replicates import is_number

_TOP, _BOTTOM, _SIDE = 40, 26, 70


@dataclass(frozen=True)
class Axis:
    """One upright axis of the parallel coordinates."""

    name: str
    values: tuple[Value, ...]
    """All values on it; numbers are scaled (logarithmically if positive and a factor of ten apart), others listed."""
    upside_down: bool = False
    """Put low values at the top, because they are better."""

    @property
    def numeric(self) -> bool:
        return all(is_number(value) for value in self.values)

    def place(self, value: Value) -> float:
        """0 at the bottom, 1 at the top."""
        if not self.numeric:
            names = [canonical(item) for item in self.values]
            return 0.5 if len(names) == 1 else names.index(canonical(value)) / (len(names) - 1)
        low, high, here = min(self._scaled), max(self._scaled), self._scale(float(value))  # type: ignore[arg-type]
        at = 0.5 if high == low else (here - low) / (high - low)
        return 1 - at if self.upside_down else at

    def labels(self) -> list[tuple[float, str]]:
        if not self.numeric:
            return [(self.place(value), str(value)) for value in self.values]
        numbers = sorted({float(value) for value in self.values})  # type: ignore[arg-type]
        shown = numbers if len(numbers) <= 6 else [numbers[0], *self._between(numbers), numbers[-1]]
        return [(self.place(value), label) for value, label in zip(shown, tick_labels(shown), strict=True)]

    def _between(self, numbers: Sequence[float]) -> list[float]:
        inner = [x for x in ticks(numbers[0], numbers[-1], 4) if numbers[0] < x < numbers[-1]]
        return [
            x for x in inner if all(abs(self.place(x) - self.place(end)) > 0.08 for end in (numbers[0], numbers[-1]))
        ]

    @property
    def _log(self) -> bool:
        numbers = [float(value) for value in self.values]  # type: ignore[arg-type]
        return min(numbers) > 0 and max(numbers) / min(numbers) >= 10

    def _scale(self, value: float) -> float:
        return math.log(value) if self._log else value

    @property
    def _scaled(self) -> list[float]:
        return [self._scale(float(value)) for value in self.values]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Line:
    """One point of the space across all axes."""

    values: Mapping[str, Value]
    """By axis name; an axis that it lacks is passed below."""
    tip: str
    colour: int = -1
    style: str = "faint"
    """`faint`, `front`, `wins` or `stopped` (several, separated by spaces)."""
    axes: int | None = None
    """Draw it over so many axes only: a point that never finished has no final objectives."""


def parallel(title: str, axes: Sequence[Axis], lines: Sequence[Line], note: str, *, width: int = 940) -> Markup:
    """Parallel coordinates as a `<figure>`: one upright axis per knob and objective, one line per point."""
    height = 330
    bottom = height - _BOTTOM - 24  # below it: where a knob is absent
    xs = np.linspace(_SIDE, width - _SIDE, len(axes)) if len(axes) > 1 else np.array([width / 2])

    def y(axis: Axis, line: Line) -> float:
        if axis.name not in line.values:
            return height - _BOTTOM
        return bottom - axis.place(line.values[axis.name]) * (bottom - _TOP)

    body, labels = [], []
    for x, axis in zip(xs, axes, strict=True):
        body.append(f'<line class="pole" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        body.append(f'<text class="name" x="{x:.1f}" y="{_TOP - 16}" text-anchor="middle">{escape(axis.name)}</text>')
        for at, label in axis.labels():
            here = bottom - at * (bottom - _TOP) + 3.5
            labels.append(f'<text class="tick" x="{x - 6:.1f}" y="{here:.1f}" text-anchor="end">{escape(label)}</text>')
        if any(axis.name not in line.values for line in lines if line.axes is None):
            labels.append(
                f'<text class="tick" x="{x - 6:.1f}" y="{height - _BOTTOM + 4}" text-anchor="end">none</text>'
            )
    for line in sorted(lines, key=lambda item: ("front" in item.style) + 2 * ("wins" in item.style)):
        places = list(zip(xs, axes, strict=True))[: line.axes]
        path = "M" + "L".join(f"{x:.1f} {y(axis, line):.1f}" for x, axis in places)
        body.append(
            f'<g class="series {line.style} {colour_class(line.colour)}" tabindex="0" role="img" '
            f'aria-label="{escape(line.tip)}" data-tip="{escape(line.tip)}">'
            f'<path class="seen" d="{path}"/><path class="hit" d="{path}"/></g>'
        )
    return _figure("parallel", title, note, width, height, [*body, *labels])


def dots(effect: KnobEffect, *, title: str, note: str, colour: int, better: str) -> Markup:
    """Means by level of a knob with their intervals, as a `<figure>`."""
    width, height, left, right, top = 460, 190, 58, 16, 16
    levels, bottom = effect.levels, height - 26
    edges = [x for level in levels for x in (level.mean, *(level.interval or ()))]
    pad = (max(edges) - min(edges)) * 0.1 or 0.1
    low, high = min(edges) - pad, max(edges) + pad

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    body = []
    marks = ticks(low, high, 4)
    for tick, label in zip(marks, tick_labels(marks), strict=True):
        body.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        body.append(f'<text class="tick" x="{left - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{label}</text>')
    step = (width - left - right) / len(levels)
    for place, level in enumerate(levels):
        x = left + (place + 0.5) * step
        label = short(float(level.value)) if is_number(level.value) else str(level.value)  # type: ignore[arg-type]
        said = "no interval" if level.interval is None else f"95 % [{level.interval[0]:.4f}, {level.interval[1]:.4f}]"
        tip = f"{effect.knob}={label}\n{level.mean:.4f}, {said}\n{level.points} points"
        body.append(
            f'<g class="series {colour_class(colour)}" tabindex="0" role="img" aria-label="{escape(tip)}" '
            f'data-tip="{escape(tip)}">'
        )
        if level.interval:
            ends = [y(edge) for edge in level.interval]
            body.append(f'<path class="whisker" d="M{x:.1f} {ends[0]:.1f}L{x:.1f} {ends[1]:.1f}"/>')
        body.append(f'<circle cx="{x:.1f}" cy="{y(level.mean):.1f}" r="5"/></g>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>')
    return _figure("dots", title, f"{note} ({better})", width, height, body)


def _figure(kind: str, title: str, note: str, width: int, height: int, body: Sequence[str]) -> Markup:
    svg = Markup('<svg viewBox="0 0 {} {}" role="group" aria-label="{}">{}</svg>').format(
        width, height, title, Markup("".join(body))
    )
    return Markup('<figure class="chart {}"><figcaption><b>{}</b> <span>{}</span></figcaption>{}</figure>').format(
        kind, title, note, svg
    )


def law_charts(laws: Laws, *, unit: str) -> list[Markup]:
    """Both laws over the replay ratio, one line per measured budget, the measured means as dots."""
    titles = ((laws.new, "Loss on the new domain"), (laws.forgetting, "Forgetting of the old domain"))
    return [_law_chart(fitted, title, unit) for fitted, title in titles]


def _law_chart(fitted: Fitted, title: str, unit: str) -> Markup:
    settings, series = fitted.settings, []
    ratios = np.linspace(0.0, max(0.01, float(settings.ratio.max()) * 1.2), 81)
    for colour, budget in enumerate(sorted(set(settings.tokens.tolist()))):
        here = settings.tokens == budget
        budgets = np.full(len(ratios), budget)
        marks = list(zip(settings.ratio[here].tolist(), settings.value[here].tolist(), strict=True))
        low, high = np.quantile(fitted.drawn(budgets, ratios), [0.025, 0.975], axis=0)
        curve, name = fitted.curve(budgets, ratios), f"{short(budget)} tokens"
        series.append(Series(name, ratios.tolist(), curve.tolist(), colour, marks=marks))
        for edge, values in (("lower", low), ("upper", high)):
            series.append(Series(f"{name}, {edge} 95 %", ratios.tolist(), values.tolist(), colour, "faint"))
    note = f"{unit}; law: {fitted.law.formula}; dots: measured means over seeds"
    return line_chart(Chart(title, series, (), note, x_label="replay ratio"))
