"""The run record: who writes `run.json`, and how the driver follows `metrics.jsonl` while workers append to it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nexus_ray import __version__
from nexus_ray.config import RunConfig, detect_hardware
from nexus_ray.storage import Storage

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "tokenizers", "datasets", "pyarrow", "pydantic", "numpy")


class RunRecordWriter:
    """Keeps `run.json` true from the start of a run to its end; every change is one atomic write."""

    def __init__(self, folder: Storage, config: RunConfig, fingerprint: str, *, existing: bool = False) -> None:
        self._folder = folder
        old = folder.read_json("run.json") if folder.exists("run.json") else {}
        self._record: dict[str, Any] = old
        if existing:
            return
        commit, dirty = source_commit()
        self._record = {
            "name": config.name,
            "fingerprint": fingerprint,
            "commit": commit,
            "dirty": dirty,
            "started": old.get("started", _now()),
            "resumed": [*old.get("resumed", []), _now()] if old else [],
            "finished": None,
            "outcome": "running",
            "error": None,
            "versions": versions(),
            "hardware": hardware(config),
            "seeds": {"seed": config.seed},
            "data": old.get("data", {}),
            "made": old.get("made", {}),
            "tokenizer": old.get("tokenizer", {}),
            "model": old.get("model", {}),
            "stages": old.get("stages", []),
        }
        self._write()

    def _write(self) -> None:
        self._folder.write_json(self._record, "run.json")

    def data(self, prepared: Any) -> None:
        """Sources, licences, counts and fingerprints of the domains; documents read and tokens encoded by this run, in
        all its processes, rather than found (`made`)."""
        before = self._record.get("made", {})
        self._record["made"] = {key: before.get(key, 0) + count for key, count in asdict(prepared.made).items()}
        self._record["tokenizer"] = {
            "fingerprint": prepared.tokenizer_fingerprint,
            "vocab_size": prepared.vocab_size,
            "eos_id": prepared.eos_id,
        }
        self._record["data"] = {
            name: {
                "source": domain.source,
                "license": domain.license,
                "attribution": domain.attribution,
                "documents": domain.train.documents,
                "tokens": domain.train.tokens,
                "held_out_documents": domain.held_out.documents,
                "train": domain.train.fingerprint,
                "held_out": domain.held_out.fingerprint,
                "quarantined": [
                    f"{manifest.split}/{file}"
                    for manifest in (domain.train, domain.held_out)
                    for file in manifest.quarantined
                ],
                "stats": dict(domain.stats),
            }
            for name, domain in prepared.domains.items()
        }
        self._write()

    def model(self, parameters: int) -> None:
        self._record["model"] = {"parameters": parameters}
        self._write()

    def stages(self, results: list[dict[str, Any]]) -> None:
        """A summary of each finished stage; the whole result is in its `stage.json`."""
        keys = ["name", "index", "kind", "attempt", "steps", "tokens", "seconds", "world_size", "time_to_first_step"]
        keys += ["parameters", "trainable_parameters", "peak_memory_bytes"]
        self._record["stages"] = [{key: result.get(key) for key in keys} for result in results]
        self._write()

    def finish(self, outcome: str, error: BaseException | None = None) -> None:
        self._record |= {"outcome": outcome, "finished": _now(), "error": None if error is None else str(error)}
        self._write()


def versions() -> dict[str, str]:
    """Versions of Python, this package and what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("nexus-ray", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = __version__ if package == "nexus-ray" else "missing"
    return found


def hardware(config: RunConfig) -> dict[str, Any]:
    """The machine of the driver, and what the config asks of the workers."""
    here = detect_hardware()
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": here.cpus,
        "amx_bf16": here.amx_bf16,
        "num_workers": config.cluster.num_workers,
        "cpus_per_worker": config.cluster.cpus_per_worker,
        "use_gpu": config.cluster.use_gpu,
        "gpus_per_worker": config.cluster.gpus_per_worker if config.cluster.use_gpu else 0.0,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


NO_SOURCE = ":(exclude)tests/benchmarks/results"


def source_commit() -> tuple[str | None, bool]:
    """Commit of the source tree this package runs from, and whether it has changes (other than records of benchmarks);
    (None, False) outside of git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None, False
    try:
        run = {"cwd": root, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        status = subprocess.run(["git", "status", "--porcelain", "-uno", "--", ".", NO_SOURCE], **run).stdout  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None, False
    return commit, bool(status.strip())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class MetricsTail:
    """Hands each new line of a stage's metrics to callbacks, from a thread, while the stage runs."""

    def __init__(
        self,
        folder: Storage,
        stage_index: int,
        attempt: int,
        callbacks: Sequence[Callable[[dict[str, Any]], None]],
        *,
        stage: str | None = None,
        every_s: float = 0.5,
    ) -> None:
        self._folder, self._key, self._stage = folder, (stage_index, attempt), stage
        self._callbacks, self._every_s = callbacks, every_s
        self._position = folder.size("metrics.jsonl") if folder.exists("metrics.jsonl") else 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="metrics-tail")

    def __enter__(self) -> MetricsTail:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._done.wait(self._every_s if self._folder.is_local else 10 * self._every_s):
            self._read()
        self._read()

    def _read(self) -> None:
        if not self._folder.exists("metrics.jsonl") or self._folder.size("metrics.jsonl") <= self._position:
            return
        with self._folder.filesystem.open_input_file(self._folder.path("metrics.jsonl")) as source:
            source.seek(self._position)
            text = source.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        for raw in whole.splitlines():
            line = json.loads(raw)
            mine = (line["stage_index"], line["attempt"]) == self._key
            if mine and (self._stage is None or line["stage"] == self._stage):
                for callback in self._callbacks:
                    callback(line)
