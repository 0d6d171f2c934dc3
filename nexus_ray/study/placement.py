"""How many trials a cluster holds at once, so that no two of them wait for each other for ever. Pure.

A trial takes its training workers, each with its CPUs and GPUs on one node; one whole CPU for data tasks; and a small
share of one for its driver. Ray gives a trial's workers all at once or not at all, so half a trial is never placed.
What could still happen is that the workers of many trials take every CPU and none is left for the data tasks that feed
them (Ray Data then waits without end), or that a driver's share of a CPU breaks up the room of the very worker that the
driver waits for. So the count holds a data CPU and the workers of each trial wherever Ray puts the drivers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nexus_ray.errors import ConfigError
from nexus_ray.session import SPARE_CPUS, Demand, places

DRIVER_CPUS = 0.01
"""What a trial's driver asks Ray for: Tune cannot place an actor that asks for nothing."""

DRIVERS_PER_CPU = round(1 / DRIVER_CPUS)

Node = Mapping[str, float]
"""Resources of a node, as `ray.nodes()` names them (`CPU`, `GPU`)."""


@dataclass(frozen=True)
class Need:
    """What one trial takes."""

    workers: int
    cpus_per_worker: int
    gpus_per_worker: float = 0.0
    """Whole, or a part of one that others share."""

    @property
    def cpus(self) -> int:
        """Whole CPUs, that of the data tasks included."""
        return self.workers * self.cpus_per_worker + SPARE_CPUS


def need_of(demands: Iterable[Demand]) -> Need:
    """What the hungriest stages of the runs take (see `nexus_ray.session.stage_demands`)."""
    demands = list(demands)
    return Need(
        workers=max(demand.workers for demand in demands),
        cpus_per_worker=max(demand.cpus_per_worker for demand in demands),
        gpus_per_worker=max(demand.gpus / demand.workers for demand in demands),
    )


def capacity(need: Need, nodes: Sequence[Node]) -> int:
    """Trials that always find room together; 0 if not even one does."""
    count = 0
    while _holds(need, nodes, count + 1):
        count += 1
    return count


def _holds(need: Need, nodes: Sequence[Node], trials: int) -> bool:
    """Whether so many trials fit, their drivers lying where they do most harm: the first on a node spoils a whole CPU
    of it, and a worker's place too if the node has no CPU to spare; any more harm takes a CPU full of drivers."""
    more = (trials - 1) // DRIVERS_PER_CPU
    spoiled = min(trials, sum(_cpus(node) >= 1 for node in nodes)) + more
    if trials * need.cpus + spoiled > sum(_cpus(node) for node in nodes):
        return False
    whole = [_places(need, node, _cpus(node)) for node in nodes]
    left = [_places(need, node, _cpus(node) - 1) for node in nodes]
    lost = min(trials, sum(whole) - sum(left)) + more
    return trials * need.workers <= sum(whole) - lost


def _cpus(node: Node) -> int:
    return int(node.get("CPU", 0))


def _places(need: Need, node: Node, cpus: int) -> int:
    return places(node, cpus, need.cpus_per_worker, need.gpus_per_worker)


def concurrent_trials(need: Need, nodes: Sequence[Node], most: int | None) -> int:
    """How many trials to run at once: as many as fit, at most `most` (`max_concurrent`). Raises ConfigError with the
    numbers and a way out if not even one fits."""
    fitting = capacity(need, nodes)
    if fitting:
        return fitting if most is None else min(fitting, most)
    cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    raise ConfigError(
        f"one trial takes {need.workers} workers x {need.cpus_per_worker} CPUs and {need.gpus_per_worker:g} GPUs, "
        f"{SPARE_CPUS} CPU for data tasks and {DRIVER_CPUS} for its driver, together {need.cpus + 1} whole CPUs"
        f"{f' and {need.workers * need.gpus_per_worker:g} GPUs' if need.gpus_per_worker else ''}; the cluster has "
        f"{cpus} CPUs and {gpus} GPUs on {len(nodes)} node{'s' if len(nodes) != 1 else ''}, and a worker stays on one "
        f"node, of which a driver may break up a CPU; {_way_out(need, nodes, cpus)}"
    )


def _way_out(need: Need, nodes: Sequence[Node], cpus: int) -> str:
    for workers in range(need.workers, 0, -1):
        for per_worker in range(need.cpus_per_worker, 0, -1):
            if _holds(Need(workers, per_worker, need.gpus_per_worker), nodes, 1):
                return f"set cluster.num_workers={workers} and cluster.cpus_per_worker={per_worker}, or add nodes"
    if need.gpus_per_worker:
        return "set cluster.use_gpu: false, or add GPU nodes"
    return f"add {max(1, SPARE_CPUS + 2 - cpus)} CPUs; a study needs {SPARE_CPUS + 2} at the least"
