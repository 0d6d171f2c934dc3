"""Write `report.html`: one self-contained page about a run, made from its record alone.

The page loads nothing: style, drawings and the little script for tooltips are inside it, and a content security policy
forbids everything else. All text of the record (samples, names, attributions) is escaped by the template engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nexus_ray.report import control, curves, summary, synthetic
from nexus_ray.report.plots import COLOURS, line_chart
from nexus_ray.report.record import RunRecord, Scores, StageRecord, as_storage, load_run, number
from nexus_ray.storage import Storage
from nexus_ray.tracking import redact_text

MAX_PLAN_ROWS = 200
"""Segments of the plan shown on the page; `plan.jsonl` has them all."""


@dataclass(frozen=True)
class Cell:
    """One cell of the heat map."""

    bits: str = ""
    perplexity: str = ""
    loss: str = ""
    delta: str = ""
    """Change against the best earlier score, bits per byte; empty in the first row."""
    shade: str = ""
    """Style declaration of the background."""
    trained: bool = False
    tip: str = ""


@dataclass(frozen=True)
class HeatRow:
    stage: str
    cells: list[Cell]


def write_report(folder: Storage | str | Path) -> str:
    """Write `report.html` into a run's folder and return its path.

    Raises:
        ConfigError: there is no run record in this folder.
    """
    folder = as_storage(folder)
    folder.write_text(render_report(load_run(folder)), "report.html")
    return str(folder.local_path / "report.html") if folder.is_local else f"{folder.uri.rstrip('/')}/report.html"


def render_report(record: RunRecord) -> str:
    """The page as text."""
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            record=record,
            title=record.name,
            headline=summary.headline(record),
            stories=summary.stories(record),
            cards=summary.cards(record),
            started=when(record.run.get("started")),
            finished=when(record.run.get("finished")),
            heat=heat_map(record, shade_scale(record)),
            held_out=line_chart(curves.held_out(record)) if record.scores.domains else None,
            charts=[line_chart(control.marked(record, chart)) for chart in curves.training(record)]
            if record.stages
            else [],
            controlled=[line_chart(chart) for chart in control.charts(record)],
            actions=control.actions(record),
            mixtures=mixtures(record),
            samples=sample_grid(record),
            lineage=lineage(record),
            jobs=synthetic.jobs(record),
            plan=record.plan[:MAX_PLAN_ROWS],
            plan_hidden=max(0, len(record.plan) - MAX_PLAN_ROWS),
            gates=gates(record),
            stage_rows=stage_rows(record),
            config=redact_text(record.config_text),
            facts=facts(record),
            colour={name: place % COLOURS for place, name in enumerate(record.domains)},
        )
    )


@cache
def environment() -> jinja2.Environment:
    """Templates of the package; every value is escaped unless it is marked as safe."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("nexus_ray.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["count"] = lambda value: summary.count(number(value))
    made.filters["whole"] = lambda value: "–" if number(value) is None else f"{value:,.0f}"
    made.filters["duration"] = lambda value: summary.duration(number(value))
    made.filters["share"] = lambda value: "–" if number(value) is None else f"{value:.1%}"
    made.globals["asset"] = _asset
    return made


def _asset(name: str) -> Markup:
    """A file of the package as it stands, for the inside of a style or script element."""
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def when(value: Any) -> str:
    """A time of the record (unix seconds or ISO text), in UTC."""
    if (seconds := number(value)) is not None:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return str(value)[:19].replace("T", " ") if value else ""


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, text) of every leaf of a nested value; empty objects have none."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flat(part, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, float):
        yield prefix, f"{value:.6g}"
    else:
        yield prefix, redact_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


# --- the score matrix --------------------------------------------------------------------------------------------


def shade_scale(*records: RunRecord) -> tuple[float, float]:
    """The gain and the loss (bits per byte) that get the darkest shades: the largest of all matrices, at least 0.1."""
    known = [value for record in records for row in _deltas(record.scores) for value in row if value is not None]
    return max([0.1, *(-value for value in known)]), max([0.1, *known])


def heat_map(record: RunRecord, largest: tuple[float, float]) -> list[HeatRow]:
    """Rows of the score matrix, shaded by the change against the best earlier score of the same domain.

    `largest`: the gain and the loss in bits per byte that get the darkest shades.
    """
    scores, deltas = record.scores, _deltas(record.scores)
    trained = {stage.name: set(record.new_domains(stage.index)) for stage in record.stages}
    rows = []
    for row, stage in enumerate(scores.stages):
        cells = [
            _cell(scores, row, column, deltas[row][column], largest, domain in trained.get(stage, ()))
            for column, domain in enumerate(scores.domains)
        ]
        rows.append(HeatRow(stage, cells))
    return rows


def _deltas(scores: Scores) -> list[list[float | None]]:
    columns = range(len(scores.domains))
    return [[_delta(scores, row, column) for column in columns] for row in range(len(scores.stages))]


def _at(matrix: list[list[float | None]], row: int, column: int) -> float | None:
    return matrix[row][column] if row < len(matrix) and column < len(matrix[row]) else None


def _best_before(scores: Scores, row: int, column: int) -> tuple[float, str] | None:
    earlier = [(_at(scores.bits_per_byte, at, column), scores.stages[at]) for at in range(row)]
    return min(((value, stage) for value, stage in earlier if value is not None), default=None)


def _delta(scores: Scores, row: int, column: int) -> float | None:
    now, best = _at(scores.bits_per_byte, row, column), _best_before(scores, row, column)
    return None if now is None or best is None else now - best[0]


