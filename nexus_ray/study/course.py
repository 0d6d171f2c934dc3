"""How a study goes on: which trial runs next, and what a trial that reports is told.

Invariant: every event is in the log before its consequence is told to anybody, and what is told is a function of the
log. So a study that is killed goes on from its log; what was decided stays decided; and at concurrency 1, where the
order of reports is given, it ends as it would have undisturbed. Imports no Ray: `nexus_ray.tune` runs what this asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from nexus_ray.study.history import ENDED, Event, History, PointState, TrialState, report_data
from nexus_ray.study.judge import Judge, Rung
from nexus_ray.study.load import Study
from nexus_ray.study.records import Objectives, Point, Report, Trial
from nexus_ray.study.search import Proposal, Searcher, Seen, searcher

Answer = Literal["continue", "pause", "stop"]
"""To a trial at an evaluation: go on, or save a checkpoint and end (to be resumed perhaps, or for good)."""
MOST_LOST = 2
"""Times that a trial's process may die and end the study with it before the trial fails."""
_ANSWERS: dict[str, Answer] = {"continued": "continue", "paused": "pause", "stopped": "stop"}


@dataclass(frozen=True)
class Job:
    """A trial to run now, up to whatever it is told."""

    trial: str
    """Its id."""
    point: Point
    seed: int
    resumes: bool
    """Whether it has run before, and goes on from its newest checkpoint."""


