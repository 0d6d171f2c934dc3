"""`plan.jsonl`: appended to before it is used, read again as it was, changed at its end alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nexus_ray.config import RunConfig
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.stream.plan_file import PlanFile
from tests.unit.stream.test_curriculum import MANIFESTS, ONE_BY_ONE, ROWS_PER_STEP, config, manifest

STEPS = 20


def planned(folder: Path, stages: int = 2) -> tuple[RunConfig, PlanFile]:
    made = config(*ONE_BY_ONE, steps=STEPS, replay_ratio=0.1)
    file = PlanFile(Storage(str(folder)), made)
    for index in range(stages):
        file.stream(made, index, 0, MANIFESTS)
    return made, file


def test_what_is_read_again_is_what_was_written(tmp_path: Path) -> None:
    made, file = planned(tmp_path)
    file.change(made, 1, 0, MANIFESTS, step=7, replay_ratio=0.25, lr_factor=0.5)
    again = PlanFile(Storage(str(tmp_path)), made)
    assert again.plan == file.plan and len((tmp_path / "plan.jsonl").read_text().splitlines()) == 3
    before = (tmp_path / "plan.jsonl").read_bytes()
    stream = again.stream(made, 1, 0, MANIFESTS)
    assert (tmp_path / "plan.jsonl").read_bytes() == before, "a stage that is planned is not planned again"
    assert (stream.first_row, stream.steps) == (STEPS * ROWS_PER_STEP, STEPS)
    at = stream.plan.segment_at(stream.first_row + 7 * ROWS_PER_STEP)
    assert (at.start_row, at.replay_ratio, at.lr_factor) == (stream.first_row + 7 * ROWS_PER_STEP, 0.25, 0.5)


def test_a_change_leaves_the_steps_before_it_alone(tmp_path: Path) -> None:
    made, file = planned(tmp_path)
    before = file.stream(made, 1, 0, MANIFESTS)
    file.change(made, 1, 0, MANIFESTS, step=7, replay_ratio=0.5, lr_factor=1.0)
    after = file.stream(made, 1, 0, MANIFESTS)
    assert np.array_equal(before.sequences(0, 7).row, after.sequences(0, 7).row)
    assert before.replayed_share(7) == after.replayed_share(7)
    assert after.replayed_share(STEPS) == pytest.approx((7 * 0.1 + 13 * 0.5) / STEPS, abs=0.01)


def test_only_the_stage_planned_last_can_be_changed(tmp_path: Path) -> None:
    made, file = planned(tmp_path, stages=3)
    before = (tmp_path / "plan.jsonl").read_bytes()
    with pytest.raises(DataError, match="only the end of the stage planned last"):
        file.change(made, 1, 0, MANIFESTS, step=7, replay_ratio=0.5, lr_factor=1.0)
    assert (tmp_path / "plan.jsonl").read_bytes() == before


def test_a_torn_line_was_never_used(tmp_path: Path) -> None:
    made, file = planned(tmp_path)
    text = (tmp_path / "plan.jsonl").read_text()
    file.change(made, 1, 0, MANIFESTS, step=7, replay_ratio=0.5, lr_factor=1.0)
    (tmp_path / "plan.jsonl").write_text((tmp_path / "plan.jsonl").read_text()[:-9])
    again = PlanFile(Storage(str(tmp_path)), made)
    assert (tmp_path / "plan.jsonl").read_text() == text and len(again.plan.segments) == 2


def test_a_run_half_planned_by_an_older_version_is_refused_before_it_trains(tmp_path: Path) -> None:
    """Its third stage would replay other rows; what is finished can still be counted."""
    made, _ = planned(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "plan.jsonl").read_text().splitlines()]
    assert [line.pop("version") for line in lines] == [2, 2]
    before = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "plan.jsonl").write_text(before)
    again = PlanFile(Storage(str(tmp_path)), made)
    for index in (1, 2):
        with pytest.raises(DataError, match=r"older version and learns and replays 'a'.*start under another name"):
            again.stream(made, index, 0, MANIFESTS)
    assert (tmp_path / "plan.jsonl").read_text() == before and again.attempts(1) == 0


def test_other_shards_than_those_of_the_plan_are_refused(tmp_path: Path) -> None:
    made, file = planned(tmp_path)
    with pytest.raises(DataError, match=r"domain 'a': its training shards.*restore them, or start under another name"):
        file.stream(made, 1, 0, {**MANIFESTS, "a": manifest("other", 40_001)})
