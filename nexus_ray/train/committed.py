"""Which checkpoints of a stage are committed, and what their manifests say. Loads no torch: the processes that plan a
stage's data ask where it goes on, and should not import a training framework for it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nexus_ray.storage import Storage

if TYPE_CHECKING:
    from nexus_ray.train.engine import Engine

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a manifest says besides its files."""

    fingerprint: str
    stage: str
    stage_index: int
    attempt: int
    step: int
    """Optimizer steps done in the stage; the next row is stage start + step x rows per step."""
    world_size: int
    zero_stage: int
    precision: str
    optimizer_step: int
    """Updates that the Adam moments have seen."""
    parameters: list[list[str]]
    """Names of the trained parameters, per optimizer group, in order."""
    frozen_sha256: str
    probe_loss: float
    """Loss in nats of fixed rows under the saved weights; checked again at load."""
    interpolated: float | None = None
    """Share of the way from the stage's first weights to the trained ones, where that was chosen at its end."""

    def same_layout(self, engine: Engine) -> bool:
        """Whether DeepSpeed can load the shards as they are."""
        mine = (engine.shape.world, engine.stage, engine.training.precision)
        return (self.world_size, self.zero_stage, self.precision) == mine


@dataclass(frozen=True)
class Checkpoint:
    folder: Storage
    info: CheckpointInfo
    files: dict[str, dict[str, Any]]


def committed(folder: Storage) -> list[Checkpoint]:
    """Checkpoints with a readable manifest, newest first."""
    found = []
    for name in folder.list():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            found.append(read_manifest(folder.child(name)))
    return sorted(found, key=_age, reverse=True)


def _age(checkpoint: Checkpoint) -> tuple[int, bool, str]:
    return checkpoint.info.step, checkpoint.info.interpolated is not None, checkpoint.folder.uri


def read_manifest(folder: Storage) -> Checkpoint:
    """The checkpoint in a folder. Raises FileNotFoundError, ValueError, KeyError or TypeError if it is none."""
    record = folder.read_json(MANIFEST)
    return Checkpoint(folder, CheckpointInfo(**record["info"]), record["files"])
