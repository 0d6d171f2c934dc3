"""The whole driver dies: nothing of it goes on in secret, and the same command continues, bit for bit."""

from __future__ import annotations

import random
import signal

import pytest

from tests.faults.conftest import REFERENCE
from tests.faults.runs import (
    STEPS,
    Runs,
    committed,
    lines,
    record,
    same_curve,
    same_scores,
    unfinished,
    wait_gone,
)

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Helpers of a Ray node that notice its end only after a while; they hold nothing of the run."""
NEEDLESS = tuple(f"ray::{name}" for name in ("TrainController", "SynchronizationActor", "Dataset", "PlacementGroupCl"))
"""What Ray Train would start for a stage besides its workers."""


def test_a_killed_driver_is_gone_on_from(runs: Runs, begun: str) -> None:
    """SIGKILL of the command's process at a random step takes its workers along, so that nobody writes into the run;
    the same command finishes it with the numbers of the uninterrupted run."""
    place = runs.place(begun)
    driver = runs.start(begun)
    driver.wait_for_step(random.randint(6, STEPS - 20))
    family = {process: process.cmdline()[0] for process in driver.family()}
    assert any(title.startswith("ray::RayTrainWorker") for title in family.values())
    assert not [title for title in family.values() if title.startswith(NEEDLESS)], "each delays the first step"
    driver.signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL and unfinished(place), "the kill came too late to be a fault"

    assert wait_gone([process for process, title in family.items() if not title.startswith(AGENTS)], 30) == []
    assert record(place)["outcome"] == "running", "nobody was left to say how it ended"
    saved, done = max(committed(place)), max(line["step"] for line in lines(place))
    before = len(list(lines(place)))

    runs.complete(begun)
    again = [line["step"] for line in lines(place)][before:]
    assert again == list(range(saved + 1, STEPS + 1)), f"saved {saved}, done {done}"
    same_curve(place, runs.place(REFERENCE))
    same_scores(place, runs.place(REFERENCE))
    assert record(place)["outcome"] == "done" and len(record(place)["resumed"]) == 1
