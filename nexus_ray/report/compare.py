"""Several runs side by side: a table in the terminal and a self-contained page. Runs may differ in anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nexus_ray.errors import ConfigError
from nexus_ray.report import curves, summary
from nexus_ray.report.page import environment, heat_map, shade_scale
from nexus_ray.report.plots import Chart, Point, Series, line_chart, scatter, smooth
from nexus_ray.report.record import RunRecord, as_storage, load_run, number
from nexus_ray.storage import Storage
from nexus_ray.tracking import flatten, redact_text

_OWN = ("name", "storage")
"""Config paths that differ by nature and change no number."""
_MISSING = "–"
_TERMINAL_DIFFERENCES = 40
"""Config differences shown in the terminal; the page has them all."""


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a cell per run."""

    group: str
    label: str
    cells: list[str]
    best: frozenset[int] = frozenset()
    """Places of the best runs in this line."""


def compare_runs(
    folders: Sequence[Storage | str | Path], out: str | Path | None = None, *, console: Console | None = None
) -> str:
    """Print the comparison, write it as a page, and return the page's path.

    `out`: where the page goes; default `compare.html` in the storage of the first run.

    Raises:
        ConfigError: no run is given, or a folder holds no run record.
    """
    if not folders:
        raise ConfigError("compare needs at least one run folder; list the runs with `ls STORAGE` (by default ./runs)")
    records = [load_run(folder) for folder in folders]
    rows = comparison(records)
    printer = console or Console()
    per_table = max(1, (printer.width - 30) // 16)
    for start in range(0, len(records), per_table):
        printer.print(terminal_table(labels(records), rows, range(start, min(start + per_table, len(records)))))
        printer.print()
    hidden = sum(row.group == "config" for row in rows) - _TERMINAL_DIFFERENCES
    if hidden > 0:
        printer.print(f"{hidden} more config differences on the page", style="dim")
    page = render_comparison(records, rows)
    if out is None:
        parent = Storage(as_storage(folders[0]).uri.rstrip("/").rpartition("/")[0])
        parent.write_text(page, "compare.html")
        return f"{parent.uri}/compare.html"
    target = Path(out).absolute()
    Storage(str(target.parent)).write_text(page, target.name)
    return str(target)


def labels(records: Sequence[RunRecord]) -> list[str]:
    """A name per run; runs of the same name are numbered."""
    names = [record.name for record in records]
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [f"{name} ({at})" if names.count(name) > 1 else name for name, at in zip(names, counts, strict=True)]


def comparison(records: Sequence[RunRecord]) -> list[Row]:
    """All lines: outcome, forgetting, learning, speed, bits per byte by domain, config differences."""
    done = [record.outcome == "done" for record in records]
    rows = [Row("result", "outcome", [_outcome(record) for record in records])]
    for which in ("mean", "max"):
        found = [summary.forgetting_overall(record.scores, which) for record in records]
        cells = [_with_interval(value, interval) for value, interval in found]
        rows.append(Row("result", f"{which} forgetting", cells, _lowest([value for value, _ in found], done)))
    fresh = [summary.new_domain_score(record) for record in records]
    rows.append(Row("result", "newest domain", [_figure(value) for value in fresh], _lowest(fresh, done)))
    gains = [summary.mean_gain(record) for record in records]
    best = _lowest([_negated(value) for value in gains], done)
    rows.append(Row("result", "gained per stage", [_figure(value) for value in gains], best))
    speeds = [summary.tokens_per_second(record) for record in records]
    best = _lowest([_negated(value) for value in speeds], done)
    rows.append(Row("result", "tokens/s", [summary.count(value) for value in speeds], best))
    totals = [sum(stage.tokens for stage in record.stages) for record in records]
    rows.append(Row("result", "tokens", [summary.count(total) for total in totals]))
    for domain in dict.fromkeys(name for record in records for name in record.scores.domains):
        finals = [(record.scores.column(domain) or [None])[-1] for record in records]
        rows.append(Row("final bits per byte", domain, [_figure(value) for value in finals], _lowest(finals, done)))
    return rows + config_differences(records)


def config_differences(records: Sequence[RunRecord]) -> list[Row]:
    """The dotted paths whose values are not the same in all runs."""
    trees = [{path: value for path, value in flatten(record.config).items() if path not in _OWN} for record in records]
    rows = []
    for path in dict.fromkeys(path for tree in trees for path in tree):
        values = [_shown(tree[path]) if path in tree else _MISSING for tree in trees]
        if len(set(values)) > 1:
            rows.append(Row("config", path, values))
    return rows


def terminal_table(names: Sequence[str], rows: Sequence[Row], places: Sequence[int]) -> Table:
    """One column for each run at `places`; the best figures of a line are bold."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for place in places:
        table.add_column(Text(names[place]), justify="right", overflow="fold")
    group, differences = "", 0
    for row in rows:
        differences += row.group == "config"
        if differences > _TERMINAL_DIFFERENCES:
            break
        if row.group != group:
            if group:
                table.add_row()
            table.add_row(Text(row.group, style="dim"))
            group = row.group
        cells = [Text(row.cells[place], style="bold green" if place in row.best else "") for place in places]
        table.add_row(Text(f"  {row.label}"), *cells)
    return table


def render_comparison(records: Sequence[RunRecord], rows: Sequence[Row]) -> str:
    """The page as text."""
    names, scale = labels(records), shade_scale(*records)
    loss = Chart("Training loss", _losses(records, names), note="nats per token, smoothed", width=940, height=260)
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            names=names,
            rows=rows,
            records=records,
            heats=[heat_map(record, scale) for record in records],
            learning=scatter(
                "Learning against forgetting",
                _points(records, names),
                x_label="mean forgetting, bits per byte (left is better)",
                y_label="gained in a domain's own stage, bits per byte (up is better)",
                note="whiskers: 95 % intervals of forgetting",
            ),
            loss=line_chart(loss),
        )
    )


# --- cells -------------------------------------------------------------------------------------------------------


def _outcome(record: RunRecord) -> str:
    ended, total = sum(stage.finished for stage in record.stages), len(record.config.get("stages") or record.stages)
    return record.outcome if record.outcome == "done" else f"{record.outcome}, {ended} of {total} stages"


def _figure(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3f}"


def _negated(value: float | None) -> float | None:
    return None if value is None else -value


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    return _figure(value) if interval is None else f"{_figure(value)} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _lowest(values: Sequence[float | None], eligible: Sequence[bool]) -> frozenset[int]:
    """Places of the lowest value among the runs that are done, unless there is nothing to choose between."""
    values = [value if able else None for value, able in zip(values, eligible, strict=True)]
    known = [value for value in values if value is not None]
    if len(known) < 2 or min(known) == max(known):
        return frozenset()
    return frozenset(place for place, value in enumerate(values) if value == min(known))


def _shown(value: Any) -> str:
    text = redact_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else text[:79] + "…"


def _points(records: Sequence[RunRecord], names: Sequence[str]) -> list[Point]:
    points = []
    for place, (record, name) in enumerate(zip(records, names, strict=True)):
        (lost, interval), gain = summary.forgetting_overall(record.scores, "mean"), summary.mean_gain(record)
        if lost is not None and gain is not None:
            tip = f"{name}\nforgot {_with_interval(lost, interval)}\ngained {gain:.3f}"
            points.append(Point(name, lost, gain, place, interval, tip))
    return points


def _losses(records: Sequence[RunRecord], names: Sequence[str]) -> list[Series]:
    series = []
    for place, (record, name) in enumerate(zip(records, names, strict=True)):
        xs, ys = curves.series_of(record, "train/loss")
        steps = max((len(stage.steps) for stage in record.stages), default=0)
        if any(number(y) is not None for y in ys):
            series.append(Series(name, xs, smooth(ys, max(1, steps // 30)), place))
    return series
