"""A strong shift small enough for a test: two domains without a token in common, the second one's stage controlled.

The real worker loop, plan file and driver's side of control; `fit` is a group of processes without Ray.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nexus_ray.config.load import stage_config
from nexus_ray.config.tree import RunConfig
from nexus_ray.evaluate.hooks import ScoringHooks
from nexus_ray.evaluate.scores import DomainScore, scores_from_bytes
from nexus_ray.steer import Steering
from nexus_ray.storage import Storage
from nexus_ray.stream.plan_file import PlanFile
from nexus_ray.train.lineage import Earlier
from nexus_ray.train.loop import StageJob
from tests.shards import random_documents, write_manifest
from tests.stage import ROWS, SEQ_LEN, VOCAB, Workers, run_folder, stage_folder, tiny_config, tiny_manifests

STEPS, EVERY = 48, 3
"""Steps of a stage, and between evaluations."""


class WeighedHooks(ScoringHooks):
    """The roadmap's hooks, and the hash of the final weights."""

    def finish(self, engine: Any, context: Any, adapted: Any) -> dict[str, Any]:
        from tests.stage import FinalWeights

        return {**super().finish(engine, context, adapted), **FinalWeights().finish(engine, context, adapted)}


class Shift:
    """Data and workers that all runs in a folder share."""

    def __init__(self, root: Path, *, world: int = 1) -> None:
        self.root, self.workers = root, Workers(world)
        self.train = tiny_manifests(root)
        self.held_out = {
            name: write_manifest(
                root / "held" / name,
                name,
                random_documents(60, seed=50 + i, low=1 + 80 * i, high=80 + 80 * i),
                split="held_out",
            )
            for i, name in enumerate(("one", "two"))
        }

    def config(self, name: str, **changes: Any) -> RunConfig:
        base: dict[str, Any] = {
            "training__token_budget": STEPS * ROWS * SEQ_LEN,
            "training__checkpoint": {"every_steps": 5, "every_seconds": None, "keep": 99},
            "continual__replay_ratio": 0.02,
            "evaluation__every_steps": EVERY,
            "evaluation__during_tokens": 800,
            "evaluation__max_tokens": 2000,
        }
        return tiny_config(self.root, name=name, stages=2, **{**base, **changes})

    def first_stage(self, config: RunConfig) -> None:
        """Train the first stage, once for all runs; a run has a copy of it."""
        source = self.config("begun", continual__on_forgetting="warn")
        if not (stage_folder(source) / "evaluation.npz").exists():
            self.workers.run(self._job(source, 0, PlanFile(self._folder(source), source)))
        shutil.copytree(run_folder(source), run_folder(config))

    def run(self, config: RunConfig, fit: Any = None) -> dict[str, Any]:
        """The second stage, or the rest of it."""
        if not run_folder(config).exists():
            self.first_stage(config)
        plan = PlanFile(self._folder(config), config)
        scores = self.scores(config, 0)
        job = self._job(config, 1, plan)
        steering = Steering.of(
            stage_config(config, 1), 1, 0, manifests=self.train, plan=plan, scores=[scores, scores], say=print
        )
        return steering.train(job, fit or self.workers.run)

    def forgotten(self, config: RunConfig) -> float:
        """Bits per byte that the first domain lost in the second stage, on all of its held-out text."""
        return self.scores(config, 1)["one"].bits_per_byte - self.scores(config, 0)["one"].bits_per_byte

    def scores(self, config: RunConfig, stage: int) -> dict[str, DomainScore]:
        return scores_from_bytes((stage_folder(config, stage) / "evaluation.npz").read_bytes())

    def close(self) -> None:
        self.workers.close()

    def _folder(self, config: RunConfig) -> Storage:
        return Storage(str(run_folder(config)))

    def _job(self, config: RunConfig, index: int, plan: PlanFile) -> StageJob:
        own = stage_config(config, index)
        folders = [Storage(str(stage_folder(config, k))) for k in range(index + 1)]
        hooks = WeighedHooks(
            folder=folders[index], tokenizer=Storage(str(self.root)), held_out=self.held_out, seq_len=SEQ_LEN,
            batch_size=16, max_tokens=own.evaluation.max_tokens, during_tokens=own.evaluation.during_tokens,
            prompts={}, sample_tokens=0, temperature=0.0, sample_seed=0, export=False,
        )  # fmt: skip
        stream = plan.stream(own, index, 0, self.train)
        return StageJob(
            config=own, stage=config.stages[index].name, stage_index=index, attempt=0, run=self._folder(config),
            folder=folders[index], fingerprint="test", vocab_size=VOCAB, eos_id=0, hooks=hooks, stream=stream,
            history=tuple(Earlier(stage_config(config, k), folders[k]) for k in range(index)),
        )  # fmt: skip


def log(config: RunConfig) -> dict[int, dict[str, Any]]:
    """The last line of each step of `control.jsonl`, without its time."""
    lines = [json.loads(line) for line in (run_folder(config) / "control.jsonl").read_text().splitlines()]
    return {line["step"]: {key: value for key, value in line.items() if key != "time"} for line in lines}


def actions(config: RunConfig) -> list[dict[str, Any]]:
    return [line["action"] for _, line in sorted(log(config).items()) if line["action"]]
