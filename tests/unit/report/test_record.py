"""The loader takes any state of a run, and resolves repeated work as the record defines it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nexus_ray.errors import ConfigError
from nexus_ray.report.record import Scores, load_run
from tests.record_fixture import DOMAINS, write_record


def _append(folder: Path, **line: object) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_a_finished_run(tmp_path: Path) -> None:
    record = load_run(str(write_record(tmp_path / "demo", steps=30)))
    assert (record.name, record.outcome, record.remarks) == ("demo", "done", [])
    assert [stage.name for stage in record.stages] == list(DOMAINS)
    assert [len(stage.steps) for stage in record.stages] == [30, 30, 30]
    assert record.scores.stages == ["base", *DOMAINS]
    assert record.scores.column("code")[-1] == 1.62
    assert record.scores.interval("bits_per_byte", 1, 0) == pytest.approx((2.15, 2.21))
    assert record.scores.interval("forgetting", "mean") == pytest.approx((0.38, 0.42))
    assert record.new_domains(1) == ["encyclopedia"]
    assert [sample.domain for sample in record.base.samples] == list(DOMAINS)


def test_last_line_of_a_step_and_highest_attempt_of_a_stage_count(tmp_path: Path) -> None:
    folder = write_record(tmp_path / "demo", steps=5)
    stage = {"stage": "code", "stage_index": 2}
    _append(folder, **stage, attempt=0, step=5, tokens=1, **{"train/loss": 7.0})
    assert load_run(folder).stages[2].steps[-1]["train/loss"] == 7.0
    _append(folder, **stage, attempt=1, step=1, tokens=8, **{"train/loss": 6.0})
    _append(folder, **stage, attempt=1, step=2, tokens=16, **{"train/loss": 5.0})
    _append(folder, **stage, attempt=0, step=3, tokens=24, **{"train/loss": 4.0})
    last = load_run(folder).stages[2]
    assert (last.attempt, [line["train/loss"] for line in last.steps], last.tokens) == (1, [6.0, 5.0], 16)


def test_a_torn_last_line_is_left_out_and_named(tmp_path: Path) -> None:
    folder = write_record(tmp_path / "demo", steps=4)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "code", "stage_in')
    record = load_run(folder)
    assert len(record.stages[2].steps) == 4
    assert record.remarks == ["metrics.jsonl has 1 torn line, left out"]


def test_an_unfinished_run_gets_its_matrix_from_the_ended_stages(tmp_path: Path) -> None:
    folder = write_record(tmp_path / "demo", steps=6, stages=2, outcome="running")
    (folder / "scores.json").unlink()
    _append(folder, stage="code", stage_index=2, attempt=0, step=1, tokens=8192, **{"train/loss": 8.0})
    record = load_run(folder)
    assert [stage.finished for stage in record.stages] == [True, True, False]
    assert record.scores.stages == ["base", "shakespeare", "encyclopedia"]
    assert record.scores.forgetting["max"] == pytest.approx(0.34)
    assert record.stages[2].name == "code"


def test_a_stage_folder_without_a_result_belongs_to_the_stage_of_its_name(tmp_path: Path) -> None:
    folder = write_record(tmp_path / "demo", steps=6, stages=2, outcome="interrupted")
    (folder / "stages" / "01-encyclopedia" / "stage.json").unlink()
    stage = load_run(folder).stages[1]
    assert (stage.index, stage.name, stage.finished, len(stage.steps)) == (1, "encyclopedia", False, 6)


@pytest.mark.parametrize("left", ["run.json", "config.yaml", "metrics.jsonl"])
def test_any_one_file_is_enough(tmp_path: Path, left: str) -> None:
    full = write_record(tmp_path / "full", steps=3)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / left).write_bytes((full / left).read_bytes())
    assert load_run(bare).uri == str(bare)


def test_a_broken_file_is_named_not_fatal(tmp_path: Path) -> None:
    folder = write_record(tmp_path / "demo", steps=3)
    (folder / "run.json").write_text("{")
    (folder / "config.yaml").write_text("a: [1")
    remarks = load_run(folder).remarks
    assert remarks[0].startswith("run.json cannot be read") and remarks[1].startswith("config.yaml cannot be read")


def test_a_folder_without_a_record_is_named_with_the_runs_beside_it(tmp_path: Path) -> None:
    write_record(tmp_path / "one", steps=3)
    with pytest.raises(ConfigError, match=r"missing.*holds no run record.*runs beside it: one"):
        load_run(tmp_path / "missing")
    with pytest.raises(ConfigError, match="list the runs with `ls STORAGE`"):
        load_run(tmp_path / "nowhere" / "missing")


def test_interval_of_a_missing_place_is_none() -> None:
    scores = Scores(intervals={"forgetting": {"mean": None, "max": [1.0, 2.0]}, "bits_per_byte": [[None]]})
    assert scores.interval("forgetting", "max") == (1.0, 2.0)
    for path in (("forgetting", "mean"), ("forgetting", "x", "y"), ("bits_per_byte", 0, 0), ("bits_per_byte", 5, 5)):
        assert scores.interval(*path) is None
