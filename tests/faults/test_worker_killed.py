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


def test_workers_that_die_too_often_end_the_run_with_the_way_out(runs: Runs, begun: str) -> None:
    driver = runs.start(begun, "training.max_restarts=0")
    driver.wait_for_step(1)
    [worker] = driver.workers()
    worker.kill()
    assert driver.wait() == 1
    said = driver.log()
    assert "stage 'south': the process of training worker 0 of 1 died" in said and "Traceback" not in said
    assert "training.max_restarts=0" in said and "the same command goes on" in said
    assert "worker process has died" in said.rsplit("nexus-ray: ", 1)[1], "Ray's reason"
    assert record(runs.place(begun))["outcome"] == "failed"
