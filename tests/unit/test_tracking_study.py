"""The W&B mirror of a study, read back from its offline files with W&B's own messages."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from nexus_ray.config.tree import WandbConfig
from nexus_ray.report.study import StudyView
from nexus_ray.report.study_page import render_study
from nexus_ray.storage import Storage
from nexus_ray.study.records import Point, Trial
from nexus_ray.tracking_study import StudyTracker
from tests.study_views import study_trials
from tests.wandb_reader import OfflineRun, read_run

CONFIG = {"continual": {"replay_ratio": 0.05, "lora": {"dora": False}}, "storage": "s3://KEY:hunter2@bucket/runs"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, and an address nobody listens on: anything that wanted the network would fail."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def _record(folder: Path) -> Storage:
    """A finished run's record, as far as the mirror reads it."""
    checkpoint = folder / "stages" / "00-french" / "checkpoints" / "step-00000500-abc"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text(
        json.dumps({"info": {"step": 500, "probe_loss": 2.5, "parameters": [["w"]]}, "files": {"a": "b"}})
    )
    data = {"french": {"train": "9c05", "documents": 9506, "source": "https://me:hunter2@host/x"}}
    stages = [{"name": "french", "index": 0, "tokens": 1000}]
    run = {"name": "r", "fingerprint": "7bc9", "commit": "089", "data": data, "stages": stages, "outcome": "done"}
    scores = {"domains": ["french"], "stages": ["base", "french"], "bits_per_byte": [[4.4], [1.9]]}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "scores.json").write_text(json.dumps({**scores, "forgetting": {"max": 0.5, "mean": 0.5}}))
    (folder / "report.html").write_text("<p>report</p>")
    return Storage(str(folder))


def _read(folder: Path) -> dict[str, OfflineRun]:
    """All ended runs by name; the service writes the last records a moment after the client has left."""
    deadline = time.monotonic() + 120
    while True:
        runs = [read_run(file) for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]
        if all(run.ended for run in runs):
            return {run.name: run for run in runs}
        assert time.monotonic() < deadline, "W&B's service never finished writing"
        time.sleep(0.2)


def test_a_study_is_one_group_with_everything_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trials = [study_trials((0,))[0], Trial(Point({"continual.replay_ratio": 0.9}), 1, "failed", reason="no memory")]
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.html").write_text("<p>study</p>")
    record = _record(tmp_path / "run")
    tracker = StudyTracker(WandbConfig(mode="offline"), tmp_path / "study", name="sweep")
    tracker.trial(trials[0], config=CONFIG, run_dir=record)
    tracker.trial(trials[1], config=CONFIG)
    tracker.finish(trials, "study.html")
    again = StudyTracker(WandbConfig(mode="offline"), tmp_path / "study", name="sweep")  # a resumed driver
    again.trial(trials[0], config=CONFIG, run_dir=record)
    assert caplog.records == [] and tracker.active

    runs = _read(tmp_path / "study")
    assert len(list((tmp_path / "study").glob("wandb/offline-run-*"))) == 3
    assert {(run.group, run.job_type) for run in runs.values()} == {("sweep", "trial"), ("sweep", "study")}
    done = runs[f"sweep/{trials[0].id}"]
    assert done.config["continual.replay_ratio"] == 0.05 and done.config["continual.lora.dora"] is False
    assert done.config["knobs"] == dict(trials[0].point.params) and "hunter2" not in json.dumps(done.config)
    assert [row["tokens"] for row in done.history if "objectives/new" in row] == [250_000, 500_000, 1_000_000]
    final = trials[0].final
    assert final is not None and done.summary["new"] == final.new and done.summary["status"] == "finished"
    assert done.summary["scores/bits_per_byte.nrows"] == 2 and done.summary["forgetting/max"] == 0.5
    kinds = {kind for kind, _ in done.artifacts.values()}
    assert {"dataset", "model", "report"} <= kinds and "hunter2" not in json.dumps(done.artifacts)
    model = next(facts for kind, facts in done.artifacts.values() if kind == "model")
    assert model["inputs"] == ["data-french-9c05"] and "data-french-9c05" in done.artifacts
    assert model["checkpoint.name"] == "step-00000500-abc" and model["checkpoint.probe_loss"] == 2.5
    assert "checkpoint.parameters" not in model
    failed = runs[f"sweep/{trials[1].id}"]
    assert failed.summary["status"] == "failed" and failed.summary["reason"] == "no memory" and not failed.artifacts
    summary = runs["sweep/summary"]
    assert summary.summary["trials.nrows"] == 2 and summary.summary["trials.ncols"] == 10
    assert "report" in {kind for kind, _ in summary.artifacts.values()}


def whole_html(page: str) -> bool:
    """Whether each element that needs it is closed, in order."""
    open_: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "link", "br", "hr", "img", "input", "path", "circle", "line", "rect", "polyline"):
                open_.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if open_ and open_[-1] == tag:
                open_.pop()

    Reader().feed(page)
    return not open_


