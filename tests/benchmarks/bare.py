"""The bare PyTorch loop that a stage is compared with: same model, rows, mask, loss, optimizer, clipping and threads.

Nothing else: batches lie decoded in memory with their masks, no record is written, no one else is listened to. Run
by `tests.benchmarks.contestants.Processes`: `python -m tests.benchmarks.bare FOLDER STEPS`, one process per rank.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_ray.models.build import build_model, parameter_groups
from nexus_ray.models.score import attention_inputs, decode_rows, target_nll
from nexus_ray.train.loop import StageJob
from tests.benchmarks.contestants import serve

BATCHES = 8
"""Different global batches in memory; their masks take 8 MB each."""


@dataclass(frozen=True)
class Batch:
    pieces: list[tuple[dict[str, Any], Tensor]]
    """Model inputs and targets of each micro-batch."""
    targets: int
    """Target tokens of the global batch."""


def load_batches(job: StageJob, *, rank: int, world: int) -> list[Batch]:
    stream, micro = job.stream, job.config.training.micro_batch_size
    assert stream is not None
    own = stream.rows_per_step // world
    batches = []
    for step in range(min(BATCHES, stream.steps)):
        whole = decode_rows(stream.part(step, 1, rank=0, rows_per_rank=stream.rows_per_step).tokens)
        rows = stream.part(step, 1, rank=rank, rows_per_rank=own).tokens
        pieces = [decode_rows(rows[begin : begin + micro]) for begin in range(0, own, micro)]
        batches.append(
            Batch([(attention_inputs(piece), piece.targets) for piece in pieces], int((whole.targets >= 0).sum()))
        )
    return batches


class Bare:
    def __init__(self, job: StageJob, *, rank: int, world: int) -> None:
        training = job.config.training
        torch.set_num_threads(job.config.cluster.cpus_per_worker or 1)
        model = build_model(job.config.model, vocab_size=job.vocab_size, eos_id=job.eos_id, seed=job.config.seed)
        model.train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, training.weight_decay),
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=training.epsilon,
            fused=True,
        )
        self.world, self.clip = world, training.clip_norm
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model: nn.Module = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        self.batches = load_batches(job, rank=rank, world=world)
        self.losses: list[float] = []

    def step(self, number: int) -> None:
        batch = self.batches[number % len(self.batches)]
        total = torch.zeros(())
        for i, (inputs, targets) in enumerate(batch.pieces):
            last = i == len(batch.pieces) - 1
            with nullcontext() if last or self.world == 1 else self.model.no_sync():  # type: ignore[operator]
                logits = self.model(**inputs, use_cache=False).logits
                loss = target_nll(logits, targets).sum() * (self.world / batch.targets)
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(total))


def main(folder: Path, steps: int) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job: StageJob = pickle.loads((folder / "job.pickle").read_bytes())
    if world > 1:
        dist.init_process_group("gloo")
    bare = Bare(job, rank=rank, world=world)

    def segment() -> list[float]:
        bare.step(len(bare.losses))
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            bare.step(len(bare.losses))
            seconds.append(time.perf_counter() - began)
        return seconds

    serve(folder, segment, rank=rank)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
