"""Which points go on at a rung: successive halving by promotion, and the median rule. Pure.

Points are judged, not trials: a point has reached a rung once all its replicates that did not fail have, and its merit
there is that of the mean over them, so that every point is compared over the same seeds, and no seed's luck decides.
Rungs are shares of the full budget, whose learning-rate schedule a trial follows from the start.

Why promotion and not stopping. ASHA as Ray and others have it decides when a trial arrives: it goes on if it is among
the best 1 / eta *so far*. At concurrency 1 the first trials have nobody to be worse than and all run to their full
budget, and a bad order costs much. In the original (Li et al. 2020, arXiv:1810.05934, algorithm 2) a trial pauses at
its rung and is promoted later; a run here resumes exactly from its checkpoint, so a pause costs one restart. What
remains of asynchrony are hasty promotions among the few that have arrived. So a point goes on at once only if it is
*sure* of its place, whatever those still to come score; new points start before anything else; and `likely` places are
given out only to keep an idle worker busy. At concurrency 1 that is synchronous halving with no wrong promotion: 24
points at eta 3 with rungs at 1/9 and 1/3 take 24 x 1/9 + 8 x 2/9 + 2 x 2/3 = 5.8 of 24 budgets, whatever the order.
On the recorded curves of 27 runs of configs/experiments/methods (rungs at 0.2 and 0.4, 2,000 random orders) promotion
takes 33 % of the tokens always, stopping 39 % on average and up to 70 %; on 12 runs of configs/experiments/replay 32 %
against 45 % and up to 87 %. Both find the best run, or one within 0.001 bits per byte of it.

There is no population-based training. It lets a trial go on from the weights of a better one with other settings. The
hand-over would be sound here (a stage starts from another's checkpoint by `model.init_from`), but what wins is then a
schedule along a chain of runs and not a point: no config repeats it, its seeds are no replicates, and no two trials
read the same rows. What it is wanted for, settings that change while a stage runs, is what `continual.on_forgetting:
control` does within one run that its plan repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from nexus_ray.config.study import (
    AshaStopping,
    MedianStopping,
    NewUnderForgetting,
    NoStopping,
    Weighted,
    Weights,
    rung_shares,
)
from nexus_ray.study.records import Objectives

Merit = tuple[int, float]
"""Higher is better: 1 if the point keeps within the bound of forgetting, then the score."""
COST_UNIT = 1e15
"""Training operations that `objective.weights.cost` is for."""


def forgetting_bound(objective: NewUnderForgetting | Weighted, *, at_rung: bool) -> float | None:
    """Most bits per byte that a point may forget, looser at a rung by the objective's slack; None without a bound."""
    if objective.kind == "weighted":
        return None
    return objective.max_forgetting * (1 + objective.rung_slack if at_rung else 1)


def weighted(weights: Weights, scores: Objectives) -> float:
    """What a point is worth; higher is better."""
    gain, loss = weights.new * scores.new, weights.forgetting * scores.forgetting
    return gain - loss - weights.cost * scores.cost / COST_UNIT


@dataclass(frozen=True)
class Rung:
    """What is known at one rung."""

    number: int
    merits: Mapping[str, Merit]
    """Of the points that have reached it, by id, in order of arrival."""
    expected: int
    """Points that have reached it or still will."""
    passed: frozenset[str] = frozenset()
    """Points that were let through."""

    @property
    def missing(self) -> int:
        return max(0, self.expected - len(self.merits))

    def ranking(self) -> list[str]:
        """Best first; of equals the one that arrived first."""
        order = {point: place for place, point in enumerate(self.merits)}
        return sorted(self.merits, key=lambda point: (-self.merits[point][0], -self.merits[point][1], order[point]))


@dataclass(frozen=True)
class Verdict:
    """The answer to a point that has just reached a rung."""

    kind: Literal["continued", "paused", "stopped"]
    reason: str


class Judge:
    """The rule of a study."""

    def __init__(
        self, stopping: NoStopping | MedianStopping | AshaStopping, objective: NewUnderForgetting | Weighted
    ) -> None:
        self.stopping = stopping
        self.objective = objective
        self.shares: tuple[Fraction, ...] = rung_shares(stopping)
        """Of the full budget, one per rung."""

    def merit(self, objectives: Objectives, *, at_rung: bool) -> Merit:
        """How good a point is; `at_rung` loosens the bound of forgetting by its slack."""
        rule = self.objective
        if rule.kind == "weighted":
            return 1, weighted(rule.weights, objectives)
        bound = forgetting_bound(rule, at_rung=at_rung)
        assert bound is not None
        return (1, objectives.new) if objectives.forgetting <= bound else (0, -objectives.forgetting)

    def alarm(self, signals: Mapping[str, float]) -> str | None:
        """Why an early signal ends a point at once; None if none does."""
        if self.stopping.rule == "none":
            return None
        for name, limit in self.stopping.max_signal.items():
            if name in signals and not signals[name] <= limit:
                return f"{name}={signals[name]:.6g} is above stopping.max_signal.{name}={limit:g}"
        return None

    def quota(self, expected: int) -> int:
        """How many of the points expected at a rung go on (successive halving); at least one."""
        assert self.stopping.rule == "asha"
        return max(1, expected // self.stopping.eta)

    def arrival(self, rung: Rung, point: str) -> Verdict:
        """The answer to `point`, the last to have reached `rung`."""
        if self.stopping.rule == "median":
            return self._median(rung, point)
        place = rung.ranking().index(point) + 1
        where = f"rank {place} of {len(rung.merits)} so far, {rung.missing} to come"
        if point in self.sure(rung):
            return Verdict("continued", f"{where}: sure of the best {self.quota(rung.expected)}")
        return Verdict("paused", where)

    def _median(self, rung: Rung, point: str) -> Verdict:
        assert self.stopping.rule == "median"
        others = [merit for other, merit in rung.merits.items() if other != point]  # stopped ones as well
        better = sum(merit > rung.merits[point] for merit in others)
        text = f"{better} of {len(others)} before it are better"
        if len(others) >= self.stopping.grace and 2 * better > len(others):
            return Verdict("stopped", text)
        return Verdict("continued", text)

    def sure(self, rung: Rung) -> list[str]:
        """Points, best first, that are among the best 1 / eta of all expected, whatever the missing ones score."""
        if self.stopping.rule != "asha":
            return []
        return rung.ranking()[: max(0, self.quota(rung.expected) - rung.missing)]

    def likely(self, rung: Rung) -> list[str]:
        """Points, best first, that are among the best 1 / eta of those that have arrived."""
        return rung.ranking()[: len(rung.merits) // self.stopping.eta] if self.stopping.rule == "asha" else []
