"""SIGKILL of a whole synthesis job at random points: the same rows in the end, and no logged answer asked for again.

The contrast, measured on two cores with the same shape of job (one prompt makes ten rows, a filter drops some): Ray
Data 2.60's own checkpoint (`CheckpointConfig(id_column=...)`) marks a prompt done when the first of its rows is
written. After a crash and a resume that reports success, 70, 75 and 75 of 80 rows were there in three runs; with a
filter behind the paid step, a rerun of a job that was complete made 48 of 100 calls again, because rows that the filter
drops leave no trace. An id made after the fan-out cannot be resumed from at all (KeyError at the reader).
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus_ray.storage import Storage
from nexus_ray.synthesis.ledger import Ledger
from tests.ledger_job import CHILDREN, JOB, Resends, determined, logged, run_recorded

pytestmark = [pytest.mark.fault, pytest.mark.timeout(280)]
KILLS = 30
TARGET, TARGET_KILLS = 19, 10
PROMPTS = (4, 8)
REQUESTS, ANSWERS = 16, 12
"""Every fourth prompt gets no answer."""
PAUSE_S = 0.005
"""What the teacher needs for an answer, on average."""


def _start(*arguments: object, target: int | None = None) -> multiprocessing.process.BaseProcess:
    """`run_recorded` in a process that holds nothing of this one, forked from one that has imported all it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ledger_job", "pandas"])  # pyarrow looks for pandas at its first conversion
    process = context.Process(target=run_recorded, args=(*arguments, PROMPTS, PAUSE_S, target))
    process.start()
    return process


def _asked(record: Path) -> list[str]:
    return record.read_text().split() if record.exists() else []


def _whole_job(folder: Path, target: int | None = None) -> tuple[dict[str, bytes], float]:
    """What comes of a job that nobody kills, and for how long its processes may live if most are to be killed."""
    for name in ("first", "whole"):  # the first one with imports
        start = time.monotonic()
        process = _start(str(folder / name), str(folder / "asked"), 0, target=target)
        process.join()
        life_s = 0.9 * (time.monotonic() - start)
    return determined(folder / "whole"), life_s


def _one_job(
    place: Path, record: Path, rng: random.Random, life_s: float, target: int | None = None
) -> tuple[int, int]:
    """Run a job in processes that are killed at random times until one reaches its end; returns how many were killed,
    and how many requests were sent again that a kill had left in flight. No process may ask for what was in the logs
    when it began."""
    kills = resent = 0
    storage = Storage(str(place))
    while True:
        answered, _ = logged(storage)
        resends, before = Resends(storage), len(_asked(record))
        process = _start(str(place), str(record), rng.randrange(2**32), target=target)
        process.join(rng.uniform(0.0, life_s))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), "it ended by itself, and badly"
        assert answered.isdisjoint(_asked(record)[before:]), "a logged answer was asked for again"
        resent += resends.count()
        if process.exitcode == 0:
            return kills, resent
        kills += 1


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a place: what a dead process has written stays, synced or not."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name)


def test_a_killed_job_goes_on_as_if_nothing_had_happened(folder: Path) -> None:
    """Jobs whose every process is killed at some random time, and goes on in another order, until 30 kills are had:
    each ends with the bytes of the uninterrupted one. Requests are asked twice only if they were in flight at a kill,
    and those are the ones counted as resent."""
    whole, life_s = _whole_job(folder)
    assert any(name.startswith("rejected/") for name in whole)
    rng, kills, resent, jobs = random.Random(), 0, 0, 0
    while kills < KILLS:
        place, record, jobs = folder / f"job{jobs}", folder / f"asked{jobs}", jobs + 1
        killed, again = _one_job(place, record, rng, life_s)
        assert determined(place) == whole
        ledger = Ledger(Storage(str(place)), JOB)
        stats = ledger.stats()
        assert (stats.planned, stats.answered, stats.traffic.resent) == (REQUESTS, ANSWERS, again)
        assert stats.accepted + stats.rejected == ANSWERS * CHILDREN, "every row is in one part"
        answered, _ = logged(ledger.folder)
        asked = Counter(id for id in _asked(record) if id in answered)
        assert len(asked) == ANSWERS and asked.total() - ANSWERS <= again
        kills, resent = kills + killed, resent + again
    assert resent > 0, "no kill hit a request in flight"
    print(f"{kills} kills in {jobs} jobs, {resent} requests sent again")


def test_a_killed_job_with_a_target_ends_with_the_same_shards(folder: Path) -> None:
    """Which shards are complete at the target differs from job to job, and which are committed does not."""
    whole, life_s = _whole_job(folder, TARGET)
    rng, kills, jobs, complete = random.Random(), 0, 0, set()
    while kills < TARGET_KILLS or len(complete) < 2:
        place, record, jobs = folder / f"job{jobs}", folder / f"asked{jobs}", jobs + 1
        kills += _one_job(place, record, rng, life_s, TARGET)[0]
        assert determined(place) == whole
        ledger = Ledger(Storage(str(place)), JOB)
        complete.add(tuple(shard for shard in ledger.open_shards() if ledger.is_complete(shard)))
    assert ledger.manifest().rows("accepted") >= TARGET and len(ledger.open_shards()) > 0
