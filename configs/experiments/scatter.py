"""Scatter plots of experiments as SVG documents: one dot per arm, with the range of its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 520, 420, 60, 50, 36
INK = "#222222"
COLOURS = (INK, "#1b6ca8", "#c0392b", "#e08e45", "#3c8d40", "#7fb069", "#7d3c98", "#b0a000", "#d16ba5", "#5f6a6a")


@dataclass(frozen=True)
class Dot:
    label: str
    """Beside the dot; may be empty."""
    x: list[float]
    y: list[float]
    """One value per seed."""
    colour: str = INK
    faint: bool = False


Line = tuple[str, list[tuple[float, float]]]
"""Points joined by dashes, in the colour of the dot of that label, or the colour itself."""


def panel(title: str, labels: tuple[str, str], dots: Sequence[Dot], lines: Sequence[Line] = (), left: int = 0) -> str:
    """Means with bars from the lowest to the highest seed; `labels` of the axes; `left`: shift to the right."""
    xs = [x for dot in dots for x in dot.x] + [x for _, line in lines for x, _ in line]
    ys = [y for dot in dots for y in dot.y] + [y for _, line in lines for _, y in line]
    low_x, low_y = min(0.0, *xs), min(ys)
    span_x, span_y = (max(xs) - low_x) * 1.12 or 1.0, (max(ys) - low_y) * 1.1 or 1.0
    low_y -= 0.05 * span_y

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - low_x) / span_x, (y - low_y) / span_y
        return left + LEFT + across * (WIDTH - LEFT - 20), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    colours = {dot.label: dot.colour for dot in dots}
    out = [f'<text x="{left + LEFT}" y="20" font-weight="bold">{title}</text>']
    x0, y0 = at(low_x, low_y)
    x1, y1 = at(low_x + span_x, low_y + span_y)
    out.append(f'<path d="M{x0:.0f} {y1:.0f}V{y0:.0f}H{x1:.0f}" fill="none" stroke="#999"/>')
    for k in range(5):
        tick_x, tick_y = low_x + span_x * k / 4, low_y + span_y * k / 4
        out.append(f'<text x="{at(tick_x, low_y)[0]:.0f}" y="{y0 + 16:.0f}" text-anchor="middle">{tick_x:.2f}</text>')
        out.append(f'<text x="{x0 - 6:.0f}" y="{at(low_x, tick_y)[1] + 4:.0f}" text-anchor="end">{tick_y:.2f}</text>')
    out.append(f'<text x="{x0}" y="{HEIGHT - 12}">{labels[0]}</text>')
    out.append(f'<text x="{x0 + 6}" y="{y1 + 4:.0f}">{labels[1]}</text>')
    for label, line in lines:
        points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in line)
        colour = label if label.startswith("#") else colours.get(label, "#999")
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-dasharray="3 3" opacity="0.7"/>')
    for dot in dots:
        x, y = at(fmean(dot.x), fmean(dot.y))
        (a, b), (c, d) = at(min(dot.x), min(dot.y)), at(max(dot.x), max(dot.y))
        out.append(f'<g opacity="{0.45 if dot.faint else 1}">')
        out.append(f'<path d="M{a:.1f} {y:.1f}H{c:.1f}M{x:.1f} {b:.1f}V{d:.1f}" stroke="{dot.colour}"/>')
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if dot.faint else 4}" fill="{dot.colour}"/></g>')
        out.append(f'<text x="{x + 7:.1f}" y="{y - 5:.1f}" fill="{dot.colour}">{dot.label}</text>')
    return "\n".join(out)


def document(panels: Sequence[str]) -> str:
    """Panels side by side."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * max(1, len(panels))} {HEIGHT}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(panels)
        + "\n</svg>\n"
    )
