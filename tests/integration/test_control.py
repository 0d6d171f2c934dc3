"""A controlled stage on a Ray cluster: it acts, spends its budget, and its record says what was done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nexus_ray.report.page import write_report
from nexus_ray.roadmap import run_roadmap
from nexus_ray.session import ray_session
from tests.roadmaps import tiny_roadmap

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
STEPS, EVERY = 32, 8


def test_a_controlled_run_acts_and_its_record_says_so(tmp_path: Path) -> None:
    """What it asks for is not to be had here: the stage does what it can, ends, and the gate says what it lost."""
    config = tiny_roadmap(
        tmp_path,
        name="held",
        training__token_budget=STEPS * 8 * 32,
        continual__replay_ratio=0.02,
        continual__on_forgetting="control",
        continual__max_forgetting=0.03,
        evaluation__every_steps=EVERY,
        report__sample_tokens=0,
    )
    with ray_session(config):
        outcome = run_roadmap(config, report=write_report)
    place = outcome.folder.local_path
    log = [json.loads(line) for line in (place / "control.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [EVERY, 2 * EVERY, 3 * EVERY], "only the second stage has what to protect"
    taken = [line["action"] for line in log if line["action"]]
    assert taken and taken[0]["replay_ratio"] > 0.02
    plan = [json.loads(line) for line in (place / "plan.jsonl").read_text().splitlines()]
    assert [line["start_row"] for line in plan[2:]] == [8 * (STEPS + action["step"]) for action in taken]
    steps = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["stage"] == "south"] == list(range(1, STEPS + 1))
    stage = json.loads((place / "stages" / "01-south" / "stage.json").read_text())
    assert stage["steps"] == STEPS and stage["gate"]["action"] in ("pass", "warn")
    assert stage["replay_fraction"] == steps[-1]["train/replay_fraction"] > 0.02
    assert json.loads((place / "run.json").read_text())["outcome"] == "done"
    assert "Forgetting under control" in (place / "report.html").read_text()
