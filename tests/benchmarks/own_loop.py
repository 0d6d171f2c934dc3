"""A stage's worker loop in a process of its own, without Ray: `python -m tests.benchmarks.own_loop FOLDER STEPS`."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nexus_ray.train.agree import WorkerContext
from nexus_ray.train.loop import StageJob, run_worker


def main(folder: Path) -> None:
    job: StageJob = pickle.loads((folder / "job.pickle").read_bytes())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    result = run_worker(job, context=WorkerContext(rank, world, torch.device("cpu")), blocks=None)
    dist.destroy_process_group()
    if "error" in result:
        raise SystemExit(str(result["error"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
