"""What a study's driver does around its trials, without Ray: W&B beside them, and the conclusion however they end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nexus_ray.roadmap
import nexus_ray.tune
import nexus_ray.tune.driver
from nexus_ray.config import RunConfig, fingerprint
from nexus_ray.corpora.prepare import Made
from nexus_ray.errors import ConfigError, DataError, Interrupted, NexusError, TrainingError, WorkersLost
from nexus_ray.storage import Storage
from nexus_ray.study.course import Job
from nexus_ray.study.load import Study
from nexus_ray.study.turns import Ended, Told, Turns
from nexus_ray.train.watch import Evaluated
from nexus_ray.tune.trial import how_it_failed, run_turn, unmirrored
from tests.studies import BASE, a_study

OFFLINE = {"tracking": {"wandb": {"mode": "offline"}}}


class Seen:
    """Takes the place of the W&B mirror: a trial is lacking while its reports or status differ from those written."""

    active = True

    def __init__(self, *args: Any, **named: Any) -> None:
        self.written: dict[str, tuple[int, str]] = {}
        self.order: list[str] = []
        self.pages: list[str | None] = []

    def lacks(self, trial: Any) -> bool:
        return self.written.get(trial.id) != (len(trial.reports), trial.status)

    def trial(self, trial: Any, *, config: dict[str, Any], run_dir: Storage) -> None:
        assert config["tracking"]["wandb"]["mode"] == "offline" and run_dir.name == config["name"]
        self.written[trial.id] = len(trial.reports), trial.status
        self.order.append(trial.id)

    def finish(self, trials: Any, page: str | None = None) -> None:
        self.pages.append(page)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return a_study(tmp_path, base=OFFLINE, space={"continual.replay_ratio": {"choice": [0.0, 0.05]}})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    tracker = Seen()
    monkeypatch.setattr(nexus_ray.tune, "StudyTracker", lambda *args, **named: tracker)
    monkeypatch.setattr(nexus_ray.tune, "MIRROR_EVERY_S", 0.0)
    return tracker


def conduct(study: Study, monkeypatch: pytest.MonkeyPatch, run_trials: Callable[..., None], **named: Any) -> list[str]:
    """The driver around `run_trials`; returns what it said."""
    said: list[str] = []
    monkeypatch.setattr(nexus_ray.tune.driver, "run_trials", run_trials)
    turns = Turns(study, events=[], write=lambda event: None)
    nexus_ray.tune._run(study, turns, 1, say=said.append, report=None, **{"summarise": None, **named})
    return said


def finish_one(turns: Turns) -> str:
    job = turns.next()
    assert not isinstance(job, str)
    turns.answer(Ended(job.trial, "finished", end=Evaluated(900, 900_000, -2.0, 0.1, 1.0, {})))
    return job.trial


def wait_for(condition: Callable[[], bool], meanwhile: Callable[[], None]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        meanwhile()
        time.sleep(0.01)


def test_ended_trials_are_mirrored_while_the_study_runs(
    study: Study, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_trials(turns: Turns, folder: Storage, *, meanwhile: Callable[[], None], **named: Any) -> None:
        first = finish_one(turns)
        wait_for(lambda: seen.order == [first], meanwhile)
        finish_one(turns)

    conduct(study, monkeypatch, run_trials)
    assert len(seen.order) == 2 and seen.pages == [None]


def test_a_stopped_trial_is_mirrored_once_its_turn_is_over(
    tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = {"rule": "median", "rungs": [0.5], "grace": 1, "max_signal": {"loss": 1.0}}
    one = a_study(tmp_path, base=OFFLINE, space={"continual.replay_ratio": {"choice": [0.05]}}, stopping=stopping)

    def run_trials(turns: Turns, folder: Storage, *, meanwhile: Callable[[], None], **named: Any) -> None:
        job = turns.next()
        assert not isinstance(job, str)
        high = Evaluated(100, 100_000, -2.0, 0.1, 1.0, {"loss": 2.0})
        assert turns.answer(Told(job.trial, high)) == "stop"
        for _ in range(20):
            meanwhile()
            time.sleep(0.01)
        assert seen.order == [], "its process still writes the checkpoint"
        turns.answer(Ended(job.trial, "stopped"))
        wait_for(lambda: seen.order == [job.trial], meanwhile)

    conduct(one, monkeypatch, run_trials)
    assert len(seen.order) == 1


@pytest.mark.parametrize("error", [TrainingError("Tune broke"), Interrupted("stopped"), RuntimeError("a bug")])
def test_what_a_study_came_to_is_written_however_it_ends(
    error: Exception, study: Study, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_trials(turns: Turns, folder: Storage, **named: Any) -> None:
        finish_one(turns)
        raise error

    with pytest.raises(type(error), match=str(error)):
        conduct(study, monkeypatch, run_trials, summarise=lambda folder: folder.child("report.html").uri)
    assert len(seen.order) == 1 and seen.pages == ["report.html"]


def test_a_conclusion_that_fails_does_not_hide_why_the_study_ended(
    study: Study, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def run_trials(turns: Turns, folder: Storage, **named: Any) -> None:
        finish_one(turns)
        raise TrainingError("Tune broke")

    def summarise(folder: Storage) -> str:
        raise ConfigError("storage: the disk is full")

    monkeypatch.setattr(nexus_ray.tune.driver, "run_trials", run_trials)
    turns = Turns(study, events=[], write=lambda event: None)
    with pytest.raises(TrainingError, match="Tune broke"):
        nexus_ray.tune._run(study, turns, 1, say=said.append, report=None, summarise=summarise)
    assert said[-1] == "results could not be written: storage: the disk is full"


def test_a_trial_runs_without_a_mirror_of_its_own(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    own = study.config_of(None, 0)
    assert own.tracking.wandb.mode == "offline"
    ran: list[RunConfig] = []

    def run_roadmap(config: RunConfig, **named: Any) -> None:
        ran.append(config)
        raise NexusError("enough")

    monkeypatch.setattr(nexus_ray.roadmap, "run_roadmap", run_roadmap)

    class Line:
        trial = "t"
        ended: Any = None

        def config(self) -> RunConfig:
            return own

        def end(self, message: Ended) -> None:
            self.ended = message

    line = Line()
    assert run_turn(line, report=None) == {"outcome": "failed"}  # type: ignore[arg-type]
    assert line.ended.reason == "enough" and ran[0].tracking.wandb.mode == "disabled"
    assert fingerprint(ran[0]) == fingerprint(own) and ran[0] == unmirrored(own)
    assert BASE.get("tracking") is None and ran[0].name == own.name


class Answers:
    """Takes the place of the letter box: what trials are answered."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.answer = self

    def remote(self, number: int, value: Any) -> None:
        self.given.append(value)