def test_no_credential_in_a_knob_or_a_reason_is_sent(tmp_path: Path) -> None:
    place = "s3://KEY:hunter2@bucket/text.txt"
    queried = f"{place}?token=hunter2"
    point = Point({"domains.a.source.paths": [place], "order": f"{queried}&x=1", "other": queried, "j": f'"{queried}"'})
    failed = Trial(point, 0, "failed", reason=f"cannot read {place}")
    page = render_study(StudyView("sweep", [*study_trials((0,)), failed, dataclasses.replace(failed, seed=1)]))
    assert "KEY" not in page and "hunter2" not in page and "bucket/text.txt" in page
    assert whole_html(page), "what is hidden takes no tag along"
    tracker = StudyTracker(WandbConfig(mode="offline"), tmp_path, name="sweep")
    tracker.trial(failed, config=CONFIG)
    tracker.finish([failed])
    runs = _read(tmp_path)
    assert runs[f"sweep/{failed.id}"].summary["reason"] == "cannot read s3://(hidden)@bucket/text.txt"
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name.endswith(".table.json") for file in files)
    assert not [file for file in files if b"hunter2" in file.read_bytes()]


@pytest.mark.parametrize("mode", ["online", "disabled"])
def test_unreachable_or_off_never_stops_a_study(mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trials = study_trials((0,))[:1]
    tracker = StudyTracker(WandbConfig(mode=mode), tmp_path / "study", name="sweep")  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        tracker.trial(trials[0], config=CONFIG, run_dir=Storage(str(tmp_path / "nothing")))
        tracker.finish(trials, "missing.html")
    assert len(caplog.records) == (mode == "online")
    assert (tmp_path / "study").exists() == (mode == "online")


def test_a_paused_trial_that_went_on_takes_the_place_of_what_was_written(tmp_path: Path) -> None:
    done = study_trials((0,))[0]
    paused = dataclasses.replace(done, status="paused", reports=done.reports[:1])
    tracker = StudyTracker(WandbConfig(mode="offline"), tmp_path, name="sweep")
    tracker.trial(paused, config=CONFIG)
    assert not tracker.lacks(paused) and tracker.lacks(done)
    tracker.finish([paused])
    again = StudyTracker(WandbConfig(mode="offline"), tmp_path, name="sweep")
    assert not again.lacks(paused) and again.lacks(dataclasses.replace(paused, status="stopped"))
    again.trial(done, config=CONFIG)
    again.finish([done])
    runs = _read(tmp_path)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2, "one for the trial, one for the summary"
    assert [row["tokens"] for row in runs[f"sweep/{done.id}"].history if "objectives/new" in row] == [
        250_000,
        500_000,
        1_000_000,
    ]
    assert runs[f"sweep/{done.id}"].summary["status"] == "finished"


class Server:
    """Takes the place of the `wandb` package, online: notes what is logged and used, by W&B run."""

    class Settings:
        model_fields: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.used: list[str] = []
        self.stored: list[str] = []
        self.summary: dict[str, Any] = {}
        self.dir = "wandb/run-now/files"

    def init(self, **settings: Any) -> Server:
        assert settings["mode"] == "online" and settings["resume"] == "allow"
        return self

    def Table(self, **parts: Any) -> Any:
        return parts

    def Artifact(self, name: str, **parts: Any) -> Any:
        return SimpleNamespace(name=name, new_file=lambda file: open("/dev/null", "w"), add_file=lambda path: None)

    def define_metric(self, *names: str, **parts: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def use_artifact(self, artifact: Any) -> None:
        self.used.append(artifact.name)

    def log_artifact(self, artifact: Any) -> None:
        self.stored.append(artifact.name)

    def finish(self, exit_code: int) -> None: ...


def test_online_a_run_uses_its_data_and_is_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)  # type: ignore[arg-type]
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    done = study_trials((0,))[0]
    paused = dataclasses.replace(done, status="paused", reports=done.reports[:1])
    record = _record(tmp_path / "run")
    StudyTracker(WandbConfig(mode="online"), tmp_path / "study", name="sweep").trial(paused, config=CONFIG)
    tracker = StudyTracker(WandbConfig(mode="online"), tmp_path / "study", name="sweep")
    tracker.trial(done, config=CONFIG, run_dir=record)
    assert tracker.active
    sent = [values["tokens"] for values in server.logged if "objectives/new" in values]
    assert sent == [250_000, 500_000, 1_000_000], "no report twice"
    assert server.used == ["data-french-9c05"]
    assert [name.partition("-")[0] for name in server.stored] == ["report", "model"]


def test_a_torn_run_record_ends_the_mirror_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scores.json").write_text("{torn")
    tracker = StudyTracker(WandbConfig(mode="offline"), tmp_path / "study", name="sweep")
    for trial in study_trials((0,))[:2]:
        tracker.trial(trial, config=CONFIG, run_dir=Storage(str(tmp_path / "run")))
    tracker.finish([])
    assert not tracker.active and len(caplog.records) == 1 and "W&B is off" in caplog.text
    assert not (tmp_path / "study" / "wandb" / "written").exists()
