"""Ray Train's trainer without the processes that a stage does not need, each of which takes two to three seconds of a
core to start.

- The controller runs in the process that calls `fit`. Ray starts one for it, which dies with that process all the same.
- The barrier that `ray.train.report` wants: workers agree through PyTorch, and report nothing to Ray.
- The manager of datasets: workers make their own (`nexus_ray.stream.loader`).
- What frees the resources of a dead controller: it watches an actor, so it is left to controllers in one (a trial's),
  and to clusters, since a local head ends with its driver.

Ray has no setting for the first two: its private parts are extended here, and nowhere else (`ray==2.60.*`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2._internal.logging.logging import SessionFileHandler
from ray.train.v2.api.result import Result

from nexus_ray.session import LOCAL_HEAD

_starting = Lock()


class Trainer(TorchTrainer):
    """Extension point of Ray Train: how a stage's worker group is driven."""

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = {"DatasetsCallback"}
        if LOCAL_HEAD in os.environ or ray.get_runtime_context().get_actor_id() is None:
            unneeded.add("PlacementGroupCleanerCallback")
        return [each for each in super()._create_default_callbacks() if type(each).__name__ not in unneeded]

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        with _logged():
            controller = _Controller(**settings)
            asyncio.run(controller.run())
            return controller.get_result()


class _State(state.WorkerGroupState):
    def shutdown(self) -> None:
        state._shutdown_workers(self.workers)
        self.placement_group_handle.shutdown()


class _Builder(state.WorkerGroupStateBuilder):
    def with_sync_actor(self, actor: Any) -> _Builder:
        return self

    def build(self) -> _State:
        workers, placed = self.workers, self.placement_group_handle
        return _State(start_time=time.monotonic(), workers=workers, placement_group_handle=placed, sync_actor=None)


class _NoBarrier:
    """In place of the class of Ray's barrier, and of a handle of one."""

    def options(self, **settings: Any) -> _NoBarrier:
        return self

    def remote(self, **settings: Any) -> _NoBarrier:
        return self


class _Workers(worker_group.WorkerGroup):
    def _start(self) -> None:
        builder = _Builder()
        try:
            with _without_barrier():
                self._start_impl(builder)
        except Exception:
            if not self.has_started():
                builder.shutdown()
            raise

    def _init_train_context_on_workers(self, workers: list[Any], barrier: Any, of_callbacks: dict[str, Any]) -> None:
        common = {
            "train_run_context": self._train_run_context,
            "storage_context": self._storage_context,
            "worker_callbacks": self._worker_callbacks_to_propagate,
            "synchronization_actor": None,
            "controller_actor": None,  # asked only for checkpoints reported to Ray
        }
        started = []
        for number, worker in enumerate(workers):
            own = {name: values[number] for name, values in of_callbacks.items()}
            context = worker.distributed_context
            started.append(worker.actor.init_train_context.remote(distributed_context=context, **common, **own))
        ray.get(started)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _Workers


@contextmanager
def _without_barrier() -> Iterator[None]:
    """Worker groups that start inside start no process for Ray's barrier."""
    with _starting:
        before = worker_group.SynchronizationActor
        worker_group.SynchronizationActor = _NoBarrier()
        try:
            yield
        finally:
            worker_group.SynchronizationActor = before


@contextmanager
def _logged() -> Iterator[None]:
    """What Ray Train has to say goes into a file of the Ray session, as its controller's would, and not to the user."""
    log, handler = logging.getLogger("ray.train"), SessionFileHandler(f"nexus-ray-controller-{os.getpid()}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
