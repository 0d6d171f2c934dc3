"""A place for tests of the worker loop: groups of workers, and runs that several tests look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config.tree import RunConfig
from tests.stage import STEPS, Workers, make_job, metrics, tiny_config, tiny_manifests

HASHES, LOSSES = "data/batch_hash", "train/loss"
ALIKE = 1e-6
"""Relative difference of losses that may come from adding the same numbers in another order."""
MOVED = 1e-5
"""The same after a change of worker count, for the rest of the stage."""


@dataclass
class Lab:
    """Groups of workers, started when first needed, and runs that several tests look at."""

    root: Path
    _workers: dict[int, Workers] = field(default_factory=dict)
    _runs: dict[str, tuple[RunConfig, dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.manifests = tiny_manifests(self.root)

    def config(self, name: str, **changes: Any) -> RunConfig:
        return tiny_config(self.root, name=name, **changes)

    def job(self, config: RunConfig, stage: int = 0) -> Any:
        return make_job(config, self.manifests, stage=stage)

    def run_job(self, job: Any, world: int = 1, *others: Any) -> dict[str, Any]:
        if world not in self._workers:
            self._workers[world] = Workers(world)
        try:
            return self._workers[world].run(job, *others)
        except RuntimeError:
            self._workers.pop(world).close()
            raise

    def run(self, config: RunConfig, *, world: int = 1, stage: int = 0) -> dict[str, Any]:
        """Run, or go on with, a stage; its result."""
        result = self.run_job(self.job(config, stage), world)
        assert "error" not in result, result["error"]["message"]
        return result

    def whole(self, *, world: int = 1, **changes: Any) -> tuple[RunConfig, dict[str, Any]]:
        """An uninterrupted stage with these settings, run once for all tests."""
        key = f"{world} {sorted(changes.items())}"
        if key not in self._runs:
            config = self.config(f"whole-{len(self._runs)}", **changes)
            self._runs[key] = config, self.run(config, world=world)
        return self._runs[key]

    def two_stages(self, **changes: Any) -> RunConfig:
        """A roadmap whose first stage is done, under a name of its own."""
        name = f"two-{len(list(self.root.glob('runs/*')))}"
        config = self.config(name, stages=2, **changes)
        self.run(config)
        return config

    def close(self) -> None:
        for workers in self._workers.values():
            workers.close()


def losses_agree(one: RunConfig, other: RunConfig, bound: float, *, stage: int = 0) -> None:
    """Losses of every step are within a relative bound, and those of each domain too."""
    mine, theirs = metrics(one, stage), metrics(other, stage)
    assert mine.keys() == theirs.keys() and len(mine) == STEPS
    for step, line in mine.items():
        for key in (key for key in line if key.startswith(LOSSES)):
            assert line[key] == pytest.approx(theirs[step][key], rel=bound, abs=0), (step, key)
