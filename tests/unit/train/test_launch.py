"""What a stage's driver tells of workers that failed, from the errors that Ray raises."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from nexus_ray.errors import DataError, NexusError, WorkersLost
from nexus_ray.train.launch import _told

CLUSTER, TRAINING = SimpleNamespace(num_workers=2), SimpleNamespace(max_restarts=3)
JOB: Any = SimpleNamespace(stage="south", config=SimpleNamespace(cluster=CLUSTER, training=TRAINING))


def died(cause: Exception) -> Exception:
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", failure=cause)


def told(failures: dict[int, Exception]) -> NexusError | None:
    return _told(WorkerGroupError("[Rank ...", failures), JOB)


def test_workers_that_died_are_named_with_ray_s_reason() -> None:
    gone = RayActorError(error_msg="It died.\n\tpid: 7\nIts process has died: End of file. Some common causes: (1)")
    lost = told({0: RuntimeError("Connection closed by peer"), 1: died(gone)})
    assert isinstance(lost, WorkersLost)
    assert "worker 1 of 2 died" in str(lost) and "training.max_restarts=3" in str(lost)
    assert str(lost).endswith("Ray says: Its process has died: End of file.")
    memory = told({0: died(OutOfMemoryError("The node ran low on memory.\nRefer to the manual.")), 1: died(gone)})
    assert "worker 0, 1 of 2" in str(memory) and str(memory).endswith("Ray says: The node ran low on memory.")


def test_what_a_worker_raised_for_the_user_comes_first() -> None:
    own = DataError("shard 3 is torn")
    assert told({0: died(RayActorError(error_msg="gone")), 1: own}) is own


@pytest.mark.parametrize("error", [RuntimeError("a bug"), RayActorError(error_msg="of another actor")])
def test_anything_else_is_not_explained_away(error: Exception) -> None:
    assert told({0: error}) is None
