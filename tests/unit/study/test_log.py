"""The record on disk: torn lines heal, one writer at a time, extension goes on and contradiction is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nexus_ray.errors import ConfigError, DataError
from nexus_ray.storage import Storage
from nexus_ray.study import log as study_log
from nexus_ray.study.course import Course
from nexus_ray.study.load import Study, load_study
from nexus_ray.study.log import StudyLog, read_study, study_fingerprint
from nexus_ray.synthesis.append_log import LogWriter
from tests.studies import Lab, Log, a_study, smooth

ASHA = {"rule": "asha", "eta": 3, "rungs": [0.2, 0.5]}


def conduct(study: Study, *, most_starts: int = 10**6) -> Lab:
    """Run a study on disk; the driver dies after so many starts."""
    lab = Lab(study, smooth)
    with StudyLog(study) as log:
        memory = Log(log.events)
        memory.write = lambda event: (log.write(event), memory.events.append(event))[0]  # type: ignore[method-assign]
        course = Course(study, events=log.events, write=log.write)
        for _ in range(most_starts):
            job = course.next()
            if job is None:
                break
            lab.started.append(job.trial)
            done = 0
            while lab.step(course, job, done := done + 1):
                pass
            course.left(job.trial)
    return lab


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    study = a_study(tmp_path, stopping=ASHA)
    conduct(study, most_starts=5)
    _, early = read_study(study.folder)
    assert len(early) == 5 and {trial.status for trial in early} == {"paused"}
    conduct(study)
    config, trials = read_study(study.folder)
    assert config == study.config and len(trials) == 12
    memory = Lab(study, smooth).run(Log())
    assert trials == memory.trials(), "as in memory"
    assert conduct(study).started == [], "a finished study starts nothing"


def test_the_folder_alone_goes_on(tmp_path: Path) -> None:
    study = a_study(tmp_path, stopping=ASHA, common={"training.weight_decay": 1.0e-05})
    conduct(study, most_starts=3)
    (tmp_path / "study.yaml").unlink()
    (tmp_path / "run.yaml").unlink()
    again = load_study(study.folder.local_path / "study.yaml", hardware=study.hardware)
    assert study_fingerprint(again) == study_fingerprint(study)
    started = conduct(again).started
    assert len(set(started)) >= 9 and len(read_study(study.folder)[1]) == 12


def test_a_torn_last_line_heals_and_damage_elsewhere_is_named(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    conduct(study, most_starts=3)
    file = study.folder.local_path / "trials.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    _, trials = read_study(study.folder)
    assert [trial.status for trial in trials] == ["finished", "finished", "running"]
    assert conduct(study).started[0] == trials[2].id
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], lines[1].replace(b"started", b"stopped"), *lines[2:]]))
    with pytest.raises(DataError, match=r"trials\.jsonl, line 2, is damaged.*may be run again"):
        read_study(study.folder)


def test_one_writer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = a_study(tmp_path)
    with StudyLog(study):
        second = StudyLog(study)
        second._writer = LogWriter(study.folder, study_log.NAME, lock_s=0.1)
        with pytest.raises(DataError, match=r"trials\.lock is held by process"):
            second.__enter__()
    with StudyLog(study):
        pass


def test_an_event_is_on_disk_before_the_answer(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    with StudyLog(study, clock=lambda: 12.5) as log:
        log.write({"event": "planned"})
        assert b'"time":12.5' in (study.folder.local_path / "trials.jsonl").read_bytes()


SPACE: dict[str, Any] = {
    "method": {"options": {"full": {}, "lora": {"continual.use_lora": True}}},
    "continual.lora_rank": {"choice": [4, 8], "when": {"method": "lora"}},
    "training.learning_rate": {"log_uniform": [1e-4, 1e-3]},
}
FIRST: dict[str, Any] = {
    "space": SPACE,
    "search": {"kind": "random", "trials": 4},
    "stopping": ASHA,
    "seeds": [0, 1],
}


def with_knob(name: str, knob: dict[str, Any] | None) -> dict[str, Any]:
    return {"space": {key: value for key, value in {**SPACE, name: knob}.items() if value is not None}}


@pytest.mark.parametrize(
    "change",
    [
        {"search": {"kind": "random", "trials": 40}},
        {"seeds": [1, 0, 2]},
        {"max_concurrent": 3},
        with_knob("continual.lora_rank", {"choice": [2, 4, 8], "when": {"method": "lora"}}),
        with_knob("continual.lora_rank", {"choice": [4, 8], "when": {"method": ["lora", "full"]}}),
        with_knob("training.learning_rate", {"log_uniform": [1e-5, 1e-3]}),
        with_knob("method", {"options": {**SPACE["method"]["options"], "expand": {"continual.expand_blocks": 1}}}),
    ],
)
def test_more_of_everything_goes_on(tmp_path: Path, change: dict[str, Any]) -> None:
    study = a_study(tmp_path, **FIRST)
    with StudyLog(study) as log:
        log.write({"event": "extended", "config": {}})
    grown = a_study(tmp_path, **{**FIRST, **change})
    with StudyLog(grown) as log:
        assert len(log.events) == 1
    stored = yaml.safe_load((study.folder.local_path / "study.yaml").read_text())
    assert stored["search"]["trials"] == grown.config.search.trials  # type: ignore[union-attr]
    with StudyLog(grown) as log:
        only_concurrency = study_fingerprint(grown) == study_fingerprint(study)
        assert len(log.events) == (1 if only_concurrency else 2), "the change is an event of its own"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": {"training": {"token_budget": 900_000}}}, r"base='run.yaml', with `common`, is now another run"),
        ({"common": {"training.weight_decay": 0.3}}, r"base='run.yaml', with `common`, is now another run"),
        ({"seeds": [0]}, r"seeds=\[0\] leaves out \[1\]"),
        ({"search": {"kind": "random", "trials": 3}}, r"search\.trials=3 is fewer than the study's 4; a study only"),
        ({"search": {"kind": "random", "trials": 4, "seed": 1}}, r"search=.*the study has begun with"),
        ({"search": {"kind": "optuna", "trials": 9}}, r"search=.*the study has begun with"),
        ({"stopping": {"rule": "none"}}, r"stopping=.*the study has begun with"),
        ({"stopping": {**ASHA, "eta": 2}}, r"stopping=.*the study has begun with"),
        ({"objective": {"kind": "new_under_forgetting", "max_forgetting": 1.0}}, r"objective=.*the study has begun"),
        ({"simulated_epoching": False}, r"simulated_epoching=False: the study has begun with True"),
        (
            with_knob("continual.lora_rank", {"choice": [4, 9], "when": {"method": "lora"}}),
            r"lora_rank: \[8\] are gone",
        ),
        (with_knob("continual.lora_rank", None), r"space\.continual\.lora_rank is gone"),
        (with_knob("continual.warmup_steps", {"choice": [1]}), r"space\.continual\.warmup_steps is new"),
        (with_knob("training.learning_rate", {"uniform": [1e-4, 1e-3]}), r"uniform where it was log_uniform"),
        (with_knob("training.learning_rate", {"log_uniform": [2e-4, 1e-2]}), r"is not around \[0\.0001, 0\.001\]"),
        (
            with_knob(
                "method", {"options": {"full": {"training.weight_decay": 0.0}, "lora": {"continual.use_lora": True}}}
            ),
            r"options full are gone or set something else",
        ),
        (
            with_knob("continual.lora_rank", {"choice": [4, 8], "when": {"method": "full"}}),
            r"when\.method='full' where",
        ),
    ],
)
def test_what_contradicts_is_refused_with_a_way_out(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    study = a_study(tmp_path, **FIRST)
    with StudyLog(study):
        pass
    before = (study.folder.local_path / "study.json").read_bytes()
    with pytest.raises(ConfigError, match=message) as error, StudyLog(a_study(tmp_path, **{**FIRST, **change})):
        pass
    assert "another `name`" in str(error.value) or "only grows" in str(error.value)
    assert (study.folder.local_path / "study.json").read_bytes() == before


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no study.*name the folder"):
        read_study(Storage(str(tmp_path)))
