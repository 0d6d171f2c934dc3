"""One stage as a Ray Train V2 run: the driver's side, with signals, restarts and the reason of a failure.

Ray Train restarts the worker group when a worker dies; where training goes on is read from our own manifests, so Ray
is never told about checkpoints and its own snapshot cannot brick a run.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from nexus_ray.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    NexusError,
    TrainingError,
    WorkersLost,
)
from nexus_ray.train.loop import StageJob
from nexus_ray.train.stop import STOP_FILE
from nexus_ray.train.worker import pack, train_worker

KINDS = {kind.__name__: kind for kind in (CheckpointError, ConfigError, DataError, TrainingError)}


def fit(job: StageJob, *, on_signal: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run a stage on the connected Ray cluster; returns what rank 0 returned.

    Raises Interrupted if the user asked to stop (a checkpoint was written), WorkersLost if workers died too often, or
    the worker's NexusError.
    """
    import time

    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig

    from nexus_ray.train.trainer import Trainer

    job = replace(job, called=time.time())
    cluster = job.config.cluster
    resources: dict[str, float] = {"CPU": float(cluster.cpus_per_worker or 1)}
    if cluster.use_gpu:
        resources["GPU"] = cluster.gpus_per_worker
    trainer = Trainer(
        train_worker,
        train_loop_config=pack(job),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo", timeout_s=1800),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"{job.stage_index:02d}-{job.stage}-{job.attempt}-{time.time_ns():x}",
            storage_path=job.run.child("control", "ray").uri,
            failure_config=FailureConfig(max_failures=job.config.training.max_restarts),
        ),
    )
    with _stop_on_signals(job, on_signal):
        try:
            result = _fit_in_thread(trainer).return_value
        except WorkerGroupError as error:
            told = _told(error, job)
            if told is None:
                raise
            raise told from error
    if result.get("error"):
        raise KINDS.get(result["error"]["kind"], NexusError)(result["error"]["message"])
    if result.get("interrupted"):
        raise Interrupted(
            f"stopped at step {result['step']} of stage {job.stage!r}, with a checkpoint; "
            f"the same command goes on there"
        )
    return result


def _told(error: Any, job: StageJob) -> NexusError | None:
    """What workers that failed have to tell the user: what one of them raised for that, or else that some died (what
    others raised came of it); None if it was neither."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    failures = error.worker_failures
    for failure in failures.values():
        if isinstance(failure, NexusError):
            return failure
    causes = {rank: getattr(each, "health_check_failure", None) for rank, each in sorted(failures.items())}
    dead = {rank: cause for rank, cause in causes.items() if isinstance(cause, (OutOfMemoryError, RayActorError))}
    if not dead:
        return None
    ranks, cause = ", ".join(map(str, dead)), next(iter(dead.values()))
    lines = str(cause).partition(" Some common causes")[0].strip().splitlines() or [type(cause).__name__]
    return WorkersLost(
        f"stage {job.stage!r}: the process of training worker {ranks} of {job.config.cluster.num_workers} died, and "
        f"training.max_restarts={job.config.training.max_restarts} is used up; the same command goes on from the last "
        f"checkpoint. For want of memory perhaps (less of it: training.micro_batch_size), or with its node. Ray says: "
        f"{lines[0 if isinstance(cause, OutOfMemoryError) else -1].strip()}"
    )


def _fit_in_thread(trainer: Any) -> Any:
    """`trainer.fit()` beside the main thread: Ray Train installs its own Ctrl-C handler only in the main one, and
    that one would abort without a checkpoint."""
    box: dict[str, Any] = {}

    def target() -> None:
        try:
            box["result"] = trainer.fit()
        except BaseException as error:  # raised again below, in the caller's thread
            box["error"] = error

    thread = threading.Thread(target=target, name="ray-train-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
    if "error" in box:
        raise box["error"]
    return box["result"]


@contextlib.contextmanager
def _stop_on_signals(job: StageJob, on_signal: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the workers to stop with a checkpoint; a second Ctrl-C ends at once."""
    job.run.delete(*STOP_FILE)
    if job.stream is None or threading.current_thread() is not threading.main_thread():
        yield  # nothing to save: Ctrl-C ends at once
        return
    asked = False

    def handler(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            asked = True
            job.run.write_text(signal.Signals(number).name, *STOP_FILE)
            on_signal()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        job.run.delete(*STOP_FILE)
