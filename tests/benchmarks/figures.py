"""From raw samples to what a benchmark claims: medians of interleaved ratios, bars, one table. Pure."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Segment:
    """Consecutive optimizer steps of one contestant, timed by the clock on the wall."""

    steps: int
    seconds: float
    step_seconds: tuple[float, ...] = ()
    helpers_cpu: Mapping[str, float] = field(default_factory=dict)
    """CPU seconds that other processes of the Ray session used meanwhile, by what they are."""

    def tokens_per_second(self, tokens_per_step: int) -> float:
        return self.steps * tokens_per_step / self.seconds


@dataclass(frozen=True)
class Bar:
    """A figure and what it must reach."""

    name: str
    value: float
    limit: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        sign = "at most" if self.at_most else "at least"
        return f"{'ok  ' if self.met else 'MISS'}  {self.name}: {self.value:.3f} ({sign} {self.limit:g})"


@dataclass
class Outcome:
    """What one benchmark found."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    """Every raw sample; JSON-able."""


def paired_ratio(inner: Sequence[float], outer: Sequence[float]) -> list[float]:
    """Ratios of interleaved rates, outer[0] inner[0] outer[1] ... outer[n]: each to the mean of its two neighbours.

    A machine that grows steadily faster or slower cancels out. Raises ValueError if they do not interleave.
    """
    if len(outer) != len(inner) + 1:
        raise ValueError(f"{len(inner)} samples stand between {len(inner) + 1} others, not {len(outer)}")
    return [own / ((left + right) / 2) for own, (left, right) in zip(inner, pairwise(outer), strict=True)]


def growth(small: Mapping[str, float], large: Mapping[str, float]) -> dict[str, float]:
    """Relative growth of each figure that both hold."""
    return {name: large[name] / small[name] - 1 for name in sorted(small.keys() & large.keys()) if small[name]}


def table(outcome: Outcome) -> str:
    """Columns as wide as their widest cell, numbers to the right."""
    cells = [[_cell(value) for value in row] for row in outcome.rows]
    widths = [max(len(row[i]) for row in [list(outcome.columns), *cells]) for i in range(len(outcome.columns))]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [list(outcome.columns), *cells]
    ]
    bars = [str(bar) for bar in outcome.bars]
    notes = [f"note: {note}" for note in outcome.notes]
    return "\n".join([f"\n=== {outcome.title}", lines[0], "-" * len(lines[0]), *lines[1:], *bars, *notes])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return str(value)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest."""
    return median(values), min(values), max(values)


def write_record(outcome: Outcome, *, what: str, folder: Path, machine: Mapping[str, Any], settings: Any) -> Path:
    """`<date>-<what>.json` with everything needed to judge the figures."""
    record = {
        "benchmark": what,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **machine,
        "settings": settings,
        "bars": [{**asdict(bar), "met": bar.met} for bar in outcome.bars],
        "columns": list(outcome.columns),
        "rows": [list(row) for row in outcome.rows],
        "notes": outcome.notes,
        "samples": outcome.samples,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y-%m-%d')}-{what}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
