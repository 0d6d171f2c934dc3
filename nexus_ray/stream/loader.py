"""Ray Data executes the plan: one read task per (chunk of steps, worker), in order, ahead of the training workers.

The dataset is made anew at every start of the worker group, from the step where training goes on and for the number
of workers there are; `preserve_order` and blocks of equal size make block k of the dataset worker k mod W's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.data import ExecutionOptions, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from nexus_ray.stream.feed import steps_per_chunk
from nexus_ray.stream.rows import RankRows, StageStream

DATASET = "train"
BLOCKS_AHEAD = 6
"""Blocks per worker that Ray Data holds, about, in the making or ready."""


DATA_NICENESS = 10
"""Reading ahead gives way to training on the same cores."""


class PlanSource(Datasource):
    """A stage's rows from `first_step` on, cut for `world` workers."""

    def __init__(self, stream: StageStream, *, first_step: int, world: int, chunk_steps: int) -> None:
        self._stream = stream
        self._rows_per_rank = -(-stream.rows_per_step // world)
        self.block_bytes = self._bytes(chunk_steps)
        self._work = [
            (step, min(chunk_steps, stream.steps - step), rank)
            for step in range(first_step, stream.steps, chunk_steps)
            for rank in range(world)
        ]

    def __len__(self) -> int:
        return len(self._work)

    def get_name(self) -> str:
        return "Plan"

    def _bytes(self, num_steps: int) -> int:
        return num_steps * self._rows_per_rank * (4 * (self._stream.plan.seq_len + 1) + 19)

    def estimate_inmemory_data_size(self) -> int:
        return sum(self._bytes(num_steps) for _, num_steps, _ in self._work)

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        shared = ray.put(self._stream)
        return [
            ReadTask(
                partial(_read_block, shared, step, num_steps, rank, self._rows_per_rank),
                BlockMetadata(
                    num_rows=num_steps * self._rows_per_rank,
                    size_bytes=self._bytes(num_steps),
                    exec_stats=None,
                    input_files=None,
                ),
            )
            for step, num_steps, rank in self._work
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


def no_dataset() -> None:
    """Stands in for a dataset: `PlanDataConfig` makes the real one, once the number of workers is known."""


class PlanDataConfig(ray.train.DataConfig):
    """Tells Ray Train how the plan is spread over the workers that happen to be there."""

    def __init__(self, stream: StageStream, first_step: Callable[[], int]) -> None:
        super().__init__(
            datasets_to_split=[DATASET],
            execution_options=ExecutionOptions(preserve_order=True),
            enable_shard_locality=False,
        )
        self._stream = stream
        self._first_step = first_step

    def configure(self, datasets: Any, world_size: int, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows_per_rank = -(-self._stream.rows_per_step // world_size)
        source = PlanSource(
            self._stream,
            first_step=min(self._first_step(), self._stream.steps - 1),
            world=world_size,
            chunk_steps=steps_per_chunk(self._stream, rows_per_rank=rows_per_rank, world=world_size),
        )
        dataset = ray.data.read_datasource(source, override_num_blocks=len(source))
        dataset.context.execution_options = ExecutionOptions(
            preserve_order=True,
            resource_limits=ExecutionResources(object_store_memory=BLOCKS_AHEAD * world_size * source.block_bytes),
        )
        return [{DATASET: split} for split in dataset.streaming_split(world_size, equal=True)]


def blocks_of_worker() -> Iterator[tuple[int, RankRows]]:
    """The calling training worker's blocks, in order."""
    return blocks_of(ray.train.get_dataset_shard(DATASET))


def blocks_of(shard: ray.data.DataIterator) -> Iterator[tuple[int, RankRows]]:
    """The blocks of one worker's shard of the dataset, in order."""
    for table in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        yield from_table(table)
