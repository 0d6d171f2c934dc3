"""What has happened in a study, rebuilt from the events of its log. Pure.

An event is a JSON object with a key `event`. Invariant: the state is a function of the events alone; a running study
changes it only by applying what it has just logged, so a study read back is the one that wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

from nexus_ray.errors import DataError
from nexus_ray.study.records import Objectives, Point, Report, RungDecision, Status, Trial, mean_objectives

Event = dict[str, Any]
ENDED: tuple[Status, ...] = ("finished", "stopped", "failed")


@dataclass
class TrialState:
    """One trial so far."""

    point: Point
    seed: int
    budget: int
    """Tokens of the whole trial."""
    status: Status = "planned"
    has_run: bool = False
    """Whether it was ever started: there may be a checkpoint."""
    reports: dict[int, Report] = field(default_factory=dict)
    """By step, in order."""
    at_rung: dict[int, tuple[int, Objectives]] = field(default_factory=dict)
    """At each rung reached: a number that rises with time, and the scores."""
    verdicts: dict[int, str] = field(default_factory=dict)
    """By rung: continued, paused or stopped."""
    decisions: list[RungDecision] = field(default_factory=list)
    reason: str | None = None
    lost: int = 0
    """Times that its process died and the study ended with it, since somebody last asked for the trial."""

    @property
    def id(self) -> str:
        return Trial(self.point, self.seed).id

    def record(self) -> Trial:
        reports = tuple(self.reports[step] for step in sorted(self.reports))
        return Trial(self.point, self.seed, self.status, reports, self.reason, tuple(self.decisions))


@dataclass
class PointState:
    """One point and its replicates."""

    point: Point
    index: int
    note: Mapping[str, Any]
    trials: dict[int, TrialState]
    """By seed."""
    passed: int = 0
    """Rungs it was let through."""
    stopped: str | None = None
    """Why the judge ended it."""

    @property
    def alive(self) -> list[TrialState]:
        """Replicates that did not fail."""
        return [trial for trial in self.trials.values() if trial.status != "failed"]

    @property
    def is_out(self) -> bool:
        """Whether it takes no further part: stopped, or all its replicates failed."""
        return self.stopped is not None or not self.alive

    def at(self, rung: int) -> tuple[int, Objectives] | None:
        """When the last of its replicates reached a rung, and their mean there; None before."""
        alive = self.alive
        if not alive or any(rung not in trial.at_rung for trial in alive):
            return None
        reached = [trial.at_rung[rung] for trial in alive]
        return max(time for time, _ in reached), mean_objectives([scores for _, scores in reached])

    @property
    def final(self) -> Objectives | None:
        """Mean at the full budget; None unless all its replicates that did not fail have finished."""
        alive = self.alive
        if not alive or any(trial.status != "finished" for trial in alive):
            return None
        return mean_objectives([trial.reports[max(trial.reports)].objectives for trial in alive])


class History:
    """The state of a study. `shares` are its rungs; `seeds` its replicates, which may have grown since."""

    def __init__(self, shares: Sequence[Fraction], seeds: Sequence[int]) -> None:
        self._shares = tuple(shares)
        self._seeds = tuple(seeds)
        self.points: dict[str, PointState] = {}
        """By id, in order of proposal."""
        self.trials: dict[str, TrialState] = {}
        self._clock = 0

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take in one event. Raises DataError for one that does not follow from those before."""
        kind = event.get("event")
        handler = getattr(self, f"_on_{kind}", None)
        if handler is None:
            raise DataError(f"trials.jsonl: unknown event {kind!r}; it was written by another version")
        try:
            handler(event)
        except KeyError as error:
            raise DataError(f"trials.jsonl: event {kind!r} names {error}, which was never planned") from None

    def apply_all(self, events: Iterable[Mapping[str, Any]]) -> None:
        for event in events:
            self.apply(event)

    def _on_planned(self, event: Mapping[str, Any]) -> None:
        point = Point(event["params"])
        trials = {seed: TrialState(point, seed, event["budget"]) for seed in self._seeds}
        self.points[point.id] = PointState(point, event["index"], event["note"], trials)
        self.trials |= {trial.id: trial for trial in trials.values()}

    def _on_started(self, event: Mapping[str, Any]) -> None:
        trial = self.trials[event["trial"]]
        trial.status, trial.has_run, trial.reason = "running", True, None

    def _on_reported(self, event: Mapping[str, Any]) -> None:
        trial = self.trials[event["trial"]]
        report = report_from(event["report"])
        trial.reports[report.step] = report
        for rung, share in enumerate(self._shares):
            if rung not in trial.at_rung and report.tokens >= share * trial.budget:
                self._clock += 1
                trial.at_rung[rung] = self._clock, report.objectives

    def _on_continued(self, event: Mapping[str, Any]) -> None:
        trial = self._decide(event, "continued")
        point = self.points[trial.point.id]
        point.passed = max(point.passed, event["rung"] + 1)

    def _on_paused(self, event: Mapping[str, Any]) -> None:
        trial = self._decide(event, "paused")
        trial.status, trial.reason = "paused", f"rung {event['rung']}: {event['reason']}"

    def _on_promoted(self, event: Mapping[str, Any]) -> None:
        point = self.points[event["point"]]
        point.passed = max(point.passed, event["rung"] + 1)
        for trial in point.trials.values():
            trial.decisions.append(RungDecision(event["rung"], "promoted", event["reason"]))

    def _on_stopped(self, event: Mapping[str, Any]) -> None:
        point = self.points[event["point"]]
        point.stopped = event["reason"]
        for trial in point.trials.values():
            if trial.status not in ENDED:
                trial.status, trial.reason = "stopped", event["reason"]
                if event["rung"] is not None:
                    trial.verdicts[event["rung"]] = "stopped"
                    trial.decisions.append(RungDecision(event["rung"], "stopped", event["reason"]))

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        self.trials[event["trial"]].status = "finished"

    def _on_failed(self, event: Mapping[str, Any]) -> None:
        trial = self.trials[event["trial"]]
        trial.status, trial.reason = "failed", event["reason"]

    def _on_retried(self, event: Mapping[str, Any]) -> None:
        trial = self.trials[event["trial"]]
        trial.status, trial.reason, trial.lost = "planned", None, 0

    def _on_lost(self, event: Mapping[str, Any]) -> None:
        self.trials[event["trial"]].lost += 1

    def _on_extended(self, event: Mapping[str, Any]) -> None:
        """The study file was changed; kept for the reader."""

    def _on_prepared(self, event: Mapping[str, Any]) -> None:
        """What was read, encoded and scored before a trial's turn; kept for the reader."""

    def _on_timed(self, event: Mapping[str, Any]) -> None:
        """What a trial's turn took besides training; kept for the reader."""

    def _decide(self, event: Mapping[str, Any], verdict: Any) -> TrialState:
        trial = self.trials[event["trial"]]
        trial.verdicts[event["rung"]] = verdict
        trial.decisions.append(RungDecision(event["rung"], verdict, event["reason"]))
        return trial

    def records(self) -> list[Trial]:
        """All trials, point by point in order of proposal."""
        return [trial.record() for point in self.points.values() for trial in point.trials.values()]


def report_data(report: Report) -> Event:
    """A report as plain data."""
    return {**asdict(report), "signals": dict(report.signals)}


def report_from(data: Mapping[str, Any]) -> Report:
    """The inverse."""
    return Report(data["step"], data["tokens"], Objectives(**data["objectives"]), dict(data["signals"]))
