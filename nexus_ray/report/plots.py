"""Inline SVG charts for self-contained pages: drawn here, coloured by the page's style sheet, hovered by `charts.js`.

A chart is a `<figure>` with its legend, the drawing, and the points as JSON beside it for the tooltip. Without
JavaScript it is still a complete picture. A series never holds more than `MAX_POINTS` points.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup, escape

MAX_POINTS = 500
COLOURS = 8
"""Distinct series colours of the style sheet (`--c0` ... `--c7`); further series repeat them, dashed."""
_EMPTY = Markup('<figure class="chart empty"><figcaption><b>{}</b></figcaption><p>No data yet.</p></figure>')
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 20, 24


@dataclass(frozen=True)
class Series:
    """One line. `y` may hold NaN, which breaks it. `colour` -1 is the neutral ink."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    style: str = "line"
    """`line` or `faint` (behind the others)."""
    marks: Sequence[tuple[float, float]] = ()
    """Points that are marked with a dot."""
    quiet: bool = False
    """Leave it out of the legend and the tooltip."""


@dataclass(frozen=True)
class Span:
    """A stage on the x axis."""

    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Chart:
    title: str
    series: Sequence[Series]
    spans: Sequence[Span] = ()
    note: str = ""
    x_label: str = "tokens"
    width: int = 460
    height: int = 220
    from_zero: bool = False
    """Let the y axis start at 0."""


@dataclass(frozen=True)
class Point:
    """One mark of a scatter plot, with optional intervals along x and y."""

    label: str
    x: float
    y: float
    colour: int = 0
    x_interval: tuple[float, float] | None = None
    tip: str = ""
    y_interval: tuple[float, float] | None = None
    hollow: bool = False


@dataclass(frozen=True)
class _Scale:
    """From data to the drawing's coordinates."""

    x0: float
    x1: float
    y0: float
    y1: float
    width: int
    height: int
    y_ticks: list[float] = field(default_factory=list)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self.height - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (self.height - _TOP - _BOTTOM)


# --- numbers ---------------------------------------------------------------------------------------------------


def lttb(x: np.ndarray, y: np.ndarray, limit: int) -> np.ndarray:
    """Indices of at most `limit` (>= 3) points that keep the look of a curve, its first and last among them.

    Largest-triangle-three-buckets (Steinarsson 2013): of each bucket, the point that spans the largest triangle with
    the point kept before and the mean of the next bucket.
    """
    if len(x) <= limit:
        return np.arange(len(x))
    edges = np.linspace(1, len(x) - 1, limit - 1).astype(int)
    kept = [0]
    for bucket in range(limit - 2):
        start, stop = edges[bucket], edges[bucket + 1]
        after = slice(stop, edges[bucket + 2] if bucket + 2 < len(edges) else len(x))
        ax, ay, cx, cy = x[kept[-1]], y[kept[-1]], x[after].mean(), y[after].mean()
        area = np.abs((ax - cx) * (y[start:stop] - ay) - (ax - x[start:stop]) * (cy - ay))
        kept.append(start + int(area.argmax()))
    return np.array([*kept, len(x) - 1])


