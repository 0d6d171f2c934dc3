"""Load a run record into plain values, whatever state the run is in.

A run that is still going, was interrupted or failed has only part of its files, and perhaps a torn last line. All of
that loads: what is missing is empty, what cannot be read is named in `RunRecord.remarks`. Repeated work is resolved as
the record defines it: the highest attempt of a stage counts, and inside it the last line of a step.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage

Matrix = list[list[float | None]]
Interval = tuple[float, float]
_STAGE_FOLDER = re.compile(r"^(\d+)-(.+)$")
_MARKS = ("run.json", "config.yaml", "metrics.jsonl")


@dataclass(frozen=True)
class Sample:
    """What the model wrote after a stage, given the prompt of a domain."""

    domain: str
    prompt: str
    text: str


@dataclass(frozen=True)
class StageRecord:
    """One stage: its result if it ended, and the steps it took."""

    index: int
    name: str
    attempt: int = 0
    finished: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    """`stage.json`, empty before the stage has ended."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Lines of `metrics.jsonl` that count, by step."""
    samples: list[Sample] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens trained on in this stage so far, replay included."""
        logged = self.steps[-1].get("tokens") if self.steps else None
        return int(logged or self.info.get("tokens") or 0)


@dataclass(frozen=True)
class Scores:
    """The score matrix: one row per stage that has been evaluated (`base` first), one column per domain."""

    domains: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    bits_per_byte: Matrix = field(default_factory=list)
    perplexity: Matrix = field(default_factory=list)
    loss: Matrix = field(default_factory=list)
    """Nats per token."""
    forgetting: dict[str, Any] = field(default_factory=dict)
    """`per_domain`, `mean`, `max` in bits per byte; positive means worse than before."""
    backward_transfer: float | None = None
    forward_transfer: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, Any] = field(default_factory=dict)

    def interval(self, *path: str | int) -> Interval | None:
        """The (low, high) pair at this place of `intervals`, if there is one."""
        value: Any = self.intervals
        for part in path:
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and isinstance(part, int) and -len(value) <= part < len(value):
                value = value[part]
            else:
                return None
        return as_interval(value)

    def column(self, domain: str) -> list[float | None]:
        """Bits per byte of one domain after each stage."""
        if domain not in self.domains:
            return []
        at = self.domains.index(domain)
        return [row[at] if at < len(row) else None for row in self.bits_per_byte]


@dataclass(frozen=True)
class RunRecord:
    """Everything a report says about a run."""

    uri: str
    name: str
    run: dict[str, Any]
    """`run.json`."""
    config_text: str
    config: dict[str, Any]
    plan: list[dict[str, Any]]
    stages: list[StageRecord]
    base: StageRecord
    scores: Scores
    remarks: list[str]
    """What was missing or unreadable, in words."""
    control: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Lines of `control.jsonl` that count, by stage and step."""

    @property
    def outcome(self) -> str:
        return str(self.run.get("outcome") or "unknown")

    def new_domains(self, stage_index: int) -> list[str]:
        """Domains that a stage trains on for its own sake (not as replay)."""
        stages = self.config.get("stages") or []
        if stage_index < len(stages):
            return [str(name) for name in (stages[stage_index].get("domains") or {})]
        names: dict[str, None] = {}
        for segment in self.plan:
            if segment.get("stage_index") == stage_index:
                replay = segment.get("replay") or []
                names.update(dict.fromkeys(name for name in segment.get("weights") or {} if name not in replay))
        return list(names)

    @property
    def domains(self) -> list[str]:
        """All domains in the order of the score matrix, then any others that the record mentions."""
        names = dict.fromkeys(self.scores.domains)
        names.update(dict.fromkeys(self.run.get("data") or {}))
        for stage in self.stages:
            for line in stage.steps:
                names.update(dict.fromkeys(key[11:] for key in line if key.startswith("train/loss/")))
        return list(names)


def as_storage(folder: Storage | str | Path) -> Storage:
    return folder if isinstance(folder, Storage) else Storage(str(folder))


