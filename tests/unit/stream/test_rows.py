"""Workers share every global batch exactly: nothing repeated, nothing lost, for any number of them."""

from __future__ import annotations

import pickle
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.corpora.reader import PAD
from nexus_ray.stream.plan import Plan, Segment, Source
from nexus_ray.stream.rows import RankRows, StageStream, row_hashes
from tests.shards import random_documents, write_manifest

SEQ_LEN = 16


@cache
def _manifests() -> dict:
    root = Path(mkdtemp(prefix="nexus-rows-"))
    return {
        name: write_manifest(root / name, name, random_documents(60, seed=seed), shards=2)
        for seed, name in enumerate(("new", "old"))
    }


def stream(*, rows_per_step: int, steps: int, skip: int = 0, seed: int = 0) -> StageStream:
    """A stage of new text with a quarter of replay, behind `skip` rows of an earlier stage."""
    manifests = _manifests()
    sources = {name: Source(m.fingerprint, len(m.shards), m.rows(SEQ_LEN)) for name, m in manifests.items()}
    segments = [
        Segment(name, index, 0, start, rows, {"new": 3, "old": 1}, 4, ("old",), 0.25, sources)
        for name, index, start, rows in [("first", 0, 0, skip), ("second", 1, skip, rows_per_step * steps)]
        if rows
    ]
    plan = Plan(seed, SEQ_LEN, 64).append(segments)
    return StageStream(plan, manifests, skip, rows_per_step, steps)


def parts(s: StageStream, world: int, *, first: int = 0, steps: int | None = None) -> list[RankRows]:
    per_rank = -(-s.rows_per_step // world)
    steps = s.steps - first if steps is None else steps
    return [s.part(first, steps, rank=rank, rows_per_rank=per_rank) for rank in range(world)]


@given(st.integers(1, 13), st.integers(1, 4), st.integers(0, 9), st.integers(1, 7))
@settings(deadline=None, max_examples=60)
def test_the_parts_of_all_workers_are_the_global_batch_in_order(
    rows_per_step: int, steps: int, skip: int, world: int
) -> None:
    """Step by step, the workers' rows laid end to end are the plan's rows, and the rest is padding without loss."""
    s = stream(rows_per_step=rows_per_step, steps=steps, skip=skip)
    whole = parts(s, 1)[0]
    assert whole.position.tolist() == list(range(skip, skip + rows_per_step * steps))
    shares = parts(s, world)
    per_rank = -(-rows_per_step // world)
    assert {len(share) for share in shares} == {per_rank * steps}
    for step in range(steps):
        here = [share[step * per_rank : (step + 1) * per_rank] for share in shares]
        real = np.concatenate([share.position for share in here]) >= 0
        batch = whole[step * rows_per_step : (step + 1) * rows_per_step]
        for name in ("position", "tokens", "domain", "row", "replayed"):
            together = np.concatenate([getattr(share, name) for share in here])
            assert np.array_equal(together[real], getattr(batch, name)), name
        padded = np.concatenate([share.tokens for share in here])[~real]
        assert (padded == PAD).all()
        assert not np.concatenate([share.replayed for share in here])[~real].any()
        assert (np.concatenate([share.domain for share in here])[~real] == -1).all()


@given(st.integers(1, 13), st.integers(1, 7), st.integers(0, 50))
@settings(deadline=None, max_examples=40)
def test_the_batch_hash_is_additive_over_workers(rows_per_step: int, world: int, skip: int) -> None:
    """Each worker hashes its own rows; the sum is the hash of the batch, padding adds nothing."""
    s = stream(rows_per_step=rows_per_step, steps=1, skip=skip)
    total = sum(row_hashes(part) for part in parts(s, world)) & ((1 << 62) - 1)
    assert total == row_hashes(parts(s, 1)[0])


def test_the_batch_hash_sees_every_token_and_every_position() -> None:
    """One changed token, two rows exchanged, or a row moved to another place: another hash."""
    rows = parts(stream(rows_per_step=6, steps=1), 1)[0]
    seen = {row_hashes(rows)}
    for row in range(len(rows)):
        for column in range(SEQ_LEN + 1):
            tokens = rows.tokens.copy()
            tokens[row, column] ^= 1
            seen.add(row_hashes(RankRows(tokens, rows.position, rows.domain, rows.row, rows.replayed)))
    assert len(seen) == 1 + 6 * (SEQ_LEN + 1)
    swapped = rows.tokens[[1, 0, 2, 3, 4, 5]]
    assert row_hashes(RankRows(swapped, rows.position, rows.domain, rows.row, rows.replayed)) not in seen
    assert row_hashes(RankRows(rows.tokens, rows.position + 1, rows.domain, rows.row, rows.replayed)) not in seen


@given(st.integers(0, 5), st.integers(1, 3), st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_a_chunk_of_steps_equals_its_steps_one_by_one(first: int, steps: int, world: int) -> None:
    """How many steps a block holds changes no row."""
    s = stream(rows_per_step=5, steps=8)
    for rank, chunk in enumerate(parts(s, world, first=first, steps=steps)):
        single = [s.part(first + k, 1, rank=rank, rows_per_rank=-(-5 // world)) for k in range(steps)]
        assert np.array_equal(chunk.tokens, np.concatenate([part.tokens for part in single]))
        assert np.array_equal(chunk.position, np.concatenate([part.position for part in single]))


def test_a_stream_is_the_same_in_another_process() -> None:
    """It is pickled to data tasks and workers without its open readers."""
    s = stream(rows_per_step=4, steps=3)
    before = parts(s, 2)
    again = pickle.loads(pickle.dumps(s))
    assert again == s and not again._readers
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(before, parts(again, 2), strict=True))
