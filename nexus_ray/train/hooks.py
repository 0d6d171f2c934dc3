"""What the training loop asks of its evaluators and exporters, which are handed in: it imports none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nexus_ray.models.methods import Adapted
from nexus_ray.train.agree import WorkerContext
from nexus_ray.train.engine import Engine


class StageHooks(Protocol):
    """What happens to the model besides training; every method is called by all workers together."""

    def during(self, model: nn.Module, context: WorkerContext) -> dict[str, float]:
        """Metrics of an evaluation during the stage."""

    def old_text(self, rows: int) -> NDArray[np.int32]:
        """Rows [n, S+1] of held-out text that the model knew before the stage."""

    def begin(self, model: nn.Module, context: WorkerContext) -> None:
        """Evaluate before the first step of a controlled stage."""

    def drifts(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Bits per byte that domains lost between `begin` and the last `during`, and standard errors; rank 0 alone."""

    def select(self, model: nn.Module, context: WorkerContext) -> dict[str, float]:
        """Nats per token by domain on held-out text that no score is reported of, to choose between models."""

    def finish(self, engine: Engine, context: WorkerContext, adapted: Adapted) -> dict[str, Any]:
        """Evaluate and export at the end of the stage; what it returns becomes part of the stage's result."""
