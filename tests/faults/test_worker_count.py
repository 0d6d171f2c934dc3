"""A stage goes on with two workers and then with one again: the same rows, and losses within rounding."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import REFERENCE
from tests.faults.runs import STEPS, Runs, committed, record, repeated, steps, unfinished

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]
AFTER = 20
"""Steps after each change in which losses are compared (all others are too)."""


def test_one_worker_two_and_one_again(runs: Runs, begun: str) -> None:
    """Stopped by SIGTERM to all of its process group, gone on with two workers, stopped by `control/stop`, gone on with
    one: the hash of every global batch equals the uninterrupted run's, losses stay within 1e-5, held-out losses within
    0.01 nats."""
    place = runs.place(begun)
    driver = runs.start(begun)
    driver.wait_for_step(4)
    driver.signal(signal.SIGTERM, group=True)
    assert driver.wait() == 130 and unfinished(place), driver.log()
    first = committed(place)[-1]

    driver = runs.start(begun, "cluster.num_workers=2")
    driver.wait_for_step(first + AFTER)
    assert len(driver.workers()) == 2
    (place / "control" / "stop").write_text("a test")
    assert driver.wait() == 130 and unfinished(place), driver.log()
    second = committed(place)[-1]
    runs.complete(begun)

    mine, theirs = steps(place), steps(runs.place(REFERENCE))
    assert sorted(mine) == sorted(theirs) == list(range(1, STEPS + 1)) and repeated(place) == set()
    assert [mine[step]["world_size"] for step in sorted(mine)] == (
        [1] * first + [2] * (second - first) + [1] * (STEPS - second)
    )
    assert second - first >= AFTER and STEPS - second >= AFTER
    for step in theirs:
        assert mine[step]["data/batch_hash"] == theirs[step]["data/batch_hash"], step
        assert mine[step]["train/loss"] == pytest.approx(theirs[step]["train/loss"], rel=1e-5), step
    assert mine[first]["train/loss"] == theirs[first]["train/loss"], "one worker, before any change: bit for bit"

    got, expected = _scores(place), _scores(runs.place(REFERENCE))
    assert got["domains"] == expected["domains"] and got["stages"] == expected["stages"]
    assert got["loss"][-1] == pytest.approx(expected["loss"][-1], abs=0.01)
    assert record(place)["outcome"] == "done" and len(record(place)["resumed"]) == 2


def _scores(run: Path) -> Any:
    return json.loads((run / "scores.json").read_text())
