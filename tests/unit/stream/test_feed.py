"""A worker trains on the planned rows whatever Ray Data does: late, gone, skipping, failing, or of another plan."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nexus_ray.stream.feed as feed_module
from nexus_ray.stream.feed import CHUNK_BYTES, MAX_BLOCKS, Feed, steps_per_chunk
from nexus_ray.stream.loader import from_table, to_table
from nexus_ray.stream.plan import Plan, Segment, Source
from nexus_ray.stream.rows import RankRows, StageStream
from tests.shards import random_documents, write_manifest

SEQ_LEN, ROWS, STEPS, CHUNK = 16, 6, 12, 3
Block = tuple[int, RankRows]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> StageStream:
    root: Path = tmp_path_factory.mktemp("feed")
    manifests = {name: write_manifest(root / name, name, random_documents(80, seed=i)) for i, name in enumerate("ab")}
    sources = {name: Source(m.fingerprint, len(m.shards), m.rows(SEQ_LEN)) for name, m in manifests.items()}
    segment = Segment("s", 0, 0, 0, ROWS * STEPS, {"a": 2, "b": 1}, 3, ("b",), 1 / 3, sources)
    return StageStream(Plan(0, SEQ_LEN, 64).append([segment]), manifests, 0, ROWS, STEPS)


def block(stream: StageStream, first: int, *, steps: int = CHUNK, rank: int = 0, world: int = 1) -> Block:
    return first, stream.part(first, min(steps, STEPS - first), rank=rank, rows_per_rank=-(-ROWS // world))


def make(
    stream: StageStream, blocks: Callable[[int], Iterator[Block]] | None, *, rank: int = 0, world: int = 1
) -> tuple[Feed, list[str]]:
    said: list[str] = []
    per_rank = -(-ROWS // world)
    feed = Feed(stream, rank=rank, rows_per_rank=per_rank, chunk_steps=CHUNK, blocks=blocks, warn=said.append)
    feed.start(0)
    return feed, said


def all_steps(feed: Feed, stream: StageStream, *, first: int = 0, rank: int = 0, world: int = 1) -> None:
    """Every batch of the feed is the plan's."""
    for step in range(first, STEPS):
        got = feed.batch(step)
        expected = stream.part(step, 1, rank=rank, rows_per_rank=-(-ROWS // world))
        for name in ("tokens", "position", "domain", "row", "replayed"):
            assert np.array_equal(getattr(got, name), getattr(expected, name)), (step, name)


def wait_for_a_block(feed: Feed) -> None:
    deadline = time.monotonic() + 10
    while feed._queue is not None and feed._queue.empty():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def given(blocks: Iterable[Block]) -> Callable[[int], Iterator[Block]]:
    return lambda step: iter(list(blocks))


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2), (1, 4), (3, 4)])
def test_blocks_and_own_reads_are_the_same_rows(stream: StageStream, rank: int, world: int) -> None:
    """A block that crossed processes as an Arrow table is bit for bit what the worker would have read."""
    blocks = [from_table(to_table(*block(stream, k, rank=rank, world=world))) for k in range(0, STEPS, CHUNK)]
    feed, said = make(stream, given(blocks), rank=rank, world=world)
    wait_for_a_block(feed)
    all_steps(feed, stream, rank=rank, world=world)
    assert feed.local_steps == 0 and said == []
    alone, _ = make(stream, None, rank=rank, world=world)
    all_steps(alone, stream, rank=rank, world=world)
    assert alone.local_steps == STEPS


def test_the_first_steps_do_not_wait_for_ray_data(stream: StageStream) -> None:
    """While Ray Data starts, the worker reads by itself; blocks it has passed are dropped, the others are used."""
    go = threading.Event()

    def late(step: int) -> Iterator[Block]:
        go.wait(10)
        yield from (block(stream, k) for k in range(0, STEPS, CHUNK))

    feed, said = make(stream, late)
    for step in range(5):
        feed.batch(step)
    assert feed.waited_s < 5 and not go.is_set()
    local = feed.local_steps
    assert local >= 5
    go.set()
    wait_for_a_block(feed)
    all_steps(feed, stream, first=5)
    assert feed.local_steps <= local + CHUNK  # at most up to the next block's border
    assert said == []


def test_a_resumed_stage_begins_in_the_middle_of_a_block(stream: StageStream) -> None:
    """Blocks cut from step 0 on serve a worker that starts at step 4."""
    feed, said = make(stream, given(block(stream, k) for k in range(0, STEPS, CHUNK)))
    wait_for_a_block(feed)
    all_steps(feed, stream, first=4)
    assert feed.local_steps == 0 and said == []


