"""Ctrl-C and SIGTERM end a run with a checkpoint, one process at a time works on it, and a finished run stays."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import REFERENCE
from tests.faults.runs import (
    STEPS,
    Runs,
    committed,
    record,
    repeated,
    same_curve,
    same_scores,
    steps,
    unfinished,
    wait_gone,
)

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_with_a_checkpoint_and_is_gone_on_from(
    runs: Runs, begun: str, number: signal.Signals
) -> None:
    """Exit code 130, the last step saved, no step done twice, and in the end the numbers of the uninterrupted run. In
    between, a second process is refused as long as the first one runs."""
    place = runs.place(begun)
    driver = runs.start(begun)
    driver.wait_for_step(4)
    _second_process_is_refused(runs, begun, driver.workers())
    driver.signal(number)
    family = driver.family()
    assert driver.wait() == 130, driver.log()
    assert unfinished(place), "the signal came too late to interrupt anything"

    newest = max(steps(place))
    assert committed(place)[-1] == newest
    assert "stopping after this step, with a checkpoint; a second Ctrl-C ends at once" in driver.log()
    assert f"nexus-ray: stopped at step {newest} of stage 'south', with a checkpoint" in driver.log()
    assert "Traceback" not in driver.log()
    assert record(place)["outcome"] == "interrupted" and not (place / "control" / "stop").exists()
    assert wait_gone(family, 15) == []

    runs.complete(begun)
    assert repeated(place) == set()
    same_curve(place, runs.place(REFERENCE))
    same_scores(place, runs.place(REFERENCE))
    assert record(place)["outcome"] == "done"


def _second_process_is_refused(runs: Runs, name: str, workers: list[psutil.Process]) -> None:
    """While the first one stands still, so that it cannot end by itself."""
    for worker in workers:
        worker.suspend()
    try:
        before = max(steps(runs.place(name)))
        second = runs.start(name)
        assert second.wait() == 1, second.log()
        assert "run.lock is held by process" in second.log() and "wait for it, or end that process" in second.log()
        assert "Traceback" not in second.log()
        assert record(runs.place(name))["outcome"] == "running"
        assert max(steps(runs.place(name))) <= before + 1
    finally:
        for worker in workers:
            worker.resume()


def _files(place: Path) -> dict[str, str]:
    """Digests of everything that a finished run is made of."""
    files = [place / name for name in ("metrics.jsonl", "plan.jsonl", "scores.json", "config.yaml")]
    files += [file for part in ("base", "stages") for file in (place / part).rglob("*") if file.is_file()]
    return {str(file.relative_to(place)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_finished_run_is_not_run_again(runs: Runs) -> None:
    """The same command exits 0 and changes no number, checkpoint or model."""
    place = runs.place(REFERENCE)
    before, fits = _files(place), len(list(place.glob("control/ray/*")))
    driver = runs.complete(REFERENCE)
    assert _files(place) == before
    assert len(list(place.glob("control/ray/*"))) == fits, "training workers were started for nothing"
    assert driver.log().count("finished before, skipped") == 2
    assert record(place)["outcome"] == "done" and len(steps(place)) == STEPS
