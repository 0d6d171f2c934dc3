"""The run record is true at every moment, and the driver sees each line of the metrics once, whole and in order."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nexus_ray.record as record_module
from nexus_ray.corpora.prepare import Made
from nexus_ray.errors import TrainingError
from nexus_ray.record import MetricsTail, RunRecordWriter, source_commit, versions
from nexus_ray.storage import Storage
from tests.configs import two_stages


def line(step: int, *, index: int = 0, attempt: int = 0, stage: str = "letters") -> str:
    return json.dumps({"stage": stage, "stage_index": index, "attempt": attempt, "step": step})


def tail(folder: Storage, seen: list[int], **changes: Any) -> MetricsTail:
    return MetricsTail(folder, 0, 0, (lambda one: seen.append(one["step"]),), **({"every_s": 0.01} | changes))


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- following the metrics ------------------------------------------------------------------------------------------


def test_new_lines_reach_every_callback_while_the_stage_runs(tmp_path: Path) -> None:
    """In order, each once; what stood there before is not news."""
    folder, seen, also = Storage(str(tmp_path)), [], []
    folder.append_line(line(1), "metrics.jsonl")
    with MetricsTail(
        folder, 0, 0, (lambda one: seen.append(one["step"]), lambda one: also.append(one["stage"])), every_s=0.01
    ):
        for step in (2, 3):
            folder.append_line(line(step), "metrics.jsonl")
        until(lambda: seen == [2, 3])
        folder.append_line(line(4), "metrics.jsonl")
        until(lambda: len(seen) == 3)
    assert seen == [2, 3, 4] and also == ["letters"] * 3


def test_lines_of_other_stages_and_attempts_are_left_out(tmp_path: Path) -> None:
    """A run has one file; a stage's bar shows its own lines."""
    folder, seen = Storage(str(tmp_path)), []
    with tail(folder, seen):
        for other in (line(1, index=1), line(2, attempt=1), line(3), line(4, stage="scratch-letters")):
            folder.append_line(other, "metrics.jsonl")
    assert seen == [3, 4]
    seen.clear()
    with tail(folder, seen, stage="scratch-letters"):
        folder.append_line(line(5), "metrics.jsonl")
        folder.append_line(line(6, stage="scratch-letters"), "metrics.jsonl")
    assert seen == [6]


def test_a_line_is_handed_on_once_it_is_whole(tmp_path: Path) -> None:
    """A writer that is half-way through a line confuses nobody."""
    folder, seen = Storage(str(tmp_path)), []
    text = line(1) + "\n" + line(2) + "\n"
    file = tmp_path / "metrics.jsonl"
    with tail(folder, seen):
        file.write_text(text[: len(line(1)) + 11])
        until(lambda: seen == [1])
        time.sleep(0.05)
        assert seen == [1]
        with file.open("a") as end:
            end.write(text[len(line(1)) + 11 :])
        until(lambda: seen == [1, 2])


def test_the_last_lines_are_seen_even_if_the_stage_ends_at_once(tmp_path: Path) -> None:
    """Leaving reads once more, and no thread stays behind."""
    folder, seen = Storage(str(tmp_path)), []
    with tail(folder, seen, every_s=60.0):
        folder.append_line(line(1), "metrics.jsonl")
    assert seen == [1]
    assert not [thread for thread in threading.enumerate() if thread.name == "metrics-tail"]


# --- run.json -------------------------------------------------------------------------------------------------------


def test_a_run_record_goes_from_running_to_its_outcome(tmp_path: Path) -> None:
    """On disk at every moment: who started, with what, and how it ended."""
    folder, config = Storage(str(tmp_path)), two_stages()
    writer = RunRecordWriter(folder, config, "abc")
    begun = folder.read_json("run.json")
    assert (begun["name"], begun["fingerprint"], begun["outcome"], begun["finished"]) == ("two", "abc", "running", None)
    assert begun["resumed"] == [] and begun["seeds"] == {"seed": 0}
    assert begun["versions"].keys() >= {"python", "nexus-ray", "torch", "ray", "deepspeed"}
    assert begun["hardware"]["cpus"] >= 1
    writer.model(1234)
    writer.stages([{"name": "letters", "index": 0, "steps": 7, "scores": {"not": "wanted"}}])
    writer.finish("failed", TrainingError("the loss is nan"))
    ended = folder.read_json("run.json")
    assert ended["model"] == {"parameters": 1234} and ended["stages"][0]["steps"] == 7
    assert "scores" not in ended["stages"][0]
    assert (ended["outcome"], ended["error"]) == ("failed", "the loss is nan") and ended["finished"]


