"""The function that Ray Train calls in every training worker.

Ray Train keeps a copy of its argument wherever it keeps track of the run, and would import there whatever that names:
so the job travels as bytes, and PyTorch, transformers and the loop are imported here.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nexus_ray.train.loop import StageJob


def pack(job: StageJob) -> dict[str, bytes]:
    """The argument of `train_worker`."""
    from ray import cloudpickle

    return {"job": cloudpickle.dumps(job)}


def train_worker(settings: dict[str, bytes]) -> dict[str, Any]:
    """Run a stage's job in this worker; rank 0's result is that of the stage."""
    entered = time.time()
    import ray.train
    import ray.train.torch
    from ray import cloudpickle

    job: StageJob = cloudpickle.loads(settings["job"])
    from nexus_ray.stream.loader import blocks_of_rank
    from nexus_ray.train.agree import WorkerContext
    from nexus_ray.train.loop import run_worker

    here = ray.train.get_context()
    context = WorkerContext(
        rank=here.get_world_rank(), world=here.get_world_size(), device=ray.train.torch.get_device()
    )
    share = job.config.cluster.gpus_per_worker
    if context.device.type == "cuda" and share < 1:
        import torch

        torch.cuda.set_per_process_memory_fraction(share, context.device)
    return run_worker(job, context=context, blocks=blocks_of_rank, entered=entered)
