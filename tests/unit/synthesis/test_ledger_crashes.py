"""The same bytes whatever the order of arrival and wherever the job is cut off, and nothing asked again."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.synthesis.commit import kept_rows
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.plan import load_plan
from tests.ledger_job import CHILDREN, JOB, Crash, Fuse, FusedStorage, Resends, determined, logged, run_job

KINDS = {
    "between": {},
    "within": {"torn": True},
    "power cut": {"power": True},
    "power cut within": {"torn": True, "power": True},
}
"""What happens to the change at which the job dies, and to what was not synced."""


@pytest.fixture(scope="module", autouse=True)
def _syncs_are_seen() -> Iterator[None]:
    """Syncs of appended files are counted and remembered, and left out: no disk is tested here."""
    real, os.fsync = os.fsync, lambda descriptor: FusedStorage.FUSE.sync(descriptor)
    yield
    os.fsync = real


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a place: thousands of files are made and renamed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the uninterrupted job leaves."""
    folder = tmp_path_factory.mktemp("whole")
    attempt(storage(folder), Fuse(), seed=0)
    return determined(folder)


def storage(folder: Path, *, remote: bool = False) -> FusedStorage:
    return FusedStorage(f"remote://{folder}" if remote else str(folder))


def attempt(place: FusedStorage, fuse: Fuse, *, seed: int) -> None:
    """Run the job until it ends or the fuse blows; `seed` decides the order of everything.

    The teacher fails the test if it is asked for an answer that the logs held when the run began.
    """
    FusedStorage.FUSE = Fuse()
    answered, _ = logged(place)

    def ask(id: str) -> None:
        assert id not in answered, "an answer that reached the log was asked for again"

    FusedStorage.FUSE = fuse
    try:
        run_job(place, seed, ask)
    except Crash:
        assert fuse.blown
    finally:
        FusedStorage.FUSE = Fuse()


def crash_and_go_on(place: FusedStorage, fuses: list[Fuse], *, seed: int) -> set[str]:
    """Run into each fuse and then to the end; returns the requests in flight after the last of them.

    Every request that was in flight when an attempt began, and that it sent, counts as resent in the end.
    """
    resent, waiting = 0, set[str]()
    for number, fuse in enumerate([*fuses, Fuse()]):
        _, waiting = logged(place)
        resends = Resends(place)
        attempt(place, fuse, seed=seed + number)
        resent += resends.count()
    stats = Ledger(place, JOB).stats()
    assert (stats.answered, stats.failed, stats.traffic.resent) == (6, 2, resent)
    return waiting


def changes(place: FusedStorage, *, seed: int) -> int:
    """How often the whole job changes the storage."""
    fuse = Fuse()
    attempt(place, fuse, seed=seed)
    return fuse.count


@pytest.mark.parametrize("kind", ["between", "power cut within"])
def test_every_crash_point_leads_to_the_same_bytes(folder: Path, whole: dict[str, bytes], kind: str) -> None:
    """Each change of a local disk in turn is the last one of its process."""
    total = changes(storage(folder / "count"), seed=1)
    assert total > 50
    for at in range(total):
        place = storage(folder / "job")
        fuse = Fuse(at, **KINDS[kind])
        waiting = crash_and_go_on(place, [fuse], seed=1)
        assert fuse.blown and Ledger(place, JOB).stats().traffic.resent == len(waiting)
        assert determined(folder / "job") == whole, f"crash at change {at}"
        shutil.rmtree(folder / "job")


def test_every_crash_point_in_an_object_store(folder: Path, whole: dict[str, bytes]) -> None:
    total = changes(storage(folder / "count", remote=True), seed=1)
    for at in range(total):
        place = storage(folder / "job", remote=True)
        fuse = Fuse(at)
        waiting = crash_and_go_on(place, [fuse], seed=1)
        assert fuse.blown and Ledger(place, JOB).stats().traffic.resent == len(waiting)
        assert determined(folder / "job") == whole, f"crash at change {at}"
        shutil.rmtree(folder / "job")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.sampled_from(sorted(KINDS))), max_size=4),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_any_order_and_any_series_of_crashes(
    whole: dict[str, bytes], crashes: list[tuple[int, str]], seed: int, remote: bool
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        place = storage(Path(name), remote=remote)
        crash_and_go_on(place, [Fuse(at, **KINDS[kind]) for at, kind in crashes], seed=seed)
        assert determined(Path(name)) == whole


def test_the_job_has_everything_that_can_go_wrong(folder: Path, whole: dict[str, bytes]) -> None:
    """Two shards twice, an answer with nothing but bad rows, duplicates of rows of earlier shards and of the time
    before the job was extended, a shard without answers, and two batches of decisions."""
    assert {name for name in whole if "/" in name} == {
        *(f"plan/shard-0000{n}.parquet" for n in range(4)),
        *(f"{kind}/part-0000{n}.parquet" for kind in ("accepted", "rejected") for n in range(3)),
        *(f"review/part-0000{n}.parquet" for n in (0, 2)),
        *(f"{kind}/decided-0000{n}.parquet" for kind in ("accepted", "rejected") for n in range(2)),
    }
    ledger = run_job(storage(folder), 0, lambda id: None)
    plan = load_plan(ledger.folder)
    assert plan is not None
    kept = list(kept_rows(ledger.folder, plan, ledger.manifest()))
    assert len({row.text for row in kept}) == len(kept)
    first = {row.text for row in kept if row.request_id in ledger.requests(0)}
    for shard in (1, 2):
        repeated = [row for row in ledger.rows("rejected") if row.provenance["shard"] == shard and row.text in first]
        assert {"duplicate: exact"} <= {row.reason for row in repeated}
    bad = [row for row in ledger.rows("rejected") if row.text.startswith("bad")]
    assert len(bad) == CHILDREN and len({row.provenance["request"] for row in bad}) == 1
