"""SIGKILL of a study's driver at random points: what was logged stays, and it ends as an undisturbed one."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import Driver, until
from tests.tuned import STEPS, decided, events, finished, record, write_tiny_study

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(3600)]


def start(folder: Path, name: str, drivers: list[Driver]) -> Driver:
    file = write_tiny_study(folder, name=name)
    argv = [sys.executable, "-m", "nexus_ray.cli", "tune", str(file)]
    drivers.append(Driver(argv, record(folder, name), folder / f"{name}-{len(drivers)}.log"))
    return drivers[-1]


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    made: list[Driver] = []
    yield made
    for driver in made:
        driver.end()


def ended(driver: Driver) -> int:
    """The exit code of a whole study, which takes a minute or two, and much longer on a machine that has other work."""
    return driver.process.wait(1200)


def scores(folder: Path, name: str) -> dict[str, bytes]:
    """What each finished run came to, by trial."""
    files = (folder / "runs").glob(f"{name}-*-s0/scores.json")
    return {file.parent.name.removeprefix(f"{name}-"): file.read_bytes() for file in files}


def kill(driver: Driver) -> bool:
    """Kill the driver alone; what it leaves behind notices by itself. Whether it was alive until then."""
    driver.family()
    if driver.process.poll() is not None:
        return False
    driver.signal(signal.SIGKILL)
    return driver.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kills", [2, 5])
def test_a_killed_study_ends_as_an_undisturbed_one(tmp_path: Path, drivers: list[Driver], kills: int) -> None:
    seed = random.randrange(2**32)
    chosen = random.Random(seed)
    assert ended(start(tmp_path, "whole", drivers)) == 0, drivers[-1].log()
    whole = events(tmp_path, "whole")
    hits = draws = 0
    while hits < kills and draws < 3 * kills:  # a driver that ended before it was hit is drawn again
        before = events(tmp_path, "killed") if record(tmp_path, "killed").exists() else []
        driver = start(tmp_path, "killed", drivers)
        left = len(decided(whole)) - len(decided(before))
        wanted = len(decided(before)) + chosen.randint(1, max(1, left // (kills - hits + 1)))
        if hits % 3 == 2:  # anywhere, the start of Ray included
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.process.wait(chosen.uniform(0.0, 20.0))
        else:
            until(lambda d=driver, n=wanted: d.process.poll() is not None or reached(tmp_path, n), "events")
        draws += 1
        hits += kill(driver)
        after = events(tmp_path, "killed") if record(tmp_path, "killed").exists() else []
        assert after[: len(before)] == before, f"seed {seed}: what was logged has changed"
    assert hits == kills, f"seed {seed}: {hits} of {draws} kills hit a living study"
    last = start(tmp_path, "killed", drivers)
    assert ended(last) == 0, f"seed {seed}\n{last.log()}"
    assert decided(events(tmp_path, "killed")) == decided(whole), f"seed {seed}"
    assert len(scores(tmp_path, "whole")) == 2
    assert scores(tmp_path, "killed") == scores(tmp_path, "whole"), f"seed {seed}"
    assert (record(tmp_path, "killed") / "results.csv").read_text() == (
        record(tmp_path, "whole") / "results.csv"
    ).read_text()


def reached(folder: Path, count: int) -> bool:
    return record(folder, "killed").exists() and len(decided(events(folder, "killed"))) >= count


def test_ctrl_c_saves_what_runs_and_the_same_command_goes_on(tmp_path: Path, drivers: list[Driver]) -> None:
    driver = start(tmp_path, "asked", drivers)
    until(lambda: list((tmp_path / "runs").glob("asked-*-s0/metrics.jsonl")), "a step")
    driver.signal(signal.SIGINT)
    assert driver.wait() == 130, driver.log()
    assert "the same command goes on there" in driver.log() and "Traceback" not in driver.log()
    again = start(tmp_path, "asked", drivers)
    assert ended(again) == 0, again.log()
    states = finished(events(tmp_path, "asked"))
    assert sorted(states.values()) == ["finished", "finished", "paused", "paused"]
    for place in (tmp_path / "runs").glob("asked-*-s0"):
        assert len((place / "metrics.jsonl").read_text().splitlines()) <= STEPS, f"{place} trained a step twice"
