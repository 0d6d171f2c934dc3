"""The stream alone: tokens per second that Ray Data feeds to a worker, over one process reading the shards in order.

Three domains in exact proportions, two-level permutation, drawn by the `Feed` of a training worker that does not
train. The same number of tokens is drawn from a corpus of that size (one epoch) and from one of a tenth (ten epochs),
for the peak memory of every process of the Ray session.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq

from nexus_ray.config.tree import RunConfig
from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.session import ray_session
from nexus_ray.stream.rows import StageStream
from tests.benchmarks.figures import Bar, Outcome, growth
from tests.benchmarks.material import bench_config, bench_stream, write_corpus
from tests.benchmarks.processes import Watch

DOMAINS = ("one", "two", "three")
SHARE_LIMIT = 0.25
GROWTH_LIMIT = 0.10


def run(folder: Path, *, tokens: int, seq_len: int, batch_rows: int, rounds: int) -> Outcome:
    outcome = Outcome(
        f"stream: tokens/s fed to a worker at sequence length {seq_len}, over reading the shards in order",
        ("corpus", "in order", "stream", "stream/in order", "least", "first block, s"),
    )
    peaks: dict[int, Watch] = {}
    for size in (tokens // 10, tokens):
        place = folder / str(size)
        corpora = [write_corpus(place, name, size // len(DOMAINS), seed=i) for i, name in enumerate(DOMAINS)]
        config = _config(place, tokens, seq_len, batch_rows)
        stream = bench_stream(config, corpora)
        ordered: list[float] = []
        fed: list[dict[str, float]] = []
        with ray_session(config), Watch() as peaks[size]:
            for _ in range(rounds):
                ordered.append(in_order(corpora))
                fed.append(_fed(stream))
        shares = [found["tokens_per_second"] / base for found, base in zip(fed, ordered, strict=True)]
        rates = median(found["tokens_per_second"] for found in fed)
        start = median(found["started_s"] for found in fed)
        outcome.rows.append((f"{size:,}", median(ordered), rates, median(shares), min(shares), start))
        outcome.samples[str(size)] = {
            "in_order": ordered,
            "stream": fed,
            "peak_bytes": peaks[size].peaks,
            "private_peak_bytes": peaks[size].private,
        }
    outcome.bars.append(Bar("stream over sequential reading", median(shares), SHARE_LIMIT))
    _memory(outcome, peaks[tokens // 10], peaks[tokens])
    return outcome


def _memory(outcome: Outcome, small: Watch, large: Watch) -> None:
    grown = growth(small.peaks, large.peaks)
    worst = max(grown, key=lambda name: grown[name])
    limit = f"growth of a process's peak memory, ten times the corpus (worst: {worst})"
    outcome.bars.append(Bar(limit, grown[worst], GROWTH_LIMIT, at_most=True))
    private = growth(small.private, large.private)
    for name, value in sorted(grown.items(), key=lambda item: -item[1])[:6]:
        outcome.notes.append(
            f"{name}: peak {small.peaks[name] / 2**20:.0f} -> {large.peaks[name] / 2**20:.0f} MiB ({value:+.1%}), "
            f"without shared memory {private[name]:+.1%}"
        )


def in_order(corpora: list[TokenManifest]) -> float:
    """Tokens per second of one process that reads all row groups of all shards, one after the other."""
    tokens, began = 0, time.perf_counter()
    for manifest in corpora:
        for shard in manifest.shards:
            file = pq.ParquetFile(manifest.folder.path(shard.file))
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=["tokens"]).column(0)
                tokens += len(column.to_numpy())
    return tokens / (time.perf_counter() - began)


def _config(place: Path, tokens: int, seq_len: int, batch_rows: int) -> RunConfig:
    """`tokens` tokens of three domains in equal parts (one new, two replayed), however large the corpus is."""
    batch = batch_rows * seq_len
    return bench_config(
        place / "runs",
        DOMAINS,
        f"training.seq_len={seq_len}",
        f"training.global_batch_tokens={batch}",
        f"training.token_budget={tokens // batch * batch}",
        "continual.replay_ratio=0.6667",
    )


def _fed(stream: StageStream) -> dict[str, float]:
    """One pass of the stream into an actor that stands for a training worker."""
    import ray

    consumer = ray.remote(num_cpus=1)(Consumer).remote()
    try:
        return ray.get(consumer.run.remote(stream))
    finally:
        ray.kill(consumer)


class Consumer:
    """Draws all batches as a training worker would."""

    def run(self, stream: StageStream) -> dict[str, float]:
        """The rate over all but the first eighth of the steps, once Ray Data has begun to deliver."""
        from nexus_ray.stream.feed import Feed, steps_per_chunk
        from nexus_ray.stream.loader import blocks_of_rank

        arrived = threading.Event()

        rows, chunk = stream.rows_per_step, steps_per_chunk(stream, rows_per_rank=stream.rows_per_step, world=1)

        def blocks(step: int) -> Iterator[Any]:
            for block in blocks_of_rank(stream, 0, rows, chunk, step):
                yield block
                arrived.set()

        called = time.perf_counter()
        feed = Feed(
            stream,
            rank=0,
            rows_per_rank=rows,
            chunk_steps=chunk,
            blocks=blocks,
        )
        feed.start(0)
        arrived.wait(timeout=300)
        arrived_after = time.perf_counter() - called
        skipped = max(1, stream.steps // 8)
        began, waited, touched = 0.0, 0.0, 0
        for step in range(stream.steps):
            if step == skipped:
                began, waited = time.perf_counter(), feed.waited_s
            batch = feed.batch(step)
            touched ^= int(batch.tokens[:, ::1024].sum())  # every page is there, as after the sequential read
        ended = time.perf_counter()
        per_step = stream.rows_per_step * stream.plan.seq_len
        return {
            "tokens_per_second": (stream.steps - skipped) * per_step / (ended - began),
            "seconds": ended - began,
            "waited_s": feed.waited_s - waited,
            "started_s": arrived_after,
            "local_steps": feed.local_steps,
        }


SETTINGS = {"tokens": 96_000_000, "seq_len": 2048, "batch_rows": 8, "rounds": 3}
QUICK = {"tokens": 3_000_000, "seq_len": 256, "batch_rows": 32, "rounds": 1}
