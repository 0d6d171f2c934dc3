"""Ray Train's trainer without the processes that a stage does not need, each of which takes two to three seconds of a
core to start.

- The controller runs in the process that calls `fit`. Ray starts one for it, which dies with that process all the same.
- The barrier that `ray.train.report` wants: workers agree through PyTorch, and report nothing to Ray.
- The manager of datasets: workers make their own (`nexus_ray.stream.loader`).
- What frees the resources of a dead controller: it watches an actor, so it is left to controllers in one (a trial's),
  and to clusters, since a local head ends with its driver.

Ray has no setting for the first two: its private parts are extended here, and nowhere else (`ray==2.60.*`). What is set
up at import is of this process, where no controller but ours runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2._internal.logging import LoggingManager
from ray.train.v2.api.result import Result

from nexus_ray.errors import TrainingError
from nexus_ray.session import LOCAL_HEAD


class Trainer(TorchTrainer):
    """Extension point of Ray Train: how a stage's worker group is driven."""

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = {"DatasetsCallback"}
        if LOCAL_HEAD in os.environ or ray.get_runtime_context().get_actor_id() is None:
            unneeded.add("PlacementGroupCleanerCallback")
        return [each for each in super()._create_default_callbacks() if type(each).__name__ not in unneeded]

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
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
        """Also ends what a start has left that failed after its workers were there, which Ray keeps, with its CPUs."""
        builder = _Builder()
        try:
            self._start_impl(builder)
        except Exception:
            builder.shutdown()
            self._clear_state()
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

    async def _run_control_loop_iteration(self) -> None:
        if not ray.is_initialized():  # the user has left, by Ctrl-C perhaps: this thread must not start another Ray
            raise TrainingError("Ray was shut down while a stage was running")
        await super()._run_control_loop_iteration()


class _SessionLog(logging.Handler):
    """What Ray Train has to say goes into a file of the Ray session, as its controller's would, and not to the user."""

    def emit(self, record: logging.LogRecord) -> None:
        folder = LoggingManager.get_log_directory()
        if folder is None:
            return
        try:
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, f"nexus-ray-controller-{os.getpid()}.log"), "a", encoding="utf-8") as file:
                file.write(self.format(record) + "\n")
        except OSError:  # a full disk is no reason to end a run
            return


def _set_up() -> None:
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")  # it would log to the user
    worker_group.SynchronizationActor = _NoBarrier()
    log, handler = logging.getLogger("ray.train"), _SessionLog()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


_set_up()