def downsample(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `limit` points of a curve; a gap (a run of non-finite values) stays, as one NaN."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    finite = np.isfinite(xs) & np.isfinite(ys)
    starts = np.flatnonzero(finite & ~np.r_[False, finite[:-1]])
    ends = np.flatnonzero(finite & ~np.r_[finite[1:], False]) + 1
    pieces = list(zip(starts, ends, strict=True))[: limit // 4]
    room = limit - max(0, len(pieces) - 1)
    shared, total = room - 3 * len(pieces), int(finite.sum())
    out_x: list[float] = []
    out_y: list[float] = []
    for start, end in pieces:
        if out_x:
            out_x.append(float(xs[start]))
            out_y.append(math.nan)
        kept = start + lttb(xs[start:end], ys[start:end], 3 + shared * int(end - start) // total)
        out_x += xs[kept].tolist()
        out_y += ys[kept].tolist()
    return out_x, out_y


def smooth(y: Sequence[float], window: int) -> list[float]:
    """Exponential mean over about `window` points, unbiased from the first one on; NaN breaks and restarts it."""
    decay, mean, weight, out = 1 - 1 / max(window, 1), 0.0, 0.0, []
    for value in y:
        if not math.isfinite(value):
            mean = weight = 0.0
            out.append(math.nan)
            continue
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(mean / weight)
    return out


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(step * place, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Ticks in words: short, but with as many digits as tell them apart and say where they are."""
    distinct = sorted(set(values))
    gap = min((above - below for below, above in pairwise(distinct)), default=math.inf)
    for digits in range(4, 12):
        found = [short(value, digits) for value in values]
        if all(abs(value - _read(text)) <= gap / 20 for value, text in zip(values, found, strict=True)):
            return found
    return found


def _read(text: str) -> float:
    scale = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}.get(text[-1], 1.0)
    return float(text.rstrip("TBMk")) * scale


def short(value: float, digits: int = 4) -> str:
    """A number for an axis: 12k, 3.5M, 0.002."""
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.{digits}g}{suffix}"
    if size and size < 1e-3:
        return f"{value:.{digits - 4}e}".replace("e-0", "e-")
    return f"{value:.{digits}g}"


# --- drawings --------------------------------------------------------------------------------------------------


def _bounds(values: list[float], *, from_zero: bool = False, pad: float = 0.04) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * pad if high > low else abs(high) * 0.1 or 1.0
    return (min(0.0, low) if from_zero else low - margin), high + margin


def _path(scale: _Scale, xs: Sequence[float], ys: Sequence[float]) -> str:
    parts, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            pen = "M"
            continue
        parts.append(f"{pen}{scale.x(x):.1f} {scale.y(y):.1f}")
        pen = "L"
    return "".join(parts)


def _axes(scale: _Scale, x_ticks: Sequence[float], *, grid_x: bool = False) -> list[str]:
    out, right, bottom = [], scale.width - _RIGHT, scale.height - _BOTTOM
    for value, label in zip(scale.y_ticks, tick_labels(scale.y_ticks), strict=True):
        y = scale.y(value)
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for value, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = scale.x(value)
        if grid_x:
            out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{label}</text>')
    return out


def _stage_bands(scale: _Scale, spans: Sequence[Span]) -> list[str]:
    out = []
    for place, span in enumerate(spans):
        left, right = scale.x(span.start), scale.x(span.end)
        room = int((right - left) / 6.2)
        label = span.label if len(span.label) <= room else (span.label[: room - 1] + "…" if room > 3 else "")
        if place % 2:
            out.append(
                f'<rect class="band" x="{left:.1f}" y="{_TOP}" width="{max(0.0, right - left):.1f}" '
                f'height="{scale.height - _TOP - _BOTTOM}"/>'
            )
        if place:
            out.append(
                f'<line class="border" x1="{left:.1f}" x2="{left:.1f}" y1="{_TOP}" y2="{scale.height - _BOTTOM}"/>'
            )
        out.append(
            f'<text class="stage" x="{(left + right) / 2:.1f}" y="{_TOP - 7}" text-anchor="middle">'
            f"{escape(label)}<title>{escape(span.label)}</title></text>"
        )
    return out


def colour_class(colour: int) -> str:
    """Style-sheet classes of a series colour."""
    if colour < 0:
        return "ink"
    return f"c{colour % COLOURS}" + (" dashed" if colour >= COLOURS else "")


def line_chart(chart: Chart) -> Markup:
    """The chart as a `<figure>`; a line saying so if there is nothing to draw."""
    drawn = [(series, *downsample(series.x, series.y)) for series in chart.series]
    drawn = sorted((item for item in drawn if item[1]), key=lambda item: item[0].quiet)
    if not drawn:
        return _EMPTY.format(chart.title)
    every_x = [x for _, xs, _ in drawn for x in xs] + [edge for span in chart.spans for edge in (span.start, span.end)]
    every_y = [y for _, _, ys in drawn for y in ys if math.isfinite(y)]
    x0, x1 = _bounds(every_x, pad=0.0)
    y0, y1 = _bounds(every_y, from_zero=chart.from_zero)
    scale = _Scale(x0, x1, y0, y1, chart.width, chart.height, ticks(y0, y1, 5))
    body = _stage_bands(scale, chart.spans) + _axes(scale, ticks(x0, x1, chart.width // 90))
    for place, (series, xs, ys) in sorted(enumerate(drawn), key=lambda item: item[1][0].style != "faint"):
        body.append(f'<g class="series {series.style} {colour_class(series.colour)}" data-s="{place}">')
        body.append(f'<path d="{_path(scale, xs, ys)}"/>')
        body += [f'<circle cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3.5"/>' for x, y in series.marks]
        body.append("</g>")
    data = {
        "scale": [x0, x1, y0, y1],
        "plot": [_LEFT, _TOP, chart.width - _RIGHT, chart.height - _BOTTOM],
        "unit": chart.x_label,
        "spans": [[span.label, span.start, span.end] for span in chart.spans],
        "series": [
            {"label": series.label, "colour": colour_class(series.colour), "x": _figures(xs, 9), "y": _figures(ys, 5)}
            for series, xs, ys in drawn
            if not series.quiet
        ],
    }
    return _figure(chart, body, [series for series, _, _ in drawn if not series.quiet], data)


def _figures(values: Sequence[float], digits: int) -> list[float | None]:
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]


def _figure(chart: Chart, body: list[str], series: Sequence[Series], data: dict[str, Any]) -> Markup:
    legend = Markup("").join(
        Markup('<button type="button" class="key {}" data-s="{}" aria-pressed="true">{}</button>').format(
            colour_class(item.colour) + (" pale" if item.style == "faint" else ""), place, item.label
        )
        for place, item in enumerate(series)
    )
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        chart.width, chart.height, chart.title, Markup("".join(body))
    )
    payload = Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
    return Markup(
        '<figure class="chart"><figcaption><b>{}</b> <span>{}</span></figcaption><div class="legend">{}</div>{}'
        '<script type="application/json">{}</script></figure>'
    ).format(chart.title, chart.note, legend if len(series) > 1 else "", svg, payload)


def scatter(
    title: str,
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    note: str = "",
    width: int = 940,
    height: int = 340,
    line: Sequence[tuple[float, float]] = (),
    bound: float | None = None,
) -> Markup:
    """Labelled points with intervals, as a `<figure>`. `line` joins points; `bound` is marked on the x axis."""
    points = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not points:
        return _EMPTY.format(title)
    every_x = [x for point in points for x in (point.x, *(point.x_interval or ()))] + [0.0]
    every_y = [y for point in points for y in (point.y, *(point.y_interval or ()))]
    (x0, x1), (y0, y1) = _bounds([*every_x, *([] if bound is None else [bound])], pad=0.1), _bounds(every_y, pad=0.15)
    scale = _Scale(x0, x1, y0, y1, width, height, ticks(y0, y1, 5))
    body = _axes(scale, ticks(x0, x1, 6), grid_x=True)
    zero = scale.x(0.0)
    body.append(f'<line class="border" x1="{zero:.1f}" x2="{zero:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
    if bound is not None:
        at = scale.x(bound)
        body.append(f'<line class="border" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        body.append(f'<text class="stage" x="{at:.1f}" y="{_TOP - 7}" text-anchor="middle">bound {short(bound)}</text>')
    if line:
        body.append(f'<path class="joined" d="{_path(scale, *zip(*line, strict=True))}"/>')
    for point in points:
        body += _mark(scale, point, toward_left=scale.x(point.x) > width * 0.7)
    return Markup(
        '<figure class="chart scatter"><figcaption><b>{}</b> <span>{}</span></figcaption>'
        '<svg viewBox="0 0 {} {}" role="group" aria-label="{}">{}</svg>'
        '<p class="axis">across: {} &nbsp;·&nbsp; up: {}</p></figure>'
    ).format(title, note, width, height, title, Markup("".join(body)), x_label, y_label)


def _mark(scale: _Scale, point: Point, *, toward_left: bool) -> list[str]:
    x, y, out = scale.x(point.x), scale.y(point.y), []
    said = escape(point.tip or point.label)
    out.append(
        f'<g class="series {colour_class(point.colour)}" tabindex="0" role="img" aria-label="{said}" data-tip="{said}">'
    )
    if point.x_interval:
        low, high = (scale.x(edge) for edge in point.x_interval)
        out.append(f'<path class="whisker" d="M{low:.1f} {y:.1f}L{high:.1f} {y:.1f}"/>')
    if point.y_interval:
        low, high = (scale.y(edge) for edge in point.y_interval)
        out.append(f'<path class="whisker" d="M{x:.1f} {low:.1f}L{x:.1f} {high:.1f}"/>')
    out.append(f'<circle{" class=hollow" if point.hollow else ""} cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
    side, anchor = (-10, "end") if toward_left else (10, "start")
    out.append(f'<text x="{x + side:.1f}" y="{y - 7:.1f}" text-anchor="{anchor}">{escape(point.label)}</text></g>')
    return out
