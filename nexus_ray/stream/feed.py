"""What a training worker draws its batches from: blocks that Ray Data read ahead, checked against the plan.

Rows are a pure function of the position, so the worker reads the first steps itself while Ray Data starts up, checks
every block against the plan it knows, and can always fall back to reading a chunk on its own. No state lives here.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nexus_ray.stream.rows import RankRows, StageStream

CHUNK_BYTES = 32 * 2**20
"""Size of one worker's block of rows, about: several windows of the shuffle, so that few are read for two blocks."""
MAX_BLOCKS = 20_000
LEAD_BYTES = 2**18
"""The worker reads ahead this much by itself until Ray Data delivers."""
PATIENCE_S = 120.0
"""After the first block, how long a late one is waited for before the worker reads it by itself."""


def steps_per_chunk(stream: StageStream, *, rows_per_rank: int, world: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Whole steps in one block: about `chunk_bytes`, and never more than `MAX_BLOCKS` blocks in a stage."""
    row_bytes = 4 * (stream.plan.seq_len + 1)
    by_size = chunk_bytes // (rows_per_rank * row_bytes)
    by_count = -(-stream.steps * world // MAX_BLOCKS)
    return max(1, by_size, by_count)


@dataclass
class _Chunk:
    first_step: int
    num_steps: int
    rows: RankRows


class Feed:
    """Batches of one worker, step by step. `blocks`, given a step, yields Ray Data's (first step, rows) from there on
    in order; until `start`, and without it, this worker reads by itself."""

    def __init__(
        self,
        stream: StageStream,
        *,
        rank: int,
        rows_per_rank: int,
        chunk_steps: int,
        blocks: Callable[[int], Iterator[tuple[int, RankRows]]] | None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._stream, self._rank, self._rows_per_rank, self._chunk_steps = stream, rank, rows_per_rank, chunk_steps
        self._lead_steps = max(1, min(chunk_steps, LEAD_BYTES // (4 * (stream.plan.seq_len + 1) * rows_per_rank)))
        self._warn = warn
        self._chunk: _Chunk | None = None
        self._started = False
        self._ahead: tuple[int, RankRows] | None = None  # a block whose steps are still to come
        self.waited_s = 0.0
        """Seconds spent waiting for data so far."""
        self.local_steps = 0
        """Steps whose rows this worker read by itself."""
        self._queue: queue.Queue[tuple[int, RankRows] | BaseException | None] | None = None
        self._blocks, self._begun = blocks, False

    def start(self, step: int) -> None:
        """Have Ray Data read ahead from `step` on; once."""
        if self._blocks is not None and not self._begun:
            self._begun, self._queue = True, queue.Queue(maxsize=2)
            arguments = (self._blocks, step, self._queue)
            threading.Thread(target=self._pull, args=arguments, daemon=True, name="feed").start()

    @staticmethod
    def _pull(blocks: Callable[[int], Iterator[Any]], step: int, out: queue.Queue[Any]) -> None:
        try:
            for block in blocks(step):
                out.put(block)
            out.put(None)
        except BaseException as error:  # handed to the training thread, which raises or falls back
            out.put(error)

    def batch(self, step: int) -> RankRows:
        """This worker's rows of a step: [rows_per_rank, ...]."""
        began = time.perf_counter()
        chunk = self._chunk
        if chunk is None or not chunk.first_step <= step < chunk.first_step + chunk.num_steps:
            chunk = self._chunk = self._next(step)
        self.waited_s += time.perf_counter() - began
        begin = (step - chunk.first_step) * self._rows_per_rank
        return chunk.rows[begin : begin + self._rows_per_rank]

    def _next(self, step: int) -> _Chunk:
        while self._queue is not None:
            try:
                item = self._ahead or self._queue.get(block=self._started, timeout=PATIENCE_S)
            except queue.Empty:
                if self._started:
                    self._warn(f"Ray Data delivered nothing for {PATIENCE_S:.0f} s; reading step {step} directly")
                return self._read(step, self._lead_steps)
            if item is None or isinstance(item, BaseException):
                self._queue = None
                if item is not None:
                    self._warn(f"Ray Data stopped ({type(item).__name__}: {item}); reading the rest directly")
                break
            first, rows = item
            num_steps = len(rows) // self._rows_per_rank
            known, self._started, self._ahead = self._ahead is not None, True, None
            if first + num_steps <= step:
                continue  # this worker was faster
            if first > step:
                self._ahead = item
                if not known:
                    self._warn(f"Ray Data skipped from step {step} to {first}; reading directly")
                return self._read(step, min(first - step, self._chunk_steps))
            if self._as_planned(first, num_steps, rows):
                return _Chunk(first, num_steps, rows)
            return self._read(step, first + num_steps - step)
        return self._read(step, self._chunk_steps if self._begun or self._blocks is None else self._lead_steps)

    def _as_planned(self, first: int, num_steps: int, rows: RankRows) -> bool:
        """Whether a block holds what the plan gives this worker; it may not after the plan has grown."""
        if first + num_steps > self._stream.steps:
            return False
        places = self._stream.places(first, num_steps, rank=self._rank, rows_per_rank=self._rows_per_rank)
        return all(np.array_equal(getattr(rows, name), planned) for name, planned in places.items())

    def _read(self, step: int, num_steps: int) -> _Chunk:
        num_steps = max(1, min(num_steps, self._stream.steps - step))
        rows = self._stream.part(step, num_steps, rank=self._rank, rows_per_rank=self._rows_per_rank)
        self.local_steps += num_steps
        return _Chunk(step, num_steps, rows)
