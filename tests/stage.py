"""A stage without Ray: the worker loop in processes joined by gloo. Real engine, tiny model.

Starting such processes costs seconds (they import DeepSpeed), a tiny stage about one: tests share a group of workers.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from nexus_ray.config.load import parse_config, stage_config
from nexus_ray.config.tree import RunConfig
from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.storage import Storage
from nexus_ray.stream.curriculum import stage_segments
from nexus_ray.stream.plan import Plan
from nexus_ray.stream.rows import StageStream
from tests.shards import random_documents, write_manifest

VOCAB = 256
ROWS, SEQ_LEN, STEPS = 12, 32, 8
TIMEOUT_S = 120.0
"""A stage that takes longer hangs."""


@dataclass
class FinalWeights:
    """Hooks that leave the hash of the final weights, and what the optimizer was set to."""

    def during(self, model: Any, context: Any) -> dict[str, float]:
        return {}

    def old_text(self, rows: int) -> Any:
        import numpy as np

        tokens = np.random.default_rng(0).integers(1, 240, (rows, SEQ_LEN + 1)).astype(np.int32)
        tokens[:, 0] = ~tokens[:, 0]
        return tokens

    def select(self, model: Any, context: Any) -> dict[str, float]:
        """The loss on `old_text`, which training on any domain raises."""
        import torch

        from nexus_ray.models.score import decode_rows, token_nll

        with torch.no_grad():
            loss = float(token_nll(model, decode_rows(self.old_text(4))).mean())
        return {"one": loss, "two": loss}

    def finish(self, engine: Any, context: Any, adapted: Any) -> dict[str, Any]:
        state = engine.full_state_dict()
        if state is None:
            return {}
        digest = hashlib.sha256()
        for name in sorted(state):
            digest.update(state[name].float().cpu().numpy().tobytes())
        return {"weights": digest.hexdigest(), "settings": engine.settings()}


# --- configs, data, jobs ----------------------------------------------------------------------------------------------


def tiny_config(root: Path, *, name: str = "run", stages: int = 1, rows: int = ROWS, **overrides: Any) -> RunConfig:
    """Two or three domains, a two-block Llama of width 64, eight steps of `rows` rows of 32 tokens.

    The model is the smallest in which ZeRO-3 cuts some parameters and, below its threshold, leaves others whole.
    Keyword arguments replace values by dotted path (`training__zero_stage=2`). Every checkpoint is kept.
    """
    names = ["one", "two", "three"][: max(2, stages)]
    data = {
        "name": name,
        "storage": str(root / "runs"),
        "model": {"architecture": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}},
        "domains": {n: {"source": {"kind": "files", "paths": ["unused"]}} for n in names},
        "stages": [{"name": n, "domains": {n: 1.0}} for n in names[:stages]],
        "training": {
            "token_budget": STEPS * rows * SEQ_LEN,
            "seq_len": SEQ_LEN,
            "global_batch_tokens": rows * SEQ_LEN,
            "micro_batch_size": 4,
            "learning_rate": 3.0e-3,
            "epsilon": 1.0e-6,  # with 1e-8, AdamW divides rounding by rounding where a gradient is next to nothing
            "precision": "fp32",
            "zero_stage": 0,
            "checkpoint": {"every_steps": 3, "every_seconds": None, "keep": 9},
        },
        "continual": {"warmup_steps": 2, "replay_ratio": 0.25},
        "cluster": {"cpus_per_worker": 1},
    }
    return parse_config(data, _overrides(overrides))


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    """`path=value` as YAML reads it: `1.0e+30` is a number to it, `1e+30` a text."""
    return [
        f"{path.replace('__', '.')}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10))}"
        for path, value in changes.items()
    ]


def tiny_manifests(root: Path) -> dict[str, TokenManifest]:
    """Three domains of random documents, each with tokens of its own, so that there is something to learn."""
    return {
        name: write_manifest(
            root / "tokens" / name, name, random_documents(120, seed=i, low=1 + 80 * i, high=80 + 80 * i)
        )
        for i, name in enumerate(("one", "two", "three"))
    }


def make_job(config: RunConfig, manifests: Mapping[str, TokenManifest], *, stage: int = 0) -> Any:
    """The job of one stage, with the plan of all stages up to it."""
    from nexus_ray.train.lineage import Earlier
    from nexus_ray.train.loop import StageJob

    plan = Plan(config.seed, config.training.seq_len, config.data.shuffle_window_rows)
    for index in range(stage + 1):
        plan = plan.append(stage_segments(stage_config(config, index), index, manifests, start_row=plan.rows))
    first, stop = plan.stage_rows(stage, 0)
    mine = stage_config(config, stage)
    rows = mine.training.rows_per_step
    return StageJob(
        config=mine,
        stage=config.stages[stage].name,
        stage_index=stage,
        attempt=0,
        run=Storage(config.storage).child(config.name),
        folder=Storage(str(stage_folder(config, stage))),
        fingerprint="test",
        vocab_size=VOCAB,
        eos_id=0,
        hooks=FinalWeights(),
        stream=StageStream(plan, manifests, first, rows, (stop - first) // rows),
        history=tuple(Earlier(stage_config(config, k), Storage(str(stage_folder(config, k)))) for k in range(stage)),
    )


# --- what a run left --------------------------------------------------------------------------------------------------


def run_folder(config: RunConfig) -> Path:
    return Path(config.storage) / config.name


def stage_folder(config: RunConfig, stage: int = 0) -> Path:
    return run_folder(config) / "stages" / f"{stage:02d}-{config.stages[stage].name}"


def metrics(config: RunConfig, stage: int = 0) -> dict[int, dict[str, Any]]:
    """The last line of each step of a stage, by step."""
    lines = [json.loads(line) for line in (run_folder(config) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["stage_index"] == stage}


def column(config: RunConfig, key: str, stage: int = 0) -> list[Any]:
    """One value per step."""
    found = metrics(config, stage)
    return [found[step][key] for step in sorted(found)]


def checkpoints(config: RunConfig, stage: int = 0) -> dict[int, Path]:
    """Folders of a stage's committed checkpoints, by step."""
    manifests = (stage_folder(config, stage) / "checkpoints").glob("*/MANIFEST.json")
    return {manifest(file.parent)["step"]: file.parent for file in sorted(manifests)}


def manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "MANIFEST.json").read_text())["info"]


def rewound(config: RunConfig, name: str, *, to_step: int, stage: int = 0, **changes: Any) -> RunConfig:
    """A copy of a run as if it had died after the checkpoint of `to_step`, under another name and with `changes`."""
    copy = parse_config(config.model_dump(mode="json"), _overrides({"name": name, **changes}))
    shutil.copytree(run_folder(config), run_folder(copy))
    for step, place in checkpoints(copy, stage).items():
        if step > to_step:
            shutil.rmtree(place)
    file = run_folder(copy) / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [line for line in lines if line["stage_index"] < stage or line["step"] <= to_step]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return copy


# --- workers ----------------------------------------------------------------------------------------------------------


class Workers:
    """`world` processes that run jobs together, one after the other, each job with nothing but its files.

    On `cuda` every process has the GPU of its rank, and the jobs' configs must say `cluster.use_gpu`.
    """

    def __init__(self, world: int, device: str = "cpu") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(world)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(theirs, rank, world, port, device), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def run(self, job: Any, *others: Any) -> dict[str, Any]:
        """Rank 0's result; `others` are the jobs of the other ranks, where they differ.

        Raises RuntimeError with the traceback if a worker fails; the group is of no use then.
        """
        for pipe, each in zip(self._pipes, [job, *others] if others else [job] * len(self._pipes), strict=True):
            pipe.send(each)
        waiting = dict(enumerate(self._pipes))
        result: dict[str, Any] = {}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), timeout=TIMEOUT_S)
            if not ready:
                raise RuntimeError(f"workers {sorted(waiting)} say nothing for {TIMEOUT_S:.0f} s")
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    kind, value = waiting.pop(rank).recv()
                except EOFError:
                    raise RuntimeError(f"worker {rank} died") from None
                if kind == "raised":
                    raise RuntimeError(f"worker {rank} failed:\n{value}")
                if rank == 0:
                    result = value
        return result

    def close(self) -> None:
        for process in self._processes:
            process.kill()  # they hold nothing, and saying goodbye to each other takes them seconds
        for process in self._processes:
            process.join()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def run_stages(jobs: Sequence[Any], *, world: int = 1) -> list[dict[str, Any]]:
    """Run jobs one after the other in one group of `world` workers; rank 0's results."""
    with Workers(world) as workers:
        return [workers.run(job) for job in jobs]


def _serve(pipe: Any, rank: int, world: int, port: int, device: str) -> None:
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

    from nexus_ray.train.agree import WorkerContext
    from nexus_ray.train.loop import run_worker

    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_S)
    )
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(1000 * rank + os.getpid() % 1000)  # nothing may depend on what ran before
        try:
            answer = ("done", run_worker(job, context=WorkerContext(rank, world, here), blocks=None))
        except BaseException:
            answer = ("raised", traceback.format_exc())
        pipe.send(answer)


def changed(job: Any, **config: Any) -> Any:
    """The job with top-level fields of its config replaced, its plan as it was."""
    return replace(job, config=job.config.model_copy(update=config))
