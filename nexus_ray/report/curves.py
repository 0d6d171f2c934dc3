"""The curves of a run, from its metrics: stages laid end to end on an axis of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nexus_ray.report.plots import Chart, Series, Span, smooth
from nexus_ray.report.record import RunRecord, StageRecord, number


def spans(record: RunRecord) -> list[Span]:
    """Where each stage lies on the axis of tokens."""
    out, start = [], 0
    for stage in record.stages:
        out.append(Span(stage.name, start, start + stage.tokens))
        start += stage.tokens
    return out


def series_of(record: RunRecord, key: str) -> tuple[list[float], list[float]]:
    """All values of one metric over the tokens of the whole run; NaN between stages and where it is not a number."""
    xs: list[float] = []
    ys: list[float] = []
    for stage, span in zip(record.stages, spans(record), strict=True):
        lines = [line for line in stage.steps if key in line and number(line.get("tokens")) is not None]
        if lines and xs:
            xs.append(span.start)
            ys.append(math.nan)
        for line in lines:
            value = number(line[key])
            xs.append(span.start + float(line["tokens"]))
            ys.append(math.nan if value is None else value)
    return xs, ys


def _window(stages: Sequence[StageRecord]) -> int:
    """Points of the smoothing: a fortieth of the median stage."""
    lengths = sorted(len(stage.steps) for stage in stages) or [1]
    return max(1, lengths[len(lengths) // 2] // 40)


def _plain(record: RunRecord, key: str, label: str) -> list[Series]:
    xs, ys = series_of(record, key)
    return [Series(label, xs, ys, 0)]


def _smoothed(record: RunRecord, key: str, label: str) -> list[Series]:
    xs, ys = series_of(record, key)
    window = _window(record.stages)
    if window < 2:
        return [Series(label, xs, ys, 0)]
    return [Series("each step", xs, ys, 0, "faint"), Series(label, xs, smooth(ys, window), 0)]


def held_out(record: RunRecord) -> Chart:
    """Bits per byte of every domain: the full evaluations at the borders, and the small ones during stages."""
    series, sampled = [], False
    for colour, domain in enumerate(record.scores.domains):
        marks = _borders(record, domain)
        xs, ys = series_of(record, f"eval/bits_per_byte/{domain}")
        during = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        known = {x for x, _ in marks}
        points = sorted([*marks, *((x, y) for x, y in during if x not in known)])
        sampled = sampled or bool(during)
        if points:
            series.append(Series(domain, [x for x, _ in points], [y for _, y in points], colour, marks=marks))
    note = "dots: all held-out text; between them a sample of it" if sampled else "lower is better"
    return Chart("Held-out bits per byte of every domain", series, spans(record), note, width=940, height=280)


def _borders(record: RunRecord, domain: str) -> list[tuple[float, float]]:
    places: dict[str, float] = {"base": 0.0} | {span.label: span.end for span in spans(record)}
    scores = zip(record.scores.stages, record.scores.column(domain), strict=False)
    return [(places[name], value) for name, value in scores if value is not None and name in places]


def training(record: RunRecord) -> list[Chart]:
    """Loss, per-domain loss, learning rate, replay share, speed and gradient norm."""
    along = spans(record)
    window = _window(record.stages)
    per_domain = []
    for colour, domain in enumerate(record.domains):
        xs, ys = series_of(record, f"train/loss/{domain}")
        if any(math.isfinite(y) for y in ys):
            per_domain.append(Series(domain, xs, smooth(ys, window), colour))
    smoothing = f"nats per token, mean over about {window} steps" if window > 1 else "nats per token"
    return [
        Chart("Training loss", _smoothed(record, "train/loss", "smoothed"), along, smoothing),
        Chart("Training loss by domain", per_domain, along, smoothing),
        Chart("Learning rate", _plain(record, "train/lr", "learning rate"), along, from_zero=True),
        Chart(
            "Replay share",
            _plain(record, "train/replay_fraction", "replay share"),
            along,
            "of the stage's rows so far",
            from_zero=True,
        ),
        Chart(
            "Throughput",
            _smoothed(record, "perf/tokens_per_second", "smoothed"),
            along,
            "tokens per second",
            from_zero=True,
        ),
        Chart(
            "Gradient norm", _smoothed(record, "train/grad_norm", "smoothed"), along, "before clipping", from_zero=True
        ),
    ]
