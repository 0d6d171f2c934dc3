"""One turn of a trial, inside the process that Ray Tune started for it: a run of the roadmap, watched by the study."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from nexus_ray.config import RunConfig
from nexus_ray.errors import Interrupted, NexusError, Paused, Stopped, WorkersLost
from nexus_ray.storage import Storage
from nexus_ray.study.turns import Ended
from nexus_ray.tracking import redact_text
from nexus_ray.tune.box import Line

LOCK_S = 90.0
"""How long to wait for what a dead driver has left of an earlier turn; Ray ends that by itself."""


def run_turn(line: Line, *, report: Callable[[Storage], Any] | None) -> dict[str, Any]:
    """Run a trial up to whatever it is told, and say how it ended; its last result for Tune.

    An error of the run itself fails the trial at once; any other (workers that died more often than Train restarts
    them) does so when it comes again.
    """
    config = line.config()
    if config is None:
        return {"outcome": "not begun"}
    config = unmirrored(config)
    began = time.time()
    ended = _run(config, line, report)
    if ended.outcome == "broken":
        ended = _run(config, line, report)
    outcome = "failed" if ended.outcome == "broken" else ended.outcome
    first, last = _steps(Storage(config.storage).child(config.name), began)
    line.end(replace(ended, outcome=outcome, first_step=first, last_step=last))
    return {"outcome": outcome}


def load(line: Line, place: int) -> dict[str, Any]:
    """Import what runs need, in a process whose first trial is still to come, and wait until that can begin."""
    import nexus_ray.models.methods
    import nexus_ray.roadmap
    import nexus_ray.train.trainer  # noqa: F401

    line.loaded(place)
    return {"outcome": "loaded"}


def unmirrored(config: RunConfig) -> RunConfig:
    """The same run without W&B of its own: the study's driver writes it, as one W&B run among those of the study.
    That changes no fingerprint."""
    wandb = config.tracking.wandb.model_copy(update={"mode": "disabled"})
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"wandb": wandb})})


def _run(config: RunConfig, line: Line, report: Callable[[Storage], Any] | None) -> Ended:
    from nexus_ray.roadmap import run_roadmap

    try:
        return Ended(line.trial, "finished", end=run_roadmap(config, report=report, watcher=line, lock_s=LOCK_S).end)
    except Paused:
        return Ended(line.trial, "paused")
    except Stopped:
        return Ended(line.trial, "stopped")
    except Interrupted:
        return Ended(line.trial, "interrupted")
    except Exception as error:  # whatever ends one trial is recorded as its reason; the others do not depend on it
        return Ended(line.trial, how_it_failed(error), _reason(error))


def how_it_failed(error: Exception) -> Literal["failed", "broken"]:
    """`failed` where the same run would fail again, `broken` where another try may go well."""
    return "failed" if isinstance(error, NexusError) and not isinstance(error, WorkersLost) else "broken"


def _reason(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return redact_text(first if isinstance(error, NexusError) else f"{type(error).__name__}: {first}")


def _steps(run: Storage, since: float) -> tuple[float | None, float | None]:
    """When the first step since then began, and when the last one ended; None if there was none."""
    text = run.read_text("metrics.jsonl") if run.exists("metrics.jsonl") else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1] if line]
    mine = [line for line in lines if line["time"] >= since]
    return (mine[0]["time"] - mine[0]["perf/step_seconds"], mine[-1]["time"]) if mine else (None, None)
