"""A stage without Ray: the worker loop in this process, or in several joined by gloo. Real engine, tiny model."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from nexus_ray.config.load import parse_config, stage_config
from nexus_ray.config.tree import RunConfig
from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.storage import Storage
from nexus_ray.stream.curriculum import stage_segments
from nexus_ray.stream.plan import Plan
from nexus_ray.stream.rows import StageStream
from tests.shards import random_documents, write_manifest

VOCAB = 256


@dataclass
class NoHooks:
    """Hooks that only leave the final weights' hash."""

    seen: dict[str, Any] = field(default_factory=dict)

    def during(self, model: Any, context: Any) -> dict[str, float]:
        return {}

    def finish(self, engine: Any, context: Any) -> dict[str, Any]:
        import hashlib

        state = engine.full_state_dict()
        if state is None:
            return {}
        digest = hashlib.sha256()
        for name in sorted(state):
            digest.update(state[name].float().cpu().numpy().tobytes())
        return {"weights": digest.hexdigest()}


def tiny_config(root: Path, *, name: str = "run", stages: int = 1, **overrides: Any) -> RunConfig:
    """Two or three domains of random tokens, a two-block Llama of width 32, eight steps of 12 rows of 32 tokens."""
    names = ["one", "two", "three"][: max(2, stages)]
    data = {
        "name": name,
        "storage": str(root / "runs"),
        "model": {"architecture": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}},
        "domains": {n: {"source": {"kind": "files", "paths": ["unused"]}} for n in names},
        "stages": [{"name": n, "domains": {n: 1.0}} for n in names[:stages]],
        "training": {
            "token_budget": 8 * 12 * 32,
            "seq_len": 32,
            "global_batch_tokens": 12 * 32,
            "micro_batch_size": 4,
            "learning_rate": 3.0e-3,
            "precision": "fp32",
            "zero_stage": 0,
            "checkpoint": {"every_steps": 3, "every_seconds": None},
        },
        "continual": {"warmup_steps": 2, "replay_ratio": 0.25},
        "cluster": {"cpus_per_worker": 1},
    }
    return parse_config(data, [f"{path}={json.dumps(value)}" for path, value in overrides.items()])


def tiny_manifests(root: Path, names: list[str]) -> dict[str, TokenManifest]:
    return {
        name: write_manifest(root / "tokens" / name, name, random_documents(120, seed=i), vocab_size=VOCAB)
        for i, name in enumerate(names)
    }


def make_job(config: RunConfig, manifests: Mapping[str, TokenManifest], *, stage: int = 0, hooks: Any = None) -> Any:
    """The job of one stage, with the plan of all stages up to it."""
    from nexus_ray.train.loop import StageJob

    plan = Plan(config.seed, config.training.seq_len, config.data.shuffle_window_rows)
    for index in range(stage + 1):
        plan = plan.append(stage_segments(stage_config(config, index), index, manifests, start_row=plan.rows))
    first, stop = plan.stage_rows(stage, 0)
    mine = stage_config(config, stage)
    rows = mine.training.rows_per_step
    run = Storage(config.storage).child(config.name)
    names = [s.name for s in config.stages]
    before = run.child("stages", f"{stage - 1:02d}-{names[stage - 1]}", "checkpoints") if stage else None
    return StageJob(
        config=mine,
        stage=names[stage],
        stage_index=stage,
        attempt=0,
        run=run,
        folder=run.child("stages", f"{stage:02d}-{names[stage]}"),
        fingerprint="test",
        vocab_size=VOCAB,
        eos_id=0,
        hooks=hooks or NoHooks(),
        stream=StageStream(plan, manifests, first, rows, (stop - first) // rows),
        start_from=before,
    )


def run_stage(job: Any, *, world: int = 1) -> dict[str, Any]:
    """Run a job on `world` fresh processes; returns rank 0's result. Raises RuntimeError if one dies."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_rank, args=(job, rank, world, port, queue)) for rank in range(world)]
    for worker in workers:
        worker.start()
    try:
        while queue.empty() and all(worker.exitcode in (None, 0) for worker in workers):
            time.sleep(0.05)
        if queue.empty():
            raise RuntimeError(f"a worker died: exit codes {[worker.exitcode for worker in workers]}")
        return queue.get()
    finally:
        for worker in workers:
            worker.join(timeout=20)
            worker.kill()


def _rank(job: Any, rank: int, world: int, port: int, queue: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    import torch
    import torch.distributed as dist

    from nexus_ray.train.loop import WorkerContext, run_worker

    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=120))
    result = run_worker(job, context=WorkerContext(rank, world, torch.device("cpu")), blocks=None)
    if rank == 0:
        queue.put(result)
    dist.barrier()
    dist.destroy_process_group()


def metrics(config: RunConfig) -> dict[tuple[int, int], dict[str, Any]]:
    """The last line of each (stage index, step)."""
    text = (Path(config.storage) / config.name / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return {(line["stage_index"], line["step"]): line for line in lines}
