"""Errors that all workers of a group share: a lone one would leave the others waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_ray.errors import NexusError

T = TypeVar("T")


class KnownToAll(Exception):
    """Carries an error that every worker raises at the same point, after an exchange."""

    def __init__(self, error: NexusError) -> None:
        super().__init__(str(error))
        self.error = error


def gather(value: Any, world: int) -> list[Any]:
    """The objects of all workers, in the order of their ranks."""
    if world == 1:
        return [value]
    out: list[Any] = [None] * world
    dist.all_gather_object(out, value)
    return out


@dataclass(frozen=True)
class WorkerContext:
    """Which worker this is, and collective sums."""

    rank: int
    world: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all workers."""
        if self.world == 1:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved)
        return moved.to(values.device)

    def share(self, values: Tensor) -> None:
        """Overwrite a tensor with that of rank 0."""
        if self.world > 1:
            moved = values.to(self.device)
            dist.broadcast(moved, src=0)
            values.copy_(moved)

    def gather(self, value: Any) -> list[Any]:
        """The objects of all workers, in the order of their ranks."""
        return gather(value, self.world)

    def agreed(self, action: Callable[[], T]) -> T:
        """What `action`, which exchanges nothing, returns; if it fails in any worker, all raise the same error."""
        result, error = None, None
        try:
            result = action()
        except NexusError as caught:
            error = caught
        found = next((each for each in self.gather(error) if each is not None), None)
        if found is not None:
            raise KnownToAll(found)
        return cast(T, result)
