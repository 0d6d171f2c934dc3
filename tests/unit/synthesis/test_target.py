"""Which shards a target lets in does not depend on which of them ended first."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nexus_ray.storage import Storage
from nexus_ray.synthesis.ledger import Ledger
from tests.ledger_job import JOB, SHARD_REQUESTS, Duplicates, determined, requests, work

SHARDS = 8


def run(folder: Path, order: list[int], target: int) -> Ledger:
    """Finish the shards in that order, until the target is reached."""
    ledger = Ledger(Storage(str(folder)), JOB)
    ledger.plan(requests(SHARDS), shard_requests=SHARD_REQUESTS)
    with ledger.committer(Duplicates()) as committer:
        committer.commit(target=target)
        for shard in order:
            if committer.reached(target):
                break
            with ledger.write(shard) as log:
                work(log, random.Random(shard), lambda id: None)
            committer.commit(target=target)
    return ledger


@pytest.mark.parametrize("target", [1, 9, 12])
def test_shards_ending_in_another_order_give_the_same_rows(tmp_path: Path, target: int) -> None:
    orders = [list(range(SHARDS)), list(reversed(range(SHARDS))), random.Random(0).sample(range(SHARDS), SHARDS)]
    ledgers = [run(tmp_path / str(number), order, target) for number, order in enumerate(orders)]
    first, *others = [determined(tmp_path / str(number)) for number in range(len(orders))]
    assert others == [first, first]
    assert ledgers[0].stats().accepted >= target and ledgers[0].manifest().shards < SHARDS
    assert ledgers[1].is_complete(SHARDS - 1), "a complete shard stays out"


def test_a_rerun_takes_in_no_more_and_a_higher_target_does(tmp_path: Path) -> None:
    for name, order in (("forth", list(range(SHARDS))), ("back", list(reversed(range(SHARDS))))):
        shards = run(tmp_path / name, order, 9).manifest().shards
        assert run(tmp_path / name, [], 9).manifest().shards == shards
        rest = [shard for shard in range(SHARDS) if not Ledger(Storage(str(tmp_path / name)), JOB).is_complete(shard)]
        run(tmp_path / name, rest, 12)
    assert determined(tmp_path / "forth") == determined(tmp_path / "back")