def _cell(
    scores: Scores, row: int, column: int, delta: float | None, largest: tuple[float, float], trained: bool
) -> Cell:
    bits = _at(scores.bits_per_byte, row, column)
    if bits is None:
        return Cell(tip="not evaluated")
    perplexity, loss = _at(scores.perplexity, row, column), _at(scores.loss, row, column)
    stage, domain = scores.stages[row], scores.domains[column]
    interval = scores.interval("bits_per_byte", row, column) or scores.interval("bits_per_byte", stage, domain)
    tip = [f"{domain} after {stage}" + (" (trained here)" if trained else ""), f"{bits:.4f} bits per byte"]
    if interval:
        tip[-1] += f", 95 % interval {summary.span(interval, 4)}"
    if perplexity is not None and loss is not None:
        tip.append(f"perplexity {perplexity:,.1f} per token, {loss:.4f} nats per token")
    best, shade, change = _best_before(scores, row, column), "", ""
    if delta is not None and best is not None:
        tip.append(f"{delta:+.4f} against the best before ({best[0]:.4f} after {best[1]})")
        strength = min(1.0, abs(delta) / largest[delta > 0]) ** 0.7 * 76
        shade = f"background:color-mix(in oklab,var(--{'bad' if delta > 0 else 'good'}) {strength:.0f}%,var(--cell))"
        change = f"{'+' if delta > 0 else '−'}{abs(delta):.3f}"
    return Cell(
        bits=f"{bits:.3f}",
        perplexity="–" if perplexity is None else f"{perplexity:,.4g}" if perplexity < 1000 else f"{perplexity:,.0f}",
        loss="–" if loss is None else f"{loss:.3f}",
        delta=change,
        shade=shade,
        trained=trained,
        tip="\n".join(tip),
    )


# --- tables ------------------------------------------------------------------------------------------------------


def mixtures(record: RunRecord) -> list[dict[str, Any]]:
    """Per stage, the share of rows that the plan takes from each domain."""
    out = []
    for stage in record.stages:
        rows: dict[str, float] = {}
        replay: set[str] = set()
        key = (stage.index, stage.attempt)
        mine = [part for part in record.plan if (part.get("stage_index"), part.get("attempt", 0)) == key]
        for segment, taken in control.effective_rows(mine):
            weights = segment.get("weights") or {}
            replay |= set(segment.get("replay") or ())
            whole = sum(weights.values()) or 1
            for name, weight in weights.items():
                rows[name] = rows.get(name, 0.0) + weight / whole * taken
        if total := sum(rows.values()):
            parts = [(name, value / total, name in replay) for name, value in rows.items() if value]
            out.append({"stage": stage.name, "parts": parts})
    return out


def sample_grid(record: RunRecord) -> dict[str, Any]:
    """Continuations by domain (rows) and stage (columns)."""
    columns: list[StageRecord] = [stage for stage in (record.base, *record.stages) if stage.samples]
    names = dict.fromkeys(sample.domain for stage in columns for sample in stage.samples)
    rows = []
    for name in names:
        found = [next((sample for sample in stage.samples if sample.domain == name), None) for stage in columns]
        prompt = next((sample.prompt for sample in found if sample), "")
        rows.append({"domain": name, "prompt": prompt, "texts": [_continuation(sample) for sample in found]})
    names_of = ["before any training" if stage.index < 0 else f"after {stage.name}" for stage in columns]
    return {"stages": names_of, "rows": rows}


def _continuation(sample: Any) -> str | None:
    if sample is None:
        return None
    return sample.text[len(sample.prompt) :] if sample.prompt and sample.text.startswith(sample.prompt) else sample.text


def lineage(record: RunRecord) -> list[dict[str, Any]]:
    """One row per domain: where its text came from and what became of it."""
    rows = []
    for name, data in (record.run.get("data") or {}).items():
        stats = data.get("stats") or {}
        dropped = {key: stats.get(key) for key in ("exact_duplicates", "empty_dropped", "tokens_dropped")}
        source = data.get("source")
        rows.append(
            {
                "domain": name,
                "source": redact_text(source if isinstance(source, str) else json.dumps(source, ensure_ascii=False)),
                **{key: data.get(key) or "–" for key in ("license", "attribution", "train", "held_out")},
                **{key: data.get(key) for key in ("documents", "tokens", "held_out_documents")},
                **dropped,
            }
        )
    return rows


def gates(record: RunRecord) -> dict[str, Any]:
    """What the forgetting gate found after each stage that it looked at."""
    rows = [(stage.name, dict(flat(stage.info["gate"]))) for stage in record.stages if stage.info.get("gate")]
    return {"keys": list(dict.fromkeys(key for _, found in rows for key in found)), "rows": rows}


def stage_rows(record: RunRecord) -> list[dict[str, Any]]:
    """One row per stage: what it took."""
    keys = ("kind", "seconds", "train_seconds", "time_to_first_step", "world_size", "replay_fraction")
    return [
        {
            "name": stage.name,
            "state": "done" if stage.finished else "not ended",
            "attempt": stage.attempt,
            "steps": stage.steps[-1]["step"] if stage.steps else stage.info.get("steps"),
            "tokens": stage.tokens,
            "trainable_parameters": stage.info.get("trainable_parameters"),
            **{key: stage.info.get(key) for key in keys},
        }
        for stage in record.stages
    ]


def facts(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything that identifies the run, as groups of (name, value)."""
    run = record.run
    commit = f"{run.get('commit') or 'unknown'}{' (with uncommitted changes)' if run.get('dirty') else ''}"
    identity = {"name": record.name, "folder": record.uri, "fingerprint": run.get("fingerprint"), "commit": commit}
    identity |= {f"seeds.{key}": value for key, value in (run.get("seeds") or {}).items()}
    groups = {"Identity": identity}
    groups |= {key.capitalize(): run.get(key) or {} for key in ("versions", "hardware", "model", "tokenizer")}
    return [(title, list(flat(values))) for title, values in groups.items() if values]