def load_run(folder: Storage | str | Path) -> RunRecord:
    """Read the run record in `folder`.

    Raises:
        ConfigError: there is no run record at all in this folder.
    """
    folder = as_storage(folder)
    if not any(folder.exists(mark) for mark in _MARKS):
        raise ConfigError(_not_a_run(folder))
    remarks: list[str] = []
    run = _object(folder, remarks, "run.json")
    config_text = _text(folder, "config.yaml") or ""
    config = _parse_yaml(config_text, remarks)
    stages = _load_stages(folder, _jsonl(folder, remarks, "metrics.jsonl"), config, remarks)
    base = _load_base(folder, remarks)
    scores = _scores(_object(folder, remarks, "scores.json", needed=False), base, stages, config)
    name = run.get("name") or config.get("name") or folder.uri.rstrip("/").rsplit("/", 1)[-1]
    plan = _jsonl(folder, remarks, "plan.jsonl")
    control = _counting(_jsonl(folder, remarks, "control.jsonl"))
    return RunRecord(folder.uri, str(name), run, config_text, config, plan, stages, base, scores, remarks, control)


def as_interval(value: Any) -> Interval | None:
    """A (low, high) pair written as a list of two numbers or as an object, else None."""
    if isinstance(value, dict):
        value = [value.get("low"), value.get("high")]
    if isinstance(value, list | tuple) and len(value) == 2 and all(number(part) is not None for part in value):
        return float(value[0]), float(value[1])
    return None


def number(value: Any) -> float | None:
    """A finite number, or None for everything else (NaN, null, text)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _not_a_run(folder: Storage) -> str:
    parent_uri, _, _name = folder.uri.rstrip("/").rpartition("/")
    message = f"run={folder.uri!r} holds no run record (none of {', '.join(_MARKS)})"
    try:
        parent = Storage(parent_uri)
        runs = [name for name in parent.list() if any(parent.exists(name, mark) for mark in _MARKS)]
    except (OSError, ValueError):
        runs = []
    if runs:
        return f"{message}; runs beside it: {', '.join(runs[:12])}{', ...' if len(runs) > 12 else ''}"
    return f"{message}; list the runs with `ls STORAGE` (storage defaults to ./runs) and name one of those folders"


# --- files -----------------------------------------------------------------------------------------------------


def _text(folder: Storage, *parts: str) -> str | None:
    return folder.read_bytes(*parts).decode("utf-8", errors="replace") if folder.exists(*parts) else None


def _object(folder: Storage, remarks: list[str], *parts: str, needed: bool = True) -> dict[str, Any]:
    text = _text(folder, *parts)
    if text is None:
        if needed:
            remarks.append(f"{'/'.join(parts)} is missing")
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        remarks.append(f"{'/'.join(parts)} cannot be read: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _jsonl(folder: Storage, remarks: list[str], *parts: str) -> list[dict[str, Any]]:
    lines, torn = [], 0
    for line in (_text(folder, *parts) or "").splitlines():
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            torn += 1
            continue
        if isinstance(value, dict):
            lines.append(value)
    if torn:
        remarks.append(f"{'/'.join(parts)} has {torn} torn line{'s' if torn > 1 else ''}, left out")
    return lines


def _parse_yaml(text: str, remarks: list[str]) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        remarks.append(f"config.yaml cannot be read: {error}")
        return {}
    return value if isinstance(value, dict) else {}


# --- stages ----------------------------------------------------------------------------------------------------


def _counting(lines: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The lines that count, by stage index: highest attempt, then the last line of each step, in order of steps."""
    attempts: dict[int, int] = {}
    steps: dict[int, dict[int, dict[str, Any]]] = {}
    for line in lines:
        index, attempt, step = line.get("stage_index"), line.get("attempt", 0), line.get("step")
        if not isinstance(index, int) or not isinstance(step, int) or not isinstance(attempt, int):
            continue
        if attempt > attempts.get(index, -1):
            attempts[index], steps[index] = attempt, {}
        if attempt == attempts[index]:
            steps[index][step] = line
    return {index: [steps[index][step] for step in sorted(steps[index])] for index in sorted(steps)}


