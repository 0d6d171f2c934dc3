"""The worker's side of control: every evaluation of a controlled stage is read, decided on and logged; that of a
watched one is reported, and answered.

`control.jsonl` is written before its decision takes effect, one line per evaluation; the last line of a (stage,
attempt, step) counts. The driver appends what was decided to the plan, which is what a stage follows: up to the plan's
last change a repeated evaluation decides nothing, and so a run that follows a recorded plan repeats it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nexus_ray.storage import Storage
from nexus_ray.stream.plan import Segment
from nexus_ray.stream.rows import StageStream
from nexus_ray.train.agree import WorkerContext
from nexus_ray.train.control import Action, Controller, Kind, Reading, Setting
from nexus_ray.train.watch import Answer

if TYPE_CHECKING:
    from nexus_ray.train.engine import Engine
    from nexus_ray.train.loop import StageJob

LOG = "control.jsonl"


@dataclass(frozen=True)
class Control:
    """What a stage is controlled by."""

    controller: Controller
    debts: dict[str, float]
    """The protected domains, and the bits per byte that each had lost already when the stage began."""


def settings_in(stream: StageStream, stage_index: int, attempt: int) -> list[Setting]:
    """What the plan puts in force during a stage, and from which step on."""
    mine = [s for s in stream.plan.segments if (s.stage_index, s.attempt) == (stage_index, attempt)]
    return [setting_of(segment, stream) for segment in mine]


def setting_of(segment: Segment, stream: StageStream) -> Setting:
    since = (segment.start_row - stream.first_row) // stream.rows_per_step
    return Setting(since, segment.replay_ratio, segment.lr_factor)


def logged(run: Storage, stage_index: int, attempt: int) -> dict[int, dict[str, Any]]:
    """The lines of `control.jsonl` that count of one attempt at a stage, by step; torn ones do not."""
    lines: dict[int, dict[str, Any]] = {}
    for text in run.read_text(LOG).split("\n")[:-1] if run.exists(LOG) else []:
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if (line["stage_index"], line["attempt"]) == (stage_index, attempt):
                lines[line["step"]] = line
    return lines


def pending(lines: Mapping[int, Mapping[str, Any]], settings: Sequence[Setting]) -> Action | None:
    """The logged action that the plan does not have yet."""
    later = [step for step, line in lines.items() if line["action"] and step > settings[-1].since]
    return Action(**lines[max(later)]["action"]) if later else None


class Governor:
    """Evaluates a stage while it runs; where it is controlled, decides and logs; where it is watched, asks. All workers
    call it together."""

    def __init__(self, job: StageJob, context: WorkerContext, engine: Engine, step: int) -> None:
        """`step`: where this worker begins or goes on."""
        self._job, self._context = job, context
        self._desk: _Desk | None = None
        self._action: Action | None = None
        self.answer: Answer = "continue"
        """What whoever watches the stage answered to its last evaluation."""
        unknown = job.control is not None or (job.watch is not None and not job.watch.start_known)
        if step == 0 and unknown:
            job.hooks.begin(engine.module, context)
            engine.engine.train()
        if job.control is None:
            return
        if context.rank == 0:
            self._desk = _Desk(job, step)
        self._action = context.gather(self._desk.waiting if self._desk else None)[0]

    @property
    def acts(self) -> bool:
        """Whether the plan is to be changed before the next step."""
        return self._action is not None

    def evaluate(self, engine: Engine, step: int, signals: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the evaluation after `step` steps; those of control on rank 0, which decides for all."""
        found = self._job.hooks.during(engine.module, self._context)
        engine.engine.train()
        if self._job.watch is not None:
            self.answer = self._context.gather(self._context.agreed(partial(self._ask, step, found, signals)))[0]
        if self._job.control is None:
            return found
        metrics, action = self._context.agreed(partial(self._look, step))
        self._action = self._context.gather(action)[0]
        return {**found, **metrics}

    def _ask(self, step: int, found: Mapping[str, float], signals: Mapping[str, float]) -> Answer:
        """Rank 0's answer; the others' is not looked at."""
        watch, stream = self._job.watch, self._job.stream
        if self._context.rank or watch is None or stream is None:
            return "continue"
        lost = {name: drift for name, (drift, _) in self._job.hooks.drifts(list(watch.debts)).items()}
        bits = {name: found[f"eval/bits_per_byte/{name}"] for name in watch.learned}
        tokens = step * stream.rows_per_step * stream.plan.seq_len
        return watch.watcher(watch.evaluated(step, tokens, bits=bits, lost=lost, signals=signals))

    def _look(self, step: int) -> tuple[dict[str, float], Action | None]:
        if self._desk is None or self._job.control is None:
            return {}, None
        return self._desk.look(step, self._job.hooks.drifts(list(self._job.control.debts)))


