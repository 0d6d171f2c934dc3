"""What a controlled stage's controller saw and did, from `control.jsonl`: curves with marks, and every action."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from nexus_ray.report.curves import spans
from nexus_ray.report.plots import Chart, Series
from nexus_ray.report.record import RunRecord, StageRecord, number


def effective_rows(segments: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """A stage's lines of `plan.jsonl` with the rows of each that count: a later line replaces what stands behind its
    first row."""
    out: list[tuple[dict[str, Any], float]] = []
    stop = math.inf
    for segment in reversed(segments):
        start, rows = number(segment.get("start_row")) or 0.0, number(segment.get("rows")) or 0.0
        out.append((segment, max(0.0, min(rows, stop - start))))
        stop = min(stop, start)
    return out[::-1]


def actions(record: RunRecord) -> list[dict[str, Any]]:
    """Every action in the order of stages and steps: `stage`, `step`, `kind`, `replay_ratio`, `lr_factor`, `reason`."""
    return [
        {"stage": stage.name, **line["action"], "step": line["step"]}
        for stage, _, lines in _controlled(record)
        for line in lines
        if isinstance(line.get("action"), dict)
    ]


def charts(record: RunRecord) -> list[Chart]:
    """Forgetting against its limit, and what was done about it; a dot marks each action. Empty without control."""
    parts = list(_controlled(record))
    if not parts:
        return []
    names = dict.fromkeys(name for _, _, lines in parts for name in lines[0].get("forgetting") or {})
    colours = {name: place for place, name in enumerate(record.domains)}
    forgetting = [_curve(name, parts, ("forgetting", name), colours.get(name, 0), mark=True) for name in names]
    limit = _curve("limit", parts, ("limit",), -1)
    ratio = _curve("replay ratio", parts, ("replay_ratio",), 0, mark=True)
    factor = _curve("learning-rate factor", parts, ("lr_factor",), 1, mark=True)
    along = spans(record)
    note = "bits per byte, on the sample of the evaluations; a dot is an action"
    return [
        Chart("Forgetting under control", [*forgetting, limit], along, note, from_zero=True),
        Chart("What the controller set", [ratio, factor], along, "in force at each evaluation", from_zero=True),
    ]


def marked(record: RunRecord, chart: Chart) -> Chart:
    """A chart over tokens with a dot on its last series at each action."""
    if not chart.series or not (places := [x for _, x, line in _readings(record) if line.get("action")]):
        return chart
    last = chart.series[-1]
    at = dict(zip(last.x, last.y, strict=True))
    dots = [(x, at[x]) for x in places if math.isfinite(at.get(x, math.nan))]
    return replace(chart, series=[*chart.series[:-1], replace(last, marks=[*last.marks, *dots])])


def _controlled(record: RunRecord) -> Iterator[tuple[StageRecord, float, list[dict[str, Any]]]]:
    """(stage, where it starts in tokens, its lines) of each stage with a log of control."""
    for stage, span in zip(record.stages, spans(record), strict=True):
        if lines := record.control.get(stage.index):
            yield stage, span.start, lines


def _readings(record: RunRecord) -> Iterator[tuple[StageRecord, float, dict[str, Any]]]:
    """(stage, tokens of the whole run, line) of each evaluation."""
    for stage, start, lines in _controlled(record):
        tokens = {line["step"]: number(line.get("tokens")) for line in stage.steps}
        for line in lines:
            if (at := tokens.get(line["step"])) is not None:
                yield stage, start + at, line


def _curve(
    label: str,
    parts: Sequence[tuple[StageRecord, float, list[dict[str, Any]]]],
    path: tuple[str, ...],
    colour: int,
    *,
    mark: bool = False,
) -> Series:
    """One value of the log over the tokens of the run; broken between stages."""
    xs: list[float] = []
    ys: list[float] = []
    dots: list[tuple[float, float]] = []
    for stage, start, lines in parts:
        tokens = {line["step"]: number(line.get("tokens")) for line in stage.steps}
        if xs:
            xs.append(start)
            ys.append(math.nan)
        for line in lines:
            at, value = tokens.get(line["step"]), _at(line, path)
            if at is None or value is None:
                continue
            xs.append(start + at)
            ys.append(value)
            if mark and line.get("action"):
                dots.append((start + at, value))
    return Series(label, xs, ys, colour, marks=dots)


def _at(line: dict[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = line
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return number(value)
