"""Ray Data executes the plan: one read task per chunk of steps, in order, ahead of the training worker.

Every worker has a dataset of its own rows, which it makes once it has begun to train, from the step it has reached:
nothing of it stands between the start of a stage and its first step, and no exchange between workers is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionOptions, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from nexus_ray.stream.rows import RankRows, StageStream

BLOCKS_AHEAD = 6
"""Blocks that Ray Data holds for a worker, about, in the making or ready."""


DATA_NICENESS = 10
"""Reading ahead gives way to training on the same cores."""


class PlanSource(Datasource):
    """One worker's rows of a stage from `first_step` on."""

    def __init__(
        self, stream: StageStream, *, first_step: int, rank: int, rows_per_rank: int, chunk_steps: int
    ) -> None:
        self._stream, self._rank, self._rows_per_rank = stream, rank, rows_per_rank
        self.block_bytes = self._bytes(chunk_steps)
        self._work = [
            (step, min(chunk_steps, stream.steps - step)) for step in range(first_step, stream.steps, chunk_steps)
        ]

    def __len__(self) -> int:
        return len(self._work)

    def get_name(self) -> str:
        return "Plan"

    def _bytes(self, num_steps: int) -> int:
        return num_steps * self._rows_per_rank * (4 * (self._stream.plan.seq_len + 1) + 19)

    def estimate_inmemory_data_size(self) -> int:
        return sum(self._bytes(num_steps) for _, num_steps in self._work)

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        shared = ray.put(self._stream)
        return [
            ReadTask(
                partial(_read_block, shared, step, num_steps, self._rank, self._rows_per_rank),
                BlockMetadata(
                    num_rows=num_steps * self._rows_per_rank,
                    size_bytes=self._bytes(num_steps),
                    exec_stats=None,
                    input_files=None,
                ),
            )
            for step, num_steps in self._work
        ]


def _read_block(shared: Any, step: int, num_steps: int, rank: int, rows_per_rank: int) -> Iterator[pa.Table]:
    os.setpriority(os.PRIO_PROCESS, 0, max(DATA_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    stream: StageStream = ray.get(shared)
    yield to_table(step, stream.part(step, num_steps, rank=rank, rows_per_rank=rows_per_rank))


def to_table(first_step: int, rows: RankRows) -> pa.Table:
    """A block as an Arrow table; `from_table` reads it back without a copy."""
    width = rows.tokens.shape[1]
    return pa.table(
        {
            "tokens": pa.FixedSizeListArray.from_arrays(pa.array(rows.tokens.ravel()), width),
            "position": rows.position,
            "domain": rows.domain,
            "row": rows.row,
            "replayed": rows.replayed,
            "step": np.full(len(rows), first_step, dtype=np.int64),
        }
    )


def from_table(table: pa.Table) -> tuple[int, RankRows]:
    """(first step, rows) of a block."""
    table = table.combine_chunks()
    tokens = table.column("tokens").chunk(0)
    flat = tokens.values.to_numpy(zero_copy_only=True)
    width = tokens.type.list_size
    flat = flat[tokens.offset * width : (tokens.offset + len(tokens)) * width]

    def column(name: str) -> Any:
        return table.column(name).to_numpy()

    rows = RankRows(flat.reshape(-1, width), column("position"), column("domain"), column("row"), column("replayed"))
    return int(column("step")[0]), rows


def blocks_of_rank(
    stream: StageStream, rank: int, rows_per_rank: int, chunk_steps: int, first_step: int
) -> Iterator[tuple[int, RankRows]]:
    """(first step, rows) of a worker's blocks from `first_step` on, in order.

    The dataset is executed by a process of its own, not by the one that trains.
    """
    if first_step >= stream.steps:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    source = PlanSource(stream, first_step=first_step, rank=rank, rows_per_rank=rows_per_rank, chunk_steps=chunk_steps)
    dataset = ray.data.read_datasource(source, override_num_blocks=len(source))
    dataset.context.execution_options = ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources(object_store_memory=BLOCKS_AHEAD * source.block_bytes),
    )
    (shard,) = dataset.streaming_split(1, equal=False)
    for table in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        yield from_table(table)
