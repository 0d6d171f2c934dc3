"""Who runs next and what came of it, for a runner with several threads: the course of a study behind one lock.

A trial has a turn each time it is run: from its start, or from where it was paused, up to whatever it is told and
until its process has said that it ended. Invariant: a trial has one turn at a time. What a turn took besides training
is measured here, by the clock of the driver, and logged. Imports no Ray.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nexus_ray.config import RunConfig
from nexus_ray.study.course import Answer, Course, Job
from nexus_ray.study.history import ENDED, Event
from nexus_ray.study.load import Study
from nexus_ray.study.records import Objectives, Report, Trial
from nexus_ray.train.watch import Evaluated


@dataclass(frozen=True)
class Wanted:
    """A trial's process asks what to run; it is answered with a config."""

    trial: str


@dataclass(frozen=True)
class Told:
    """A trial was evaluated; it is answered whether to go on."""

    trial: str
    evaluated: Evaluated


@dataclass(frozen=True)
class Ended:
    """A turn is over."""

    trial: str
    outcome: Literal["finished", "paused", "stopped", "interrupted", "failed", "broken"]
    """`broken`: with an error of the machinery rather than of the run; tried again before it is told."""
    reason: str | None = None
    end: Evaluated | None = None
    """What a finished trial came to."""
    first_step: float | None = None
    """When the first optimizer step of the turn began (Unix seconds)."""
    last_step: float | None = None
    """When its last one ended."""


Message = Wanted | Told | Ended


