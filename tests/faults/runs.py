"""Runs of the command line that a test can watch, signal and kill, and what they leave behind.

Only processes that descend from the test's own drivers are ever signalled, found by their parents, never by name
across the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nexus_ray.config import to_yaml
from tests.roadmaps import tiny_roadmap

STEPS, EVERY = 64, 5
"""Steps of a stage, and between checkpoints."""
PATIENCE_S = 240.0
"""Much longer than anything here takes, on a machine that does other things too."""
LAST = 1
"""The stage that faults hit: the second, which starts from the first and replays it."""
EXACT = ("train/loss", "train/loss/north", "train/loss/south", "train/grad_norm", "train/lr", "data/batch_hash")


@dataclass
class Runs:
    """Runs of one config in one storage."""

    folder: Path
    drivers: list[Driver] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = tiny_roadmap(
            self.folder,
            model__architecture={"hidden_size": 128, "num_layers": 4, "num_heads": 4, "max_seq_len": 64},
            training__seq_len=64,
            training__global_batch_tokens=16 * 64,
            training__token_budget=STEPS * 16 * 64,
            training__learning_rate=2.0e-3,
            training__checkpoint={"every_steps": EVERY, "every_seconds": None, "keep": 2},
            evaluation__every_steps=None,
            report__sample_tokens=0,
        )
        self.config = self.folder / "run.yaml"
        self.config.write_text(to_yaml(config))

    def place(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, name: str, *overrides: str) -> Driver:
        """`nexus-ray roadmap` in a process group of its own."""
        argv = [sys.executable, "-m", "nexus_ray.cli", "roadmap", str(self.config), f"name={name}", *overrides]
        driver = Driver(argv, self.place(name), self.folder / f"{name}-{len(self.drivers)}.log")
        self.drivers.append(driver)
        return driver

    def complete(self, name: str, *overrides: str) -> Driver:
        """Run, or go on, to the end."""
        driver = self.start(name, *overrides)
        assert driver.wait() == 0, driver.log()
        return driver

    def begun(self, name: str, reference: str) -> None:
        """A run whose first stage is done, copied from one that has done it."""
        source, target = self.place(reference), self.place(name)
        for part in ("base", "stages/00-north"):
            shutil.copytree(source / part, target / part)
        for file in ("plan.jsonl", "metrics.jsonl"):
            lines = [json.loads(line) for line in (source / file).read_text().splitlines()]
            kept = [json.dumps(line) for line in lines if line["stage_index"] < LAST]
            (target / file).write_text("\n".join(kept) + "\n")

    def close(self) -> None:
        for driver in self.drivers:
            driver.end()


class Driver:
    """One process of the command line, and its descendants."""

    def __init__(self, argv: Sequence[str], run: Path, log: Path) -> None:
        self.run, self._log = run, log
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                argv, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self._seen: dict[int, psutil.Process] = {}

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """All living descendants seen so far; nothing new once the driver has gone, whose number may be another's."""
        if self.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(self.process.pid).children(recursive=True):
                    self._seen.setdefault(process.pid, process)
        return [process for process in self._seen.values() if alive(process)]

    def workers(self) -> list[psutil.Process]:
        """This driver's training workers."""
        return [process for process in self.family() if _title(process).startswith("ray::RayTrainWorker")]

    def wait_for_step(self, step: int) -> int:
        """Wait until the second stage has done `step` steps; the newest step in the record."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            done = max(steps(self.run), default=0)
            if done >= step:
                self.family()
                return done
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log()}"
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached in {PATIENCE_S:.0f} s:\n{self.log()}")

    def wait(self) -> int:
        """The exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {PATIENCE_S:.0f} s:\n{self.log()}") from None

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the driver alone, or to all of its process group as `timeout` does."""
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self) -> None:
        """Kill what is left of this driver and its descendants."""
        left = self.family()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return " ".join(process.cmdline())
    return ""


def alive(process: psutil.Process) -> bool:
    """Whether it still runs (a zombie does not, nor another process that got its number)."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def until(condition: Callable[[], Any], what: str) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {PATIENCE_S:.0f} s for {what}")


def wait_gone(processes: Sequence[psutil.Process], timeout_s: float) -> list[str]:
    """Titles of those that are still there after a while."""
    deadline = time.monotonic() + timeout_s
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [_title(process) for process in processes if alive(process)]


# --- what a run left --------------------------------------------------------------------------------------------------


def lines(run: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of the second stage, in the order they were written."""
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True):
            if line.endswith("\n") and f'"stage_index": {LAST},' in line:
                yield json.loads(line)


def steps(run: Path) -> dict[int, dict[str, Any]]:
    """The last line of each step of the second stage."""
    return {line["step"]: line for line in lines(run)}


def repeated(run: Path) -> set[int]:
    """Steps that were done more than once."""
    done = [line["step"] for line in lines(run)]
    return {step for step in done if done.count(step) > 1}


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def unfinished(run: Path) -> bool:
    """Whether the second stage is under way: so that a fault that hits now hits its middle."""
    return 0 < max(steps(run), default=0) < STEPS and not (run / "stages" / "01-south" / "stage.json").exists()


def committed(run: Path) -> list[int]:
    """Steps of the second stage's committed checkpoints."""
    manifests = run.glob("stages/01-south/checkpoints/*/MANIFEST.json")
    return sorted(json.loads(file.read_text())["info"]["step"] for file in manifests)


def same_curve(run: Path, reference: Path, *, keys: Sequence[str] = EXACT) -> None:
    """Every step's numbers equal those of the reference, bit for bit."""
    mine, theirs = steps(run), steps(reference)
    assert sorted(mine) == sorted(theirs) == list(range(1, STEPS + 1))
    for step in theirs:
        for key in keys:
            assert mine[step][key] == theirs[step][key], (step, key)


def same_scores(run: Path, reference: Path) -> None:
    assert (run / "scores.json").read_bytes() == (reference / "scores.json").read_bytes()
