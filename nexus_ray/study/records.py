"""What the parts of a study share: points of the space, trials, what they report, and the objectives.

A **point** is one setting of the searched knobs. A **trial** is a point with a seed: seeds are replicates, never
knobs. Two trials of equal seed read the same data in the same order (common random numbers), so that points are
compared seed by seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]

Status = Literal["planned", "running", "paused", "finished", "stopped", "failed"]
"""`paused`: waits at a rung with its checkpoint and may go on. `stopped`: ended early by the judge. `failed`: recorded
with its reason, never run again unless asked."""


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Point:
    """One setting of the searched knobs: config values by dotted path; a knob whose condition fails is absent.

    A knob that sets several config values, or the order of the stages, stands by its name with its option's label.
    """

    params: Mapping[str, Value]

    @cached_property
    def id(self) -> str:
        """Eight hex digits of the content; equal settings are one point, whichever searcher proposed them."""
        return hashlib.sha256(canonical(dict(self.params)).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Objectives:
    """What a trial is judged by, at one evaluation."""

    new: float
    """Score of the domains learned so far: mean negated bits per byte on held-out text; higher is better."""
    forgetting: float
    """Largest loss of an earlier domain or anchor in bits per byte since its best score; lower is better."""
    cost: float
    """Training operations spent so far (FLOPs); lower is better."""


@dataclass(frozen=True)
class Report:
    """One evaluation of a trial."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens trained on, replay included."""
    objectives: Objectives
    signals: Mapping[str, float] = field(default_factory=dict)
    """Early signals, such as `grad_norm`, that rules may read."""


@dataclass(frozen=True)
class RungDecision:
    """What the judge answered to one trial at one rung, or later for its point (`promoted`)."""

    rung: int
    """From 0."""
    verdict: Literal["continued", "paused", "promoted", "stopped"]
    reason: str


@dataclass(frozen=True)
class Trial:
    """A point with a seed, and what became of it."""

    point: Point
    seed: int
    status: Status = "planned"
    reports: tuple[Report, ...] = ()
    """In order of steps; the last one of a finished trial is at the full budget."""
    reason: str | None = None
    """Why it paused, stopped or failed."""
    decisions: tuple[RungDecision, ...] = ()
    """In order of time."""

    @property
    def id(self) -> str:
        return f"{self.point.id}-s{self.seed}"

    @property
    def final(self) -> Objectives | None:
        """Objectives at the full budget; None unless the trial finished."""
        return self.reports[-1].objectives if self.status == "finished" and self.reports else None


def mean_objectives(many: Sequence[Objectives]) -> Objectives:
    """The mean over replicates."""
    count = len(many)
    return Objectives(
        sum(one.new for one in many) / count,
        sum(one.forgetting for one in many) / count,
        sum(one.cost for one in many) / count,
    )