class Course:
    """A study in progress. `write` puts an event into the log and returns once it is safe there."""

    def __init__(self, study: Study, *, events: Iterable[Event], write: Callable[[Event], None]) -> None:
        self._study = study
        self._write = write
        self._judge = Judge(study.config.stopping, study.config.objective)
        self._searcher: Searcher = searcher(study.config, study.space)
        self._history = History(self._judge.shares, study.config.seeds)
        self._history.apply_all(events)
        self._active: set[str] = set()  # handed out by this process, in turns that are not over
        self._aside: set[str] = set()  # cut off in a turn of this process, and left to the next one
        self._totals: dict[int, int] = {}  # by points proposed so far

    # --- what the runner calls ---------------------------------------------------------------------------------------

    def next(self) -> Job | None:
        """The trial to run in a free place; None if there is none now (more may come once a running one reports).

        In this order: trials that a dead process left running; trials sure of their place beyond a rung, nearest to
        the end first; replicates and points not begun; and, only while others train, likely places. Never a trial whose
        turn is not over (`left`): it may have been told to end and still be writing its checkpoint. A point that the
        run refuses fails here, and the study goes on with the next.
        """
        trial = self._upcoming() or self._hasty()
        if trial is None:
            return None
        job = Job(trial.id, trial.point, trial.seed, trial.has_run)
        self._note({"event": "started", "trial": trial.id})
        self._active.add(trial.id)
        return job

    def upcoming(self) -> str | None:
        """The trial that `next` hands out first; what has to be decided for that is decided now."""
        trial = self._upcoming()
        return None if trial is None else trial.id

    def report(self, trial_id: str, report: Report) -> Answer:
        """Record an evaluation of a running trial and answer it. A step reported before is not recorded again, and its
        answer is the logged one, unless its point was promoted since.

        Scores that are not finite fail the trial.
        """
        trial = self._history.trials[trial_id]
        point = self._history.points[trial.point.id]
        if not _finite(report.objectives):
            self.fail(trial_id, f"scores at step {report.step} are not finite")
            return "stop"
        self._record(trial, report)
        answer = self._answer_all(point, trial, report)
        if answer == "continue" and trial.status == "paused":  # its process was started anew, its point promoted since
            self._note({"event": "started", "trial": trial_id})
        return answer

    def finish(self, trial_id: str, report: Report) -> None:
        """Record the final scores of a trial that has spent its full budget."""
        if not _finite(report.objectives):
            self.fail(trial_id, f"scores at step {report.step} are not finite")
            return
        self._record(self._history.trials[trial_id], report)
        self._note({"event": "finished", "trial": trial_id})

    def fail(self, trial_id: str, reason: str) -> None:
        """Record that a trial failed. The others go on without it, and it is not run again."""
        self._note({"event": "failed", "trial": trial_id, "reason": reason})

    def lost(self, trial_id: str) -> bool:
        """Record that the process of a running trial died and the study ends with it. A trial that comes first again in
        the next process and dies there too (MOST_LOST) fails, or no study would get past it. Returns whether it did."""
        trial = self._history.trials[trial_id]
        self._note({"event": "lost", "trial": trial_id})
        if trial.lost < MOST_LOST:
            return False
        self.fail(trial_id, f"its process died {trial.lost} times, for want of memory perhaps")
        return True

    def left(self, trial_id: str) -> None:
        """Take note that the turn of a trial is over, however it ended: from now on it may be handed out again. One
        that was cut off before it was told anything waits for the next process: somebody wanted it to end."""
        self._active.discard(trial_id)
        if self._history.trials[trial_id].status == "running":
            self._aside.add(trial_id)

    def retry(self, trial_ids: Iterable[str]) -> None:
        """Have failed trials run again, because somebody asks for it."""
        for trial_id in trial_ids:
            if self._history.trials[trial_id].status == "failed":
                self._note({"event": "retried", "trial": trial_id})

    @property
    def active(self) -> frozenset[str]:
        """Trials handed out whose turns are not over."""
        return frozenset(self._active)

    def trials(self) -> list[Trial]:
        """All trials so far, point by point in order of proposal."""
        return self._history.records()

    def total(self) -> int:
        """Points that the study will have."""
        known = len(self._history.points)
        if known not in self._totals:
            self._totals[known] = self._searcher.total(self._seen())
        return self._totals[known]

    # --- what runs next ----------------------------------------------------------------------------------------------

    def _upcoming(self) -> TrialState | None:
        self._settle()
        return self._interrupted() or self._promoted() or self._unbegun() or self._proposed()

    def _interrupted(self) -> TrialState | None:
        trials, held = self._history.trials.values(), self._active | self._aside
        return next((t for t in trials if t.status == "running" and t.id not in held), None)

    def _promoted(self) -> TrialState | None:
        """A paused trial whose point may go on; promotes those that are sure by now."""
        for number in reversed(range(len(self._judge.shares))):
            rung = self._rung(number)
            for point_id in self._judge.sure(rung):
                if point_id not in rung.passed:
                    self._promote(rung, point_id, "sure")
            if trial := self._resumable(number):
                return trial
        return None

    def _resumable(self, number: int) -> TrialState | None:
        passed = (point for point in self._history.points.values() if point.passed > number)
        return next((trial for point in passed if (trial := self._waiting(point, number))), None)

    def _waiting(self, point: PointState, number: int) -> TrialState | None:
        """A replicate that is paused at a rung and in no turn that still ends."""
        for trial in point.trials.values():
            if trial.status == "paused" and max(trial.at_rung) == number and trial.id not in self._active:
                return trial
        return None

    def _unbegun(self) -> TrialState | None:
        """A trial that is planned; those whose point the run refuses fail."""
        for point in self._history.points.values():
            if point.stopped is None:
                for trial in point.trials.values():
                    if trial.status != "planned":
                        continue
                    refusal = self._study.refusal(point.point)
                    if refusal is None:
                        return trial
                    self.fail(trial.id, refusal)
        return None

    def _proposed(self) -> TrialState | None:
        while proposal := self._searcher.ask(self._seen()):
            self._note(_planned(proposal, self._study.budget(proposal.point)))
            if trial := self._unbegun():
                return trial
        return None

    def _hasty(self) -> TrialState | None:
        if not any(self._history.trials[trial].status == "running" for trial in self._active):
            return None
        for number in reversed(range(len(self._judge.shares))):
            rung = self._rung(number)
            for point_id in self._judge.likely(rung):
                trial = self._waiting(self._history.points[point_id], number)
                if point_id not in rung.passed and trial is not None:
                    self._promote(rung, point_id, "likely")
                    return trial
        return None

    def _promote(self, rung: Rung, point_id: str, how: str) -> None:
        place = rung.ranking().index(point_id) + 1
        reason = f"{how}: rank {place} of {len(rung.merits)}, {rung.missing} to come"
        self._note({"event": "promoted", "point": point_id, "rung": rung.number, "reason": reason})

    # --- rungs -------------------------------------------------------------------------------------------------------

    def _rung(self, number: int) -> Rung:
        """What is known at a rung, of the points that take part there."""
        points = [point for point in self._history.points.values() if self._takes_part(point, number)]
        reached = sorted(
            (time, point.point.id, scores) for point in points if (at := point.at(number)) for time, scores in [at]
        )
        merits = {point_id: self._judge.merit(scores, at_rung=True) for _, point_id, scores in reached}
        passed = frozenset(point.point.id for point in points if point.passed > number)
        return Rung(number, merits, self._expected(number), passed)

    def _expected(self, number: int) -> int:
        """Points that have reached a rung or still will: at the first all, then those that the one before lets on."""
        out = sum(not self._takes_part(point, number) for point in self._history.points.values())
        if number == 0 or self._judge.stopping.rule != "asha":
            return self.total() - out
        before = self._expected(number - 1)
        passed = sum(point.passed >= number for point in self._history.points.values() if not point.is_out)
        return max(min(before, self._judge.quota(before)), passed)

    def _takes_part(self, point: PointState, number: int) -> bool:
        """Whether a point counts at a rung: not once all its replicates failed; and once stopped only under the median
        rule, at the rungs that it reached. Among survivors alone the median would rise by itself."""
        kept = self._judge.stopping.rule == "median" and point.at(number) is not None
        return kept or not point.is_out

    def _answer_all(self, point: PointState, trial: TrialState, report: Report) -> Answer:
        if point.stopped is None and (alarm := self._judge.alarm(report.signals)):
            self._stop(point, None, f"step {report.step}: {alarm}")
        if point.stopped is not None:
            return "stop"
        answers = (self._answer(point, trial, rung) for rung in sorted(trial.at_rung))
        return next((answer for answer in answers if answer != "continue"), "continue")

    def _settle(self) -> None:
        """Under the median rule, judge points whose last missing replicate failed instead of reaching their rung."""
        if self._judge.stopping.rule != "median":
            return
        for point in self._history.points.values():
            number = point.passed
            waits = not point.is_out and all(trial.status != "running" for trial in point.alive)
            if waits and any(trial.status == "paused" for trial in point.alive) and point.at(number):
                rung = self._rung(number)
                verdict = self._judge.arrival(rung, point.point.id)
                if verdict.kind == "stopped":
                    self._stop(point, number, verdict.reason)
                else:
                    self._promote(rung, point.point.id, "its last replicate failed")

    def _answer(self, point: PointState, trial: TrialState, number: int) -> Answer:
        if point.passed > number:
            if number not in trial.verdicts:
                self._decide("continued", trial, number, "its point was let through")
            return "continue"
        if number in trial.verdicts:
            if trial.verdicts[number] == "paused" and trial.status != "paused":  # it failed then, and was run again
                self._decide("paused", trial, number, "as before it failed")
            return _ANSWERS[trial.verdicts[number]]
        rung = self._rung(number)
        if trial.point.id not in rung.merits:
            self._decide("paused", trial, number, "its replicates have not all reached the rung")
            return "pause"
        verdict = self._judge.arrival(rung, trial.point.id)
        if verdict.kind == "stopped":
            self._stop(point, number, verdict.reason)
        else:
            self._decide(verdict.kind, trial, number, verdict.reason)
        return _ANSWERS[verdict.kind]

    def _decide(self, verdict: str, trial: TrialState, number: int, reason: str) -> None:
        self._note({"event": verdict, "trial": trial.id, "rung": number, "reason": reason})

    def _stop(self, point: PointState, number: int | None, reason: str) -> None:
        self._note({"event": "stopped", "point": point.point.id, "rung": number, "reason": reason})

    # --- the record --------------------------------------------------------------------------------------------------

    def _record(self, trial: TrialState, report: Report) -> None:
        if report.step not in trial.reports:
            self._note({"event": "reported", "trial": trial.id, "report": report_data(report)})

    def _note(self, event: Event) -> None:
        self._write(event)
        self._history.apply(event)

    def _seen(self) -> list[Seen]:
        return [self._as_seen(point) for point in self._history.points.values()]

    def _as_seen(self, point: PointState) -> Seen:
        rungs = (point.at(number) for number in range(len(self._judge.shares)))
        levels = (*(at[1] if at else None for at in rungs), point.final)
        ended = point.is_out or all(trial.status in ENDED for trial in point.trials.values())
        return Seen(point.point, point.index, levels, ended, point.note)


def _planned(proposal: Proposal, budget: int) -> Event:
    return {
        "event": "planned",
        "point": proposal.point.id,
        "params": dict(proposal.point.params),
        "index": proposal.index,
        "note": dict(proposal.note),
        "budget": budget,
    }


def _finite(objectives: Objectives) -> bool:
    return all(math.isfinite(value) for value in (objectives.new, objectives.forgetting, objectives.cost))


def share_spent(trials: Iterable[Trial], full: Mapping[str, int]) -> float:
    """Tokens that trials were trained on, as a share of all of them at their full budgets (`full` by point)."""
    spent = total = 0
    for trial in trials:
        spent += max((report.tokens for report in trial.reports), default=0)
        total += full[trial.point.id]
    return spent / total if total else 0.0
