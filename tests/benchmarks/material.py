"""What the benchmarks run on: synthetic token shards, the demo's model, a stage over both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nexus_ray.config.load import parse_config, stage_config
from nexus_ray.config.tree import RunConfig
from nexus_ray.corpora.manifest import ROW_GROUP_TOKENS, Shard, TokenManifest
from nexus_ray.storage import Storage
from nexus_ray.stream.curriculum import stage_segments
from nexus_ray.stream.plan import Plan
from nexus_ray.stream.rows import StageStream

VOCAB = 4096
EOS = 0
DOCUMENT_TOKENS = (40, 800)
"""Shortest and longest document."""
SHARD_TOKENS = 16_777_216
BATCH_TOKENS = 8192


def write_corpus(root: Path, domain: str, tokens: int, *, seed: int) -> TokenManifest:
    """Random documents of `tokens` tokens in all, in shards with the writer settings of `nexus_ray.corpora`."""
    folder = root / domain / "train"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = np.random.default_rng(seed)
    shards = []
    for number, begin in enumerate(range(0, tokens, SHARD_TOKENS)):
        size = min(SHARD_TOKENS, tokens - begin)
        lengths = chosen.integers(*DOCUMENT_TOKENS, size // DOCUMENT_TOKENS[0] + 1)
        ends = np.cumsum(lengths)
        ends = np.append(ends[ends < size - 1], size)
        flat = chosen.integers(1, VOCAB, size, dtype=np.int32)
        flat[ends - 1] = EOS
        shards.append(_write_shard(folder, number, flat, np.concatenate([[0], ends[:-1]]), seed))
    return TokenManifest(
        domain=domain,
        split="train",
        root=str(root / domain),
        tokenizer="benchmark",
        vocab_size=VOCAB,
        eos_id=EOS,
        shards=tuple(shards),
        base=f"benchmark-{domain}-{seed}",
    )


def _write_shard(folder: Path, number: int, flat: Any, offsets: Any, seed: int) -> Shard:
    tokens, documents = folder / f"tokens-{number:05d}.parquet", folder / f"documents-{number:05d}.parquet"
    pq.write_table(
        pa.table({"tokens": flat}),
        tokens,
        row_group_size=ROW_GROUP_TOKENS,
        use_dictionary=False,
        compression="NONE",
        column_encoding={"tokens": "PLAIN"},
        write_page_checksum=True,
    )
    pq.write_table(pa.table({"offset": offsets.astype(np.int64)}), documents)
    return Shard(
        file=tokens.name,
        tokens=len(flat),
        documents=len(offsets),
        bytes=tokens.stat().st_size,
        sha256=f"{seed}-{number}",
        batch=0,
        table_bytes=documents.stat().st_size,
        table_sha256=f"{seed}-{number}",
    )


def bench_config(storage: Path, domains: Sequence[str], *overrides: str, replay: float = 0.1) -> RunConfig:
    """One stage that learns the first domain and replays the others, with the demo's model and batch."""
    data = {
        "name": "benchmark",
        "storage": str(storage),
        "model": {"architecture": {"hidden_size": 192, "num_layers": 4, "num_heads": 6, "max_seq_len": 2048}},
        "domains": {name: {"source": {"kind": "files", "paths": ["unused"]}} for name in domains},
        "stages": [
            {"name": "stage", "domains": {domains[0]: 1.0}, "replay": dict.fromkeys(domains[1:], 1.0)},
        ],
        "training": {
            "token_budget": BATCH_TOKENS,
            "seq_len": 256,
            "global_batch_tokens": BATCH_TOKENS,
            "micro_batch_size": 16,
            "learning_rate": 1.0e-3,
            "clip_norm": 1.0,
            "precision": "fp32",
            "zero_stage": 0,
            "schedule": {"kind": "constant"},
            "checkpoint": {"every_steps": None, "every_seconds": None},
        },
        "continual": {"warmup_steps": 0, "replay_ratio": replay},
        "cluster": {"num_workers": 1, "cpus_per_worker": 1},
        "data": {"max_repetitions": 1e9},
    }
    return parse_config(data, overrides)


def bench_stream(config: RunConfig, manifests: Sequence[TokenManifest]) -> StageStream:
    """The rows of the config's only stage."""
    by_name = {manifest.domain: manifest for manifest in manifests}
    plan = Plan(config.seed, config.training.seq_len, config.data.shuffle_window_rows)
    plan = plan.append(stage_segments(stage_config(config, 0), 0, by_name, start_row=0))
    return StageStream(plan, by_name, 0, config.training.rows_per_step, config.training.steps)


def bench_job(config: RunConfig, manifests: Sequence[TokenManifest], hooks: Any) -> Any:
    """The job of the config's only stage."""
    from nexus_ray.train.loop import StageJob

    run = Storage(config.storage).child(config.name)
    return StageJob(
        config=stage_config(config, 0),
        stage=config.stages[0].name,
        stage_index=0,
        attempt=0,
        run=run,
        folder=run.child("stages", "00-stage"),
        fingerprint="benchmark",
        vocab_size=VOCAB,
        eos_id=EOS,
        hooks=hooks,
        stream=bench_stream(config, manifests),
    )
