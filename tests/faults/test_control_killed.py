"""The driver of a controlled run dies: the same command goes on with the plan it had, bit for bit."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import EXACT, STEPS, Runs, record, same_curve, same_scores, unfinished

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(1200)]
HELD = (
    "continual.on_forgetting=control",
    "continual.max_forgetting=0.03",
    "continual.replay_ratio=0.02",
    "continual.control={min_lr_factor: 1.0}",
    "evaluation.every_steps=12",
)


def decided(run: Path) -> list[dict[str, Any]]:
    """Readings and decisions, the last of each step, without their times."""
    lines = [json.loads(line) for line in (run / "control.jsonl").read_text().splitlines()]
    last = {line["step"]: {key: value for key, value in line.items() if key != "time"} for line in lines}
    return [last[step] for step in sorted(last)]


@pytest.fixture(scope="module")
def held(runs: Runs) -> Iterator[str]:
    """An undisturbed controlled run that acted."""
    runs.begun("held", "whole")
    runs.complete("held", *HELD)
    assert any(line["action"] for line in decided(runs.place("held")))
    yield "held"
    runs.close()


def test_a_killed_controlled_run_goes_on_exactly(runs: Runs, held: str, begun: str) -> None:
    place, reference = runs.place(begun), runs.place(held)
    driver = runs.start(begun, *HELD)
    driver.wait_for_step(random.randint(6, STEPS - 20))
    driver.signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL and unfinished(place), "the kill came too late to be a fault"
    runs.close()
    runs.complete(begun, *HELD)
    same_curve(place, reference, keys=[key for key in EXACT if key != "train/loss/north"])  # not in every step
    same_scores(place, reference)
    assert decided(place) == decided(reference)
    assert (place / "plan.jsonl").read_bytes() == (reference / "plan.jsonl").read_bytes()
    assert record(place)["outcome"] == "done" and len(record(place)["resumed"]) == 1
