"""A training worker dies at any step: the run ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import random

import pytest

from tests.faults.conftest import REFERENCE
from tests.faults.runs import STEPS, Runs, alive, record, same_curve, same_scores, unfinished, until

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]


@pytest.mark.parametrize("early", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["late", "early"])
def test_a_killed_worker_changes_no_number(runs: Runs, begun: str, early: bool) -> None:
    """SIGKILL at a random step, before or after the first checkpoint: the same command restarts its workers where the
    newest checkpoint stands, and every loss, gradient norm, batch and score is that of the uninterrupted run."""
    place = runs.place(begun)
    at = random.randint(1, 3) if early else random.randint(6, STEPS - 20)
    driver = runs.start(begun)
    driver.wait_for_step(1)
    [worker] = driver.workers()
    driver.wait_for_step(at)
    worker.kill()
    assert unfinished(place), "the kill came too late to be a fault"
    until(lambda: not alive(worker), "the worker's end")
    [successor] = until(driver.workers, "another worker")
    assert successor.pid != worker.pid
    assert driver.wait() == 0, driver.log()

    same_curve(place, runs.place(REFERENCE))
    same_scores(place, runs.place(REFERENCE))
    assert record(place)["outcome"] == "done" and record(place)["resumed"] == [], "it was one process all along"
