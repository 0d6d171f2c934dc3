"""SIGKILL of the whole `nexus-ray synthesize`, Ray and all: the same accepted rows, no logged answer asked for again.

`test_synthesis_ledger.py` does the same thirty times in a second each, without Ray, and holds the contrast with Ray
Data's own checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.storage import Storage
from nexus_ray.synthesis.ledger import Ledger
from tests.fault_server import FaultServer, Rule
from tests.faults.runs import Driver, until
from tests.jobs import job_file
from tests.ledger_job import logged

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(3000)]
PROMPTS, CANDIDATES, ITEMS = 60, 2, 10
REQUESTS = PROMPTS * CANDIDATES


def start(folder: Path, server: FaultServer, name: str) -> Driver:
    filters = {"length": {"min_words": 3}, "language": None, "repetition": None, "near": {}, "novelty": None}
    file = job_file(folder, server.url, name=name, prompts=PROMPTS, filters=filters, workers=2, shard_requests=10)
    argv = [sys.executable, "-m", "nexus_ray.cli", "synthesize", str(file)]
    return Driver(argv, folder / "runs" / name, folder / f"{name}.log")


def ledger(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "synthesis" / "sentences"


def parts(place: Path) -> dict[str, bytes]:
    """Accepted and rejected rows, and the manifest, as they lie on the disk."""
    files = [place / "manifest.json", *place.glob("accepted/*"), *place.glob("rejected/*")]
    return {str(file.relative_to(place)): file.read_bytes() for file in files}


def answers(place: Path) -> int:
    """Whole answers in the logs of all shards."""
    return len(logged(Storage(str(place)))[0])


def reached(driver: Driver, place: Path, wanted: int) -> None:
    """Wait until so many answers are logged, or the driver has ended."""
    until(lambda: driver.process.poll() is not None or answers(place) >= wanted, "answers")


@pytest.mark.parametrize("kills", [2, 30])
def test_killed_at_random_points_the_job_ends_with_the_same_rows(tmp_path: Path, kills: int) -> None:
    seed = random.randrange(2**32)
    chosen = random.Random(seed)
    with FaultServer(Rule("500", share=0.1, times=1), items=ITEMS, delay_s=0.02) as server:
        whole = start(tmp_path, server, "whole")
        assert whole.wait() == 0, whole.log()
        server.calls.clear()
        place = ledger(tmp_path, "killed")
        server._attempts.clear()
        server.delay_s = 0.4
        for number in range(kills):
            driver = start(tmp_path, server, "killed")
            if number % 5 == 4:  # anywhere, the start of Ray included
                with contextlib.suppress(subprocess.TimeoutExpired):
                    driver.process.wait(chosen.uniform(0.0, 15.0))
            else:
                reached(driver, place, min(REQUESTS - 1, answers(place) + chosen.randint(1, 2 * REQUESTS // kills)))
            driver.family()
            driver.end()
        last = start(tmp_path, server, "killed")
        assert last.wait() == 0, f"seed {seed}\n{last.log()}"
    assert parts(place) == parts(ledger(tmp_path, "whole")), f"seed {seed}"
    stats: dict[str, Any] = json.loads((place / "summary.json").read_text())["stats"]
    traffic = stats["traffic"]
    assert stats["answered"] == REQUESTS and traffic["sent"] == REQUESTS + traffic["resent"], f"seed {seed}"
    assert traffic["resent"] > 0, "no kill found a call in flight"
    assert len([call for call in server.calls if call.outcome == "ok"]) <= traffic["sent"]
    assert Ledger.load(Storage(str(place))).stats().accepted == stats["accepted"] > 0