class Turns:
    """The turns of a study's trials. Every method may be called from any thread."""

    def __init__(
        self,
        study: Study,
        *,
        events: Sequence[Event],
        write: Callable[[Event], None],
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._study, self._say, self._clock = study, say, clock
        self._lock = threading.RLock()
        self._write_event = write
        self._course = Course(study, events=events, write=self._write)
        self._started: dict[str, float] = {}
        self._begun: dict[str, float] = {}
        self._waited: dict[str, float] = {}
        self._free: list[float] = []  # when the places that are free now became so
        self._closing = False

    def next(self) -> Job | Literal["wait", "over"]:
        """The trial to run in a free place, or that there is none now, or that nothing runs and none is to begin."""
        with self._lock:
            job = None if self._closing else self._course.next()
            if job is None:
                return "wait" if self._started else "over"
            self._started[job.trial] = now = self._clock()
            if self._free:
                self._waited[job.trial] = now - self._free.pop(0)
            return job

    def upcoming(self) -> str | None:
        """The trial that is handed out first; None if none is to begin."""
        with self._lock:
            return None if self._closing else self._course.upcoming()

    def most(self) -> int:
        """How many trials can still be run at once, if all of them began."""
        with self._lock:
            ended = sum(trial.status in ENDED for trial in self._course.trials())
            return self._course.total() * len(self._study.config.seeds) - ended

    def wants(self, trial: str) -> bool:
        """Whether a trial that was handed out is still to begin."""
        with self._lock:
            return trial in self._started and not self._closing

    def prepared(self, trial: str, *, documents: int, tokens: int, scored: int) -> None:
        """Take note of what was made for a trial: documents read, tokens encoded, first models scored."""
        if documents or tokens or scored:
            work = {"documents": documents, "tokens": tokens, "scored": scored}
            with self._lock:
                self._write({"event": "prepared", "trial": trial, **work})

    def begin(self, trial: str) -> RunConfig | None:
        """What a trial is to run, now that its process and all that it reads are there; None if it is not to begin."""
        with self._lock:
            if self._closing:
                self._end(Ended(trial, "interrupted"))
            if trial not in self._started:
                return None
            self._begun.setdefault(trial, self._clock())
            return self.config(trial)

    def close(self) -> None:
        """Let no more turns begin."""
        with self._lock:
            self._closing = True

    def running(self) -> list[str]:
        """Trials whose turn it is."""
        with self._lock:
            return list(self._started)

    def trials(self) -> list[Trial]:
        with self._lock:
            return self._course.trials()

    def config(self, trial: str) -> RunConfig:
        """What a trial runs."""
        found = self._trial(trial)
        return self._study.config_of(found.point, found.seed)

    def answer(self, message: Told | Ended) -> Answer | None:
        """Take in what a trial's process says; returns what it is answered."""
        with self._lock:
            if isinstance(message, Told):
                if self._trial(message.trial).status in ENDED:  # told before, by a process that died since
                    return "stop"
                return self._course.report(message.trial, _report(message.evaluated))
            self._end(message)
            return None

    def lost(self, trial: str) -> None:
        """The process of a turn has died for good."""
        with self._lock:
            self._end(Ended(trial, "failed", "its process died, and died again when it was started anew"))

    def lost_with_study(self, trial: str) -> bool:
        """The process of a turn has died and the study ends with it; nothing more begins. Returns whether the trial has
        failed with that, because it died so before; else it is the next process that goes on with it."""
        with self._lock:
            counts = trial in self._started and self._trial(trial).status not in ENDED and not self._closing
            failed = counts and self._course.lost(trial)
            self._closing = True
            self._end(Ended(trial, "interrupted"))
            return failed

    def fail(self, trial: str, reason: str) -> None:
        """A turn cannot begin."""
        with self._lock:
            self._end(Ended(trial, "failed", reason))

    def retry(self) -> None:
        """Have all failed trials run again."""
        with self._lock:
            self._course.retry([trial.id for trial in self._course.trials() if trial.status == "failed"])

    # --- inside ----------------------------------------------------------------------------------------------------

    def _end(self, message: Ended) -> None:
        if message.trial not in self._started:
            return
        if self._trial(message.trial).status not in ENDED:
            if message.outcome == "finished" and message.end is not None:
                self._course.finish(message.trial, _report(message.end))
            elif message.outcome in ("failed", "broken"):
                self._course.fail(message.trial, message.reason or "no reason given")
        started = self._started.pop(message.trial)
        self._course.left(message.trial)
        self._time(message, started, self._begun.pop(message.trial, None))

    def _time(self, message: Ended, started: float, begun: float | None) -> None:
        now = self._clock()
        self._free.append(now)
        spans = {
            "to_begin_s": begun and begun - started,
            "to_first_step_s": begun and message.first_step and message.first_step - begun,
            "after_last_step_s": message.last_step and now - message.last_step,
            "since_last_end_s": self._waited.pop(message.trial, None),
            "seconds": now - started,
        }
        known = {name: round(span, 2) for name, span in spans.items() if span is not None}
        self._write({"event": "timed", "trial": message.trial, **known})

    def _trial(self, trial: str) -> Trial:
        return next(each for each in self.trials() if each.id == trial)

    def _write(self, event: Event) -> None:
        self._write_event(event)
        if text := self._line(event):
            self._say(text)

    def _line(self, event: Event) -> str | None:
        """An event for a person."""
        kind = event["event"]
        if kind == "planned":
            return f"point {self._short(event['params'])} planned"
        if kind == "reported":
            scores, tokens = Objectives(**event["report"]["objectives"]), event["report"]["tokens"]
            return f"{event['trial']}: {tokens:,} tokens, new {scores.new:.4f}, forgetting {scores.forgetting:.4f}"
        if kind in ("promoted", "stopped"):
            return f"{event['point']}: {kind}; {event['reason']}"
        if kind in ("paused", "continued"):
            return f"{event['trial']}: {kind} at rung {event['rung']}; {event['reason']}"
        if kind == "failed":
            return f"{event['trial']}: failed; {event['reason']}"
        if kind == "lost":
            return f"{event['trial']}: its process died"
        if kind == "started":
            return f"{event['trial']}: started"
        return f"{event['trial']}: finished" if kind == "finished" else None

    def _short(self, params: dict[str, Any]) -> str:
        return ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in params.items())


def _report(evaluated: Evaluated) -> Report:
    objectives = Objectives(evaluated.new, evaluated.forgetting, evaluated.cost)
    return Report(evaluated.step, evaluated.tokens, objectives, dict(evaluated.signals))


def made(events: Iterable[Event]) -> dict[str, int]:
    """Documents read, tokens encoded and first models scored for all turns together; the rest was found."""
    own = [event for event in events if event["event"] == "prepared"]
    return {key: sum(event.get(key, 0) for event in own) for key in ("documents", "tokens", "scored")}


def overheads(events: Iterable[Event]) -> dict[str, dict[str, float]]:
    """Median and most of what turns took besides training, in seconds, by kind; {} before the first turn has ended.

    `to_begin_s`: until a trial's process and all that it reads were there; nearly nothing but for those that read what
    was not made before. `to_first_step_s`: from there to the first step. `after_last_step_s`: from the last to the
    turn's end. `since_last_end_s`: how long its place was free.
    """
    spans: dict[str, list[float]] = {}
    for event in events:
        if event["event"] == "timed":
            for name, value in event.items():
                if name.endswith("_s"):
                    spans.setdefault(name, []).append(value)
    return {name: {"median": statistics.median(values), "most": max(values)} for name, values in spans.items()}
