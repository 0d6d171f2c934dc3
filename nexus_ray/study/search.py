"""What to try next: every combination, random points, or proposals learned from what was scored.

Invariant: a searcher has no state. What it proposes is a function of its settings and of the history handed in, which
is the study's own record; so a resumed study goes on as an undisturbed one would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

from nexus_ray.config.study import NewUnderForgetting, OptunaSearch, StudyConfig, Weighted
from nexus_ray.study.records import Objectives, Point
from nexus_ray.study.space import Space

MOST_MISSES = 1_000
"""Samples in a row that repeat earlier points, after which a finite space is gone through in order."""


@dataclass(frozen=True)
class Seen:
    """A point proposed before and what is known of it."""

    point: Point
    index: int
    """The `Proposal.index` it came with."""
    levels: tuple[Objectives | None, ...] = ()
    """Mean over its replicates at each rung and, last, at the full budget; None where not all of them were."""
    ended: bool = False
    """No more will be known of it: finished, stopped, or failed."""
    note: Mapping[str, Any] = field(default_factory=dict)
    """The `Proposal.note` it came with."""


@dataclass(frozen=True)
class Proposal:
    """A point to try, never one that was proposed before."""

    point: Point
    index: int
    """Number of the draw, from 0; draws that repeated earlier points are counted."""
    note: Mapping[str, Any] = field(default_factory=dict)
    """What the searcher wants to find in the record with this point (plain data)."""


class Searcher(Protocol):
    """Proposes points."""

    def ask(self, history: Sequence[Seen]) -> Proposal | None:
        """The next point; None if there is none. `history`: all points proposed so far, in that order."""

    def total(self, history: Sequence[Seen]) -> int:
        """Points that the study will have in all."""


@dataclass(frozen=True)
class Grid:
    """Every combination in the space's fixed order; those in the history are left out."""

    space: Space

    def ask(self, history: Sequence[Seen]) -> Proposal | None:
        known = {seen.point.id for seen in history}
        points = enumerate(self._points)
        return next((Proposal(point, index) for index, point in points if point.id not in known), None)

    def total(self, history: Sequence[Seen]) -> int:
        return len({point.id for point in self._points} | {seen.point.id for seen in history})

    @cached_property
    def _points(self) -> list[Point]:
        return list(self.space.grid())


@dataclass(frozen=True)
class Random:
    """The samples of a seed in order; those that repeat earlier points are passed over."""

    space: Space
    trials: int
    seed: int

    def ask(self, history: Sequence[Seen]) -> Proposal | None:
        if len(history) >= self.total(history):
            return None
        return first_new(self.space, self.seed, 1 + max((seen.index for seen in history), default=-1), history)

    def total(self, history: Sequence[Seen]) -> int:
        return points_at_most(self.space, self.trials, history)


def first_new(space: Space, seed: int, index: int, history: Sequence[Seen]) -> Proposal | None:
    """The first sample from `index` on that is none of the history's points; None if a finite space has no more."""
    known = {seen.point.id for seen in history}
    for number in range(index, index + MOST_MISSES):
        point = space.sample(seed, number)
        if point.id not in known:
            return Proposal(point, number)
    left = (point for point in space.every() if point.id not in known) if space.is_countable else iter(())
    return next((Proposal(point, index + MOST_MISSES) for point in left), None)


def points_at_most(space: Space, trials: int, history: Sequence[Seen]) -> int:
    """`trials`, or fewer in a finite space that has fewer points besides those of the history."""
    wanted = max(0, trials - len(history))
    if not space.is_countable:
        return len(history) + wanted
    known = {seen.point.id for seen in history}
    return len(history) + sum(1 for _ in islice((p for p in space.every() if p.id not in known), wanted))


def searcher(config: StudyConfig, space: Space) -> Searcher:
    """The searcher that a study asks for. Raises ConfigError if Optuna is asked for and not installed."""
    search = config.search
    if search.kind == "grid":
        return Grid(space)
    if search.kind == "random":
        return Random(space, search.trials, search.seed)
    return _optuna(search, space, config.objective)


def _optuna(search: OptunaSearch, space: Space, objective: NewUnderForgetting | Weighted) -> Searcher:
    from nexus_ray.study.optuna_search import Optuna

    return Optuna(space, search, objective)
