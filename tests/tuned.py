"""Studies small enough for a test: real runs of one stage that learns one made-up language and replays another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from nexus_ray.config import parse_config, to_yaml
from nexus_ray.storage import Storage
from nexus_ray.synthesis.append_log import read_log
from tests.roadmaps import tiny_roadmap

STEPS, EVERY = 12, 3
RATIO, RATE = "continual.replay_ratio", "training.learning_rate"
SPACE = {RATIO: {"choice": [0.0, 0.25]}, RATE: {"choice": [5.0e-3, 5.0e-4]}}
ASHA = {"rule": "asha", "eta": 2, "rungs": [0.25]}


def write_tiny_study(folder: Path, *, run: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A study of four points that promotes two; keyword arguments replace its fields, `run` values of its base."""
    settings = {"evaluation__every_steps": EVERY, "report__sample_tokens": 0, **(run or {})}
    data = tiny_roadmap(folder, name="base", **settings).model_dump(mode="json")
    data["stages"] = [{"name": "south", "domains": {"south": 1.0}, "replay": {"north": 1.0}}]
    (folder / "run.yaml").write_text(to_yaml(parse_config(data)))
    study = {"name": "s", "base": "run.yaml", "space": SPACE, "stopping": ASHA, "max_concurrent": 1, **changes}
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "study.yaml"


def record(folder: Path, name: str = "s") -> Path:
    """The study's folder."""
    return folder / "runs" / f"{name}-study"


def events(folder: Path, name: str = "s") -> list[dict[str, Any]]:
    """What is in the log of a study."""
    return list(read_log(Storage(str(record(folder, name))), "trials"))


def decided(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was planned, measured and decided, in order: no starts, nothing that depends on a clock."""
    kept = (event for event in log if event["event"] not in ("started", "prepared", "timed"))
    return [{key: value for key, value in event.items() if key != "time"} for event in kept]


def finished(log: list[dict[str, Any]]) -> dict[str, str]:
    """Last state of each trial or point that the log speaks of."""
    last = {}
    for event in log:
        if event["event"] in ("paused", "finished", "failed", "stopped"):
            last[event.get("trial") or event["point"]] = event["event"]
    return last


def base_fits(folder: Path, run: str = "*") -> int:
    """How often a base model was scored, by a run or a study, or over all."""
    return len(list((folder / "runs").glob(f"{run}/control/ray/-1-base-*")))


def read(folder: Path, name: str) -> Any:
    return json.loads((record(folder) / name).read_text())
