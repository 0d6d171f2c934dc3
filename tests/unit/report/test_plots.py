"""Curves keep their look with few points, and drawings are well-formed whatever the numbers."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.report.plots import (
    MAX_POINTS,
    Chart,
    Point,
    Series,
    Span,
    downsample,
    line_chart,
    lttb,
    scatter,
    short,
    smooth,
    tick_labels,
    ticks,
)


def _svg(figure: str) -> ElementTree.Element:
    match = re.search(r"<svg.*?</svg>", figure, re.DOTALL)
    assert match
    return ElementTree.fromstring(match[0])


def _payload(figure: str) -> dict:
    match = re.search(r'<script type="application/json">(.*?)</script>', figure, re.DOTALL)
    assert match
    return json.loads(match[1])


@given(st.integers(1, 3000), st.integers(3, 600))
def test_lttb_keeps_the_ends_and_the_limit(points: int, limit: int) -> None:
    x = np.arange(points, dtype=float)
    kept = lttb(x, np.sin(x), limit)
    assert len(kept) == min(points, limit)
    assert kept[0] == 0 and kept[-1] == points - 1 and (np.diff(kept) > 0).all()


def test_lttb_keeps_a_spike() -> None:
    y = np.zeros(10_000)
    y[4321] = 9.0
    assert 4321 in lttb(np.arange(10_000.0), y, 100)


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf)), max_size=900))
def test_downsample_never_exceeds_the_limit(y: list[float]) -> None:
    xs, ys = downsample(range(len(y)), y, 60)
    assert len(xs) == len(ys) <= 60
    assert all(math.isfinite(x) for x in xs) and not any(math.isinf(value) for value in ys)


def test_downsample_keeps_gaps() -> None:
    y = [1.0] * 1000 + [math.nan] + [2.0] * 1000
    _, ys = downsample(range(len(y)), y)
    assert len(ys) <= MAX_POINTS and sum(math.isnan(value) for value in ys) == 1


def test_smooth_starts_unbiased_and_restarts_after_a_gap() -> None:
    out = smooth([5.0, 5.0, math.nan, 1.0], 10)
    assert out[:2] == pytest.approx([5.0, 5.0]) and math.isnan(out[2]) and out[3] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 9.3, [0, 2, 4, 6, 8]), (-3, 3, [-2, 0, 2])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"), [(12_000, "12k"), (3.5e6, "3.5M"), (0.0005, "5e-4"), (0, "0"), (0.25, "0.25")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_no_two_ticks_read_alike() -> None:
    assert tick_labels([-1.9365, -1.936, -1.9355]) == ["-1.9365", "-1.936", "-1.9355"]
    assert tick_labels([1000.5, 1000.0]) == ["1.0005k", "1k"]
    assert tick_labels([1.04e-4, 1.0e-4]) == ["1.04e-4", "1.00e-4"]
    assert tick_labels([0.0, 0.5]) == ["0", "0.5"] and tick_labels([]) == []


def test_a_chart_draws_its_series_bands_and_data() -> None:
    x = list(range(2000))
    spans = [Span("first & <b>", 0, 1000), Span("second", 1000, 2000)]
    marks = [(0.0, 0.0), (1999.0, 1999.0)]
    figure = line_chart(
        Chart("Loss </script>", [Series("a<b", x, x, 9, marks=marks), Series("c", x, x, 1, "faint")], spans)
    )
    svg = _svg(figure)
    assert len(svg.findall(".//{*}path") or svg.findall(".//path")) == 2
    assert len(svg.findall(".//circle")) == 2
    data = _payload(figure)
    assert [series["label"] for series in data["series"]] == ["a<b", "c"]
    assert all(len(series["x"]) <= MAX_POINTS for series in data["series"])
    assert "first &amp; &lt;b&gt;" in figure and figure.count("</script>") == 1
    assert 'class="series line c1 dashed"' in figure


@pytest.mark.parametrize("y", [[], [math.nan], [math.inf, math.nan]])
def test_a_chart_without_finite_points_says_so(y: list[float]) -> None:
    assert "No data yet" in line_chart(Chart("empty", [Series("a", range(len(y)), y)]))


@pytest.mark.parametrize("y", [[3.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1.0, math.nan, 1e-12], [-1e9, 1e9]])
def test_a_chart_of_odd_values_is_well_formed(y: list[float]) -> None:
    figure = line_chart(Chart("odd", [Series("a", range(len(y)), y)], from_zero=True))
    assert _svg(figure).find(".//path") is not None
    assert "nan" not in figure.lower() and "inf" not in figure.lower()


def test_scatter_draws_points_whiskers_and_escapes() -> None:
    points = [Point("<a>", 0.1, 2.0, 0, (0.0, 0.2), 'say "hi"'), Point("b", 0.4, math.nan)]
    figure = scatter("learning", points, x_label="x", y_label="y")
    assert len(_svg(figure).findall(".//circle")) == 1
    assert "&lt;a&gt;" in figure and "<a>" not in figure and 'class="whisker"' in figure
    assert "No data yet" in scatter("none", [], x_label="x", y_label="y")
