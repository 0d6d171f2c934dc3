"""Contestants that train in turns: each runs a segment of steps when given the baton and sleeps otherwise.

Batons are files, because a contestant may live in a Ray worker: `go-<k>` starts segment k, `done-<k>` tells of it. A
sleeping contestant looks twenty times a second, which costs nothing; never do two of them run at once. The first
step of every segment is not counted (cold caches), and the first segment is a warm-up.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.errors import Interrupted
from nexus_ray.train.loop import StageJob, peak_memory
from nexus_ray.train.stop import STOP_FILE
from tests.benchmarks.figures import Segment

POLL_S = 0.05
PATIENCE_S = 900.0
ROOT = Path(__file__).resolve().parents[2]


def write_baton(folder: Path, name: str, content: Any = None) -> None:
    beside = folder / f".{name}.tmp"
    beside.write_text(json.dumps(content))
    beside.rename(folder / name)


def await_baton(folder: Path, name: str, alive: Callable[[], bool] = lambda: True) -> Any:
    """Sleep until the baton lies there. Raises TimeoutError, or RuntimeError if whoever should lay it is gone."""
    deadline = time.monotonic() + PATIENCE_S
    while not (folder / name).exists():
        if not alive():
            raise RuntimeError(f"whoever should write {folder / name} has ended")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder / name} did not come within {PATIENCE_S:.0f} s")
        time.sleep(POLL_S)
    return json.loads((folder / name).read_text())


@dataclass
class PausingHooks:
    """`StageHooks` that give the baton back after every `evaluation.every_steps` steps of a stage."""

    folder: str
    seq_len: int = 256
    vocab_size: int = 4096
    _segment: int = field(default=0, repr=False)

    def during(self, model: Any, context: Any) -> dict[str, float]:
        if context.rank == 0:
            told = {"ended": time.time(), "peak_memory_bytes": peak_memory(context.device)}
            write_baton(Path(self.folder), f"done-{self._segment}", told)
        self._segment += 1
        await_baton(Path(self.folder), f"go-{self._segment}")
        return {}

    def old_text(self, rows: int) -> NDArray[np.int32]:
        """Some rows for the checks that new blocks start with; made-up text, like all of a benchmark's."""
        row = np.random.default_rng(1).integers(1, self.vocab_size, (rows, self.seq_len + 1), dtype=np.int32)
        row[:, 0] = ~row[:, 0]
        return row

    def finish(self, engine: Any, context: Any, adapted: Any) -> dict[str, Any]:
        return {}


class Contestant(ABC):
    """Someone who runs segments of `steps` counted steps."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps, self._segment = folder, steps, 0
        self.told: Any = None
        """What came back with the latest baton."""
        folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def alive(self) -> bool: ...

    @abstractmethod
    def _measure(self, done: Any, number: int) -> Segment: ...

    @abstractmethod
    def close(self) -> None: ...

    def warm_up(self) -> None:
        """Wait for the start and the first segment, which is not counted."""
        await_baton(self.folder, "done-0", self.alive)

    def segment(self) -> Segment:
        """Run the next segment."""
        self._segment += 1
        write_baton(self.folder, f"go-{self._segment}")
        self.told = await_baton(self.folder, f"done-{self._segment}", self.alive)
        return self._measure(self.told, self._segment)


class Stage(Contestant):
    """A stage of ours; `run` blocks until it ends (`fit` on a Ray cluster, or a worker loop of its own).

    Its record tells the time at the end of every step; nothing between two steps is left out.
    """

    def __init__(self, job: StageJob, folder: Path, run: Callable[[StageJob], Any]) -> None:
        every = job.config.evaluation.every_steps
        assert every is not None and every > 1
        super().__init__(folder, every - 1)
        self.every, self.job = every, job
        self.error: BaseException | None = None
        self.result: Any = None
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True, name="stage")
        self._thread.start()

    def _run(self, run: Callable[[StageJob], Any]) -> None:
        try:
            self.result = run(self.job)
        except Interrupted:  # as asked for in `close`
            pass
        except BaseException as error:  # raised again in `alive`, in the main thread
            self.error = error

    def alive(self) -> bool:
        if self.error is not None:
            raise self.error
        return self._thread.is_alive()

    def _measure(self, done: Any, number: int) -> Segment:
        times = self._times()
        first = number * self.every + 1
        ends = [*(times[step] for step in range(first, first + self.every - 1)), float(done["ended"])]
        return Segment(self.steps, ends[-1] - ends[0], tuple(right - left for left, right in pairwise(ends)))

    def _times(self) -> dict[int, float]:
        lines = self.job.run.read_text("metrics.jsonl").splitlines()
        return {line["step"]: line["time"] for line in map(json.loads, lines)}

    def close(self) -> None:
        """Ask the stage to stop, as Ctrl-C would."""
        self.job.run.write_text("benchmark", *STOP_FILE)
        time.sleep(1.2)  # the worker looks twice a second
        write_baton(self.folder, f"go-{self._segment + 1}")
        self._thread.join(timeout=PATIENCE_S)
        self.alive()


class Processes(Contestant):
    """`world` processes of this package's module `module`, which count and time the steps themselves."""

    def __init__(
        self,
        module: str,
        job: StageJob,
        folder: Path,
        *,
        steps: int,
        world: int = 1,
        nice: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder, steps)
        (folder / "job.pickle").write_bytes(pickle.dumps(job))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        threads = str(job.config.cluster.cpus_per_worker)
        self._workers = []
        for rank in range(world):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, **(environment or {})}
            self._workers.append(
                subprocess.Popen(
                    ["nice", "-n", str(nice), sys.executable, "-m", module, str(folder), str(steps)],
                    cwd=ROOT,
                    env=os.environ
                    | {key: str(value) for key, value in own.items()}
                    | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": threads, "TRANSFORMERS_VERBOSITY": "error"},
                )
            )

    def alive(self) -> bool:
        return all(worker.poll() is None for worker in self._workers)

    def wait(self) -> int:
        """Wait until all have ended by themselves; the greatest exit status."""
        return max(worker.wait() for worker in self._workers)

    def _measure(self, done: Any, number: int) -> Segment:
        return Segment(self.steps, sum(done["step_seconds"]), tuple(done["step_seconds"]))

    def close(self) -> None:
        write_baton(self.folder, "end")
        for worker in self._workers:
            try:
                worker.wait(timeout=60)
            except subprocess.TimeoutExpired:
                worker.kill()


def serve(folder: Path, segment: Callable[[], list[float]], *, rank: int) -> None:
    """The other side of `Processes`: run a segment whenever asked, until the end."""
    number = 0
    while True:
        seconds = segment()
        if rank == 0:
            write_baton(folder, f"done-{number}", {"step_seconds": seconds})
        number += 1
        while not (folder / f"go-{number}").exists():
            if (folder / "end").exists() or os.getppid() == 1:
                return
            time.sleep(POLL_S)
