"""Small studies for tests: a study file with its base run, and a laboratory that runs trials by formula."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from nexus_ray.config import Hardware
from nexus_ray.study.course import Course, Job
from nexus_ray.study.history import Event
from nexus_ray.study.load import Study, load_study
from nexus_ray.study.records import Objectives, Point, Report

BASE = {
    "name": "base",
    "domains": {name: {"source": {"kind": "stdlib"}} for name in ("english", "french", "code")},
    "model": {"tokenizer": {"train_on": ["english"]}},
    "stages": [{"name": "one", "domains": {"french": 1}}, {"name": "two", "domains": {"code": 1}}],
    "training": {"token_budget": 450_000, "seq_len": 100, "global_batch_tokens": 1000},
    "evaluation": {"every_steps": 50},
}
"""900 steps in two stages, evaluated every 50."""
STUDY: dict[str, Any] = {
    "name": "s",
    "base": "run.yaml",
    "space": {
        "continual.replay_ratio": {"choice": [0.0, 0.05, 0.25]},
        "continual.warmup_steps": {"choice": [1, 5, 20, 50]},
    },
}


def write_study(folder: Path, *, base: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The study above with other fields (None drops one), its base beside it."""
    run = {**BASE, "storage": str(folder / "runs"), **(base or {})}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    study = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "study.yaml"


def a_study(folder: Path, **changes: Any) -> Study:
    return load_study(write_study(folder, **changes), hardware=Hardware(cpus=2))


Score = Callable[[Point, int, float], Objectives]
"""Of a point, a seed and a share of the budget."""


class Killed(Exception):
    """The driver died."""


class Log:
    """A log in memory that dies after so many events."""

    def __init__(self, events: list[Event] | None = None, *, room: int | None = None) -> None:
        self.events = list(events or [])
        self.room = room

    def write(self, event: Event) -> None:
        if self.room is not None and len(self.events) >= self.room:
            raise Killed
        self.events.append(event)


class Lab:
    """Runs trials by formula: `steps` evaluations each, a checkpoint before every evaluation but the first. A turn that
    was told to end keeps its place for some steps of others, at most `lingers`."""

    def __init__(
        self,
        study: Study,
        score: Score,
        *,
        steps: int = 18,
        failing: frozenset[str] = frozenset(),
        lingers: int = 0,
    ) -> None:
        self.study, self.score, self.steps, self.failing, self.lingers = study, score, steps, failing, lingers
        self.saved: dict[str, int] = {}
        """Evaluations that a trial's checkpoint has behind it."""
        self.tokens: dict[str, int] = {}
        """Tokens trained on, by trial; what is trained again counts again."""
        self.started: list[str] = []

    def course(self, log: Log) -> Course:
        return Course(self.study, events=log.events, write=log.write)

    def run(self, log: Log, *, slots: int = 1) -> Course:
        """Run the study to its end, or until the log is full; trials take turns."""
        course = self.course(log)
        running: list[tuple[Job, int]] = []
        ending: list[tuple[str, int]] = []
        while True:
            while len(running) + len(ending) < slots and (job := course.next()):
                held = [*(other.trial for other, _ in running), *(trial for trial, _ in ending)]
                assert job.trial not in held, f"{job.trial} was handed out twice"
                self.started.append(job.trial)
                assert job.resumes or job.trial not in self.saved
                running.append((job, self.saved.get(job.trial, 0)))
            if not running and not ending:
                return course
            if running:
                job, done = running.pop(0)
                if self.step(course, job, done + 1):
                    running.append((job, done + 1))
                else:
                    ending.append((job.trial, random.Random(f"{job.trial} {done}").randint(0, self.lingers)))
            for trial in [trial for trial, rest in ending if rest == 0]:
                course.left(trial)
            ending = [(trial, rest - 1) for trial, rest in ending if rest]

    def step(self, course: Course, job: Job, number: int) -> bool:
        """Train a running trial up to its evaluation `number`; whether it is to go on."""
        budget = self.study.base_tokens
        self.tokens[job.trial] = self.tokens.get(job.trial, 0) + budget // self.steps
        if job.trial in self.failing:
            course.fail(job.trial, "it always does")
            return False
        self.saved[job.trial] = number - 1
        share = number / self.steps
        report = Report(number * 50, number * budget // self.steps, self.score(job.point, job.seed, share))
        if number == self.steps:
            course.finish(job.trial, report)
            return False
        answer = course.report(job.trial, report)
        if answer != "continue":
            self.saved[job.trial] = number
        return answer == "continue"


def smooth(point: Point, seed: int, share: float) -> Objectives:
    """Learning that falls and forgetting that grows with replay, a little noise by seed, curves that do not cross."""
    ratio, warmup = float(point.params["continual.replay_ratio"]), int(point.params["continual.warmup_steps"])
    noise = ((int(point.id, 16) * 31 + seed * 7919) % 1000) / 1e6
    new = -2.0 - ratio / 4 - 0.001 * warmup + noise - (1 - share)
    return Objectives(new=new, forgetting=(0.9 - 2 * ratio) * min(1.0, 0.8 + share / 5), cost=share * 1e12)