def test_after_the_first_block_a_late_one_is_waited_for_and_then_read(
    stream: StageStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stalled Ray Data costs patience once a chunk, never the run; the worker says so."""
    monkeypatch.setattr(feed_module, "PATIENCE_S", 0.05)
    stop = threading.Event()

    def stalls(step: int) -> Iterator[Block]:
        yield block(stream, 0)
        stop.wait(30)

    feed, said = make(stream, stalls)
    wait_for_a_block(feed)
    all_steps(feed, stream)
    stop.set()
    assert feed.local_steps == STEPS - CHUNK and feed.waited_s > 0.05
    assert any("delivered nothing for" in text and "step 3" in text for text in said)


def test_skipped_steps_are_read_directly_and_the_block_behind_them_is_used(stream: StageStream) -> None:
    """A gap of any length is filled chunk by chunk and told once; it does not cost the blocks that follow."""
    feed, said = make(stream, given([block(stream, 0), block(stream, 9)]))
    wait_for_a_block(feed)
    all_steps(feed, stream)
    assert feed.local_steps == 6
    assert said == ["Ray Data skipped from step 3 to 9; reading directly"]


def test_a_worker_that_resumes_before_the_first_block_uses_all_blocks(stream: StageStream) -> None:
    """The newest checkpoint is torn, so the worker goes on earlier than the data begins: only the gap is its own."""
    feed, _ = make(stream, given(block(stream, k) for k in range(6, STEPS, CHUNK)))
    wait_for_a_block(feed)
    all_steps(feed, stream, first=4)
    assert feed.local_steps == 2


@pytest.mark.parametrize("damage", ["row", "domain", "position"])
def test_a_block_of_another_plan_is_not_used(stream: StageStream, damage: str) -> None:
    """Blocks are checked against the plan the worker knows: a wrong one is replaced, the next right one is used."""
    first, rows = block(stream, 0)
    wrong = replace(rows, **{damage: getattr(rows, damage)[::-1].copy()})
    feed, _ = make(stream, given([(first, wrong), *(block(stream, k) for k in range(CHUNK, STEPS, CHUNK))]))
    wait_for_a_block(feed)
    all_steps(feed, stream)
    assert feed.local_steps == CHUNK


def test_a_block_of_another_worker_is_not_used(stream: StageStream) -> None:
    """Right rows in the wrong hands would be trained on twice, and others never."""
    blocks = [block(stream, k, rank=1, world=2) for k in range(0, STEPS, CHUNK)]
    feed, _ = make(stream, given(blocks), rank=0, world=2)
    wait_for_a_block(feed)
    all_steps(feed, stream, rank=0, world=2)
    assert feed.local_steps == STEPS


@pytest.mark.parametrize("rows", [2 * ROWS + 1, ROWS - 1, 0])
def test_a_block_that_was_cut_is_not_used(stream: StageStream, rows: int) -> None:
    """Ray Data may split a block to make shares equal; whatever is left of it, the batches stay whole."""
    whole = block(stream, 0)[1]
    feed, _ = make(stream, given([(0, whole[:rows]), block(stream, CHUNK)]))
    wait_for_a_block(feed)
    all_steps(feed, stream)
    assert feed.local_steps < STEPS


def test_a_block_beyond_the_stage_is_not_used(stream: StageStream) -> None:
    """A plan that has been cut leaves the worker's own stage as it is."""
    tokens = np.concatenate([block(stream, 9)[1].tokens] * 2)
    rows = block(stream, 9)[1]
    columns = [np.concatenate([column] * 2) for column in (rows.position, rows.domain, rows.row, rows.replayed)]
    feed, _ = make(stream, given([(9, RankRows(tokens, *columns))]))
    wait_for_a_block(feed)
    all_steps(feed, stream, first=9)
    assert feed.local_steps == 3


@pytest.mark.parametrize("after", [0, 2])
def test_a_failing_ray_data_does_not_fail_the_stage(stream: StageStream, after: int) -> None:
    """The error is said, and the rest is read directly."""

    def fails(step: int) -> Iterator[Block]:
        for k in range(after):
            yield block(stream, k * CHUNK)
        raise RuntimeError("object store full")

    feed, said = make(stream, fails)
    wait_for_a_block(feed)
    all_steps(feed, stream)
    assert feed.local_steps == STEPS - after * CHUNK
    assert said == ["Ray Data stopped (RuntimeError: object store full); reading the rest directly"]


def test_a_stream_that_ends_early_is_completed(stream: StageStream) -> None:
    """A tail that Ray Data drops is no tail lost."""
    feed, said = make(stream, given([block(stream, 0)]))
    wait_for_a_block(feed)
    all_steps(feed, stream)
    assert feed.local_steps == STEPS - CHUNK and said == []


def test_chunks_are_of_the_size_asked_for_and_not_too_many(stream: StageStream) -> None:
    """Whole steps; a long stage of tiny steps does not drown Ray Data in blocks."""
    assert steps_per_chunk(stream, rows_per_rank=6, world=1) == CHUNK_BYTES // (6 * 4 * (SEQ_LEN + 1))
    assert steps_per_chunk(stream, rows_per_rank=6, world=1, chunk_bytes=1) == 1
    long = replace(stream, steps=10 * MAX_BLOCKS)
    assert steps_per_chunk(long, rows_per_rank=6, world=3, chunk_bytes=1) == 30