def test_a_second_start_keeps_the_first_and_counts_itself(tmp_path: Path) -> None:
    """A resumed run says when it began, each time it went on, and forgets the old outcome."""
    folder, config = Storage(str(tmp_path)), two_stages()
    first = RunRecordWriter(folder, config, "abc")
    first.model(5)
    first.finish("interrupted")
    before = folder.read_json("run.json")
    for again in (1, 2):
        RunRecordWriter(folder, config, "abc")
        now = folder.read_json("run.json")
        assert len(now["resumed"]) == again
        assert (now["started"], now["outcome"], now["finished"]) == (before["started"], "running", None)
        assert now["model"] == {"parameters": 5}


def test_opening_an_existing_record_changes_nothing(tmp_path: Path) -> None:
    """`evaluate` looks into a run without restarting it."""
    folder, config = Storage(str(tmp_path)), two_stages()
    RunRecordWriter(folder, config, "abc").finish("done")
    before = folder.read_bytes("run.json")
    writer = RunRecordWriter(folder, config, "abc", existing=True)
    assert folder.read_bytes("run.json") == before
    writer.model(9)
    assert folder.read_json("run.json")["outcome"] == "done"


def test_the_data_of_a_run_carry_licence_and_attribution(tmp_path: Path) -> None:
    """What the report must name stands in the record, per domain."""
    folder, config = Storage(str(tmp_path)), two_stages()
    part = SimpleNamespace(documents=8, tokens=90, fingerprint="f", quarantined=(), split="train")
    domain = SimpleNamespace(
        source="files", license="CC0-1.0", attribution="nobody", train=part, held_out=part, stats={"dropped": 0}
    )
    read = {"tokenizer_fingerprint": "t", "vocab_size": 320, "eos_id": 0, "domains": {"letters": domain}}
    RunRecordWriter(folder, config, "abc").data(SimpleNamespace(**read, made=Made(documents=8, tokens=98)))
    found = folder.read_json("run.json")
    assert found["tokenizer"] == {"fingerprint": "t", "vocab_size": 320, "eos_id": 0}
    expected = {"source": "files", "license": "CC0-1.0", "attribution": "nobody", "documents": 8, "tokens": 90}
    assert found["data"]["letters"].items() >= expected.items()
    assert found["made"] == {"documents": 8, "tokens": 98}
    RunRecordWriter(folder, config, "abc").data(SimpleNamespace(**read, made=Made()))
    assert folder.read_json("run.json")["made"] == found["made"], "a run that goes on has still made them"


def test_versions_name_what_the_numbers_depend_on() -> None:
    found = versions()
    assert found.keys() >= {"python", *record_module.PACKAGES}
    assert all(isinstance(version, str) and version for version in found.values())


# --- the commit -----------------------------------------------------------------------------------------------------


def _tree(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree in `root` that the module believes to run from."""
    module = root / "nexus_ray" / "record.py"
    module.parent.mkdir()
    module.write_text("pass\n")
    monkeypatch.setattr(record_module, "__file__", str(module))
    return module


def _git(root: Path, *words: str) -> str:
    settings = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *settings, *words], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed tracked files make it dirty; files nobody added (results, notes) do not."""
    module = _tree(tmp_path, monkeypatch)
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "one")
    (tmp_path / "notes.txt").write_text("x")
    assert source_commit() == (_git(tmp_path, "rev-parse", "HEAD"), False)
    module.write_text("raise SystemExit\n")
    assert source_commit() == (_git(tmp_path, "rev-parse", "HEAD"), True)


def test_outside_of_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package, even inside somebody else's repository, claims none."""
    _git(tmp_path, "init", "-q")
    inside = tmp_path / "site-packages"
    inside.mkdir()
    _tree(inside, monkeypatch)
    assert source_commit() == (None, False)


def test_a_repository_without_a_commit_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tree(tmp_path, monkeypatch)
    _git(tmp_path, "init", "-q")
    assert source_commit() == (None, False)