def _load_stages(
    folder: Storage, lines: list[dict[str, Any]], config: dict[str, Any], remarks: list[str]
) -> list[StageRecord]:
    counting = _counting(lines)
    names = {index: str(stage.get("name")) for index, stage in enumerate(config.get("stages") or [])}
    names.update({index: str(steps[-1].get("stage", index)) for index, steps in counting.items()})
    stages: dict[int, StageRecord] = {}
    for directory in folder.list("stages"):
        match = _STAGE_FOLDER.match(directory)
        if match is None:
            continue
        info = _object(folder, remarks, "stages", directory, "stage.json", needed=False)
        index = info.get("index")
        if not isinstance(index, int):  # not ended yet: find the stage of this name
            known = [place for place, name in names.items() if name == match[2] and place not in stages]
            index = known[0] if known else int(match[1])
        steps = counting.get(index, [])
        attempt = steps[-1].get("attempt", 0) if steps else info.get("attempt", 0)
        samples = _samples(folder, remarks, "stages", directory)
        stages[index] = StageRecord(index, match[2], attempt, bool(info), info, steps, samples)
    for index, steps in counting.items():
        if index not in stages:
            stages[index] = StageRecord(index, names[index], steps[-1].get("attempt", 0), steps=steps)
    return [stages[index] for index in sorted(stages)]


def _load_base(folder: Storage, remarks: list[str]) -> StageRecord:
    """The model before any training; its folder stands beside the stages or among them."""
    for parts in (("base",), ("stages", "base")):
        info = _object(folder, remarks, *parts, "stage.json", needed=False)
        samples = _samples(folder, remarks, *parts)
        if info or samples:
            return StageRecord(-1, "base", finished=bool(info), info=info, samples=samples)
    return StageRecord(-1, "base")


def _samples(folder: Storage, remarks: list[str], *parts: str) -> list[Sample]:
    text = _text(folder, *parts, "samples.json")
    if text is None:
        return []
    try:
        rows = json.loads(text)
    except ValueError as error:
        remarks.append(f"{'/'.join(parts)}/samples.json cannot be read: {error}")
        return []
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [Sample(*(str(row.get(key, "")) for key in ("domain", "prompt", "text"))) for row in rows]


# --- scores ----------------------------------------------------------------------------------------------------


def _scores(written: dict[str, Any], base: StageRecord, stages: list[StageRecord], config: dict[str, Any]) -> Scores:
    """The score matrix of `scores.json`, or what the ended stages say if they are ahead of it."""
    ended = [stage for stage in (base, *stages) if stage.finished and stage.info.get("scores")]
    rows = written.get("bits_per_byte") or []
    if rows and len(rows) >= len(ended):
        return Scores(
            domains=[str(name) for name in written.get("domains") or []],
            stages=[str(name) for name in written.get("stages") or []],
            bits_per_byte=_matrix(rows),
            perplexity=_matrix(written.get("perplexity") or []),
            loss=_matrix(written.get("loss") or []),
            forgetting=written.get("forgetting") or {},
            backward_transfer=number(written.get("backward_transfer")),
            forward_transfer=_forward(written.get("forward_transfer")),
            intervals=written.get("intervals") or {},
        )
    domains = dict.fromkeys(str(name) for stage in config.get("stages") or [] for name in stage.get("domains") or {})
    for stage in ended:
        domains.update(dict.fromkeys(stage.info["scores"]))
    domains = {name: None for name in domains if any(name in stage.info["scores"] for stage in ended)}

    def table(key: str) -> Matrix:
        return [[number((stage.info["scores"].get(name) or {}).get(key)) for name in domains] for stage in ended]

    return Scores(
        domains=list(domains),
        stages=[stage.name for stage in ended],
        bits_per_byte=table("bits_per_byte"),
        perplexity=table("perplexity"),
        loss=table("loss"),
        forgetting=_forgetting(ended[-1].info.get("forgetting") or {}) if ended else {},
    )


def _matrix(rows: list[Any]) -> Matrix:
    return [[number(value) for value in row] for row in rows if isinstance(row, list)]


def _forward(value: Any) -> dict[str, float | None]:
    return {str(name): number(part) for name, part in value.items()} if isinstance(value, dict) else {}


def _forgetting(per_domain: dict[str, Any]) -> dict[str, Any]:
    known = [value for value in map(number, per_domain.values()) if value is not None]
    if not known:
        return {}
    return {"per_domain": per_domain, "mean": sum(known) / len(known), "max": max(known)}