class _Desk:
    """Rank 0's readings and decisions."""

    def __init__(self, job: StageJob, step: int) -> None:
        assert job.control is not None and job.stream is not None
        self._job, self._control = job, job.control
        self._settings = settings_in(job.stream, job.stage_index, job.attempt)
        if job.run.exists(LOG) and not job.run.read_text(LOG).endswith("\n"):
            job.run.append_line("", LOG)  # ends a torn line, to which the next would be joined
        self._before = logged(job.run, job.stage_index, job.attempt)
        self._readings = [Reading(0, job.control.debts, dict.fromkeys(job.control.debts, 0.0))]
        self._readings += [_reading(line) for at, line in sorted(self._before.items()) if at <= step]
        self.waiting = pending({at: line for at, line in self._before.items() if at <= step}, self._settings)
        """What was decided at a step that this worker goes on from, and is not in the plan yet."""

    def look(self, step: int, drifts: Mapping[str, tuple[float, float]]) -> tuple[dict[str, float], Action | None]:
        """Metrics of the evaluation after `step` steps, and what to do about it; `drifts` as of the stage's hooks."""
        lost = {name: debt + drifts[name][0] for name, debt in self._control.debts.items()}
        reading = Reading(step, lost, {name: drifts[name][1] for name in lost})
        self._readings.append(reading)
        planned = step <= self._settings[-1].since
        action = self._planned(step) if planned else self._control.controller.decide(self._readings, self._settings)
        in_force = [setting for setting in self._settings if setting.since < step][-1]
        limit = self._control.controller.limit(step)
        line = {
            "stage": self._job.stage,
            "stage_index": self._job.stage_index,
            "attempt": self._job.attempt,
            **asdict(reading),
            "limit": limit,
            "replay_ratio": in_force.replay_ratio,
            "lr_factor": in_force.lr_factor,
            "action": asdict(action) if action else None,
            "time": round(time.time(), 3),
        }
        self._job.run.append_line(json.dumps(line), LOG)
        metrics = {f"control/forgetting/{name}": value for name, value in lost.items()}
        metrics |= {"control/limit": limit, "control/replay_ratio": in_force.replay_ratio}
        return {**metrics, "control/lr_factor": in_force.lr_factor}, None if planned else action

    def _planned(self, step: int) -> Action | None:
        """The action that the plan has at a step, with its reason if that is known."""
        found = next((number for number, setting in enumerate(self._settings) if setting.since == step), 0)
        if not found:
            return None
        setting, before = self._settings[found], self._settings[found - 1]
        kind: Kind = "replay" if setting.replay_ratio != before.replay_ratio else "learning_rate"
        planned = Action(kind, step, setting.replay_ratio, setting.lr_factor, "as the recorded plan says")
        known = self._before.get(step, {}).get("action")
        return Action(**known) if known and Action(**known).setting == planned.setting else planned


def _reading(line: Mapping[str, Any]) -> Reading:
    return Reading(line["step"], line["forgetting"], line["error"])