def test_only_what_would_fail_again_fails_a_trial_at_once() -> None:
    assert [how_it_failed(error) for error in (TrainingError("loss is nan"), ConfigError("no"))] == ["failed"] * 2
    assert [how_it_failed(error) for error in (WorkersLost("died"), RuntimeError("a socket"))] == ["broken"] * 2


@pytest.mark.parametrize("case", ["new", "scored", "worker died", "refused", "stopped", "stopped while it was made"])
def test_what_a_trial_reads_is_made_before_it_is_answered(
    study: Study, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[dict[str, Any]] = []
    turns = Turns(study, events=[], write=log.append)
    job = turns.next()
    assert isinstance(job, Job)
    own, calls = turns.config(job.trial), []

    def prepare(config: RunConfig, **named: Any) -> Any:
        calls.append("prepare")
        if case == "refused":
            raise DataError("no such file")
        if case == "stopped while it was made":
            turns.close()
        return SimpleNamespace(made=Made(documents=2))

    def score(config: RunConfig, data: Any, **named: Any) -> bool:
        calls.append("score")
        if case == "worker died":
            raise RuntimeError("the actor died")
        return True

    monkeypatch.setattr(nexus_ray.tune.driver, "prepare", prepare)
    monkeypatch.setattr(nexus_ray.tune.driver, "score_ahead", score)
    monkeypatch.setattr(nexus_ray.tune.driver, "with_local_model", lambda config, progress: config)
    if case == "scored":
        nexus_ray.tune.run_folder(own).write_json({}, "base", "stage.json")
    if case == "stopped":
        turns.close()
    box, said = Answers(), []
    work = nexus_ray.tune.driver._Work(turns, study.folder, box, name="n", slots=1, say=said.append, report=None)
    work.give(0, job.trial)

    begins = case in ("new", "scored", "worker died")
    assert box.given == [own if begins else None] and turns.running() == ([job.trial] if begins else [])
    both, one = ["prepare", "score"], ["prepare"]
    assert calls == {"new": both, "worker died": both, "stopped": []}.get(case, one)
    events = {event["event"]: event for event in log}
    assert ("failed" in events) == (case == "refused") and ("prepared" in events) == (
        len(calls) > 0 and case != "refused"
    )
    if "prepared" in events:
        assert (events["prepared"]["documents"], events["prepared"]["scored"]) == (2, int(case == "new"))
    assert bool(said) == (case == "worker died")


@pytest.mark.parametrize("wrong", [None, DataError("no such file"), RuntimeError("a bug")])
def test_what_the_first_trial_reads_is_made_before_it_is_handed_out(
    study: Study, wrong: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[dict[str, Any]] = []
    turns = Turns(study, events=[], write=log.append)
    first = turns.upcoming()
    assert first is not None and turns.running() == [] and turns.most() == 2
    box, made = Answers(), threading.Event()

    def prepare(config: RunConfig, **named: Any) -> Any:
        assert made.wait(10) and config == turns.config(first)
        if wrong is not None:
            raise wrong
        return SimpleNamespace(made=Made(documents=2))

    monkeypatch.setattr(nexus_ray.tune.driver, "prepare", prepare)
    monkeypatch.setattr(nexus_ray.tune.driver, "score_ahead", lambda config, data, **named: True)
    monkeypatch.setattr(nexus_ray.tune.driver, "with_local_model", lambda config, progress: config)
    work = nexus_ray.tune.driver._Work(turns, study.folder, box, name="n", slots=2, say=print, report=None)
    tune = nexus_ray.tune.driver._searcher(work)
    assert [tune.suggest(str(place)) for place in range(2)] == [{"trial": "", "place": place} for place in range(2)]
    thread = threading.Thread(target=partial(work.guarded, partial(work.ahead, first)), daemon=True)
    thread.start()
    work.loaded(0, place=0)
    work.loaded(1, place=0)
    assert box.given == [] and turns.running() == []
    made.set()
    thread.join(10)
    if isinstance(wrong, RuntimeError):
        assert work.error is wrong and box.given == []
        return
    assert box.given == [None] and ("prepared" in {event["event"] for event in log}) == (wrong is None)
    work.loaded(2, place=0)
    assert box.given == [None, None], "its process died, and was started anew"
    work.loaded(3, place=1)
    assert len(box.given) == 2, "one after the other"
    tune.on_trial_complete("0")
    assert tune.suggest("2") == {"trial": first} and turns.running() == [first]
    assert box.given == [None] * 3
    turns.close()
    work.loaded(4, place=2)
    assert tune.suggest("3") is None and len(box.given) == 3, "a place waits as long as there is no trial for it"
    turns.answer(Ended(first, "interrupted"))
    assert tune.suggest("4") == "FINISHED" and len(box.given) == 4
