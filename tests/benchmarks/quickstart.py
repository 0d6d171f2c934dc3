"""The quick start: seconds from the call of `fit` to the first optimizer step, stage by stage, with warm caches."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import median

from nexus_ray.config import RunConfig
from nexus_ray.config.load import parse_config
from nexus_ray.progress import Progress
from nexus_ray.roadmap import run_roadmap
from nexus_ray.session import ray_session
from tests.benchmarks.figures import Bar, Outcome
from tests.roadmaps import tiny_roadmap

LIMIT_S = 15.0
MARKS = {
    "entered": "worker called",
    "imported": "imports",
    "deepspeed": "DeepSpeed",
    "engine": "engine",
    "batch": "first batch",
    "step": "first step",
}


def run(folder: Path, *, rounds: int, stages: int) -> Outcome:
    outcome = Outcome("quickstart: seconds from fit to the first step", ("stage", "total", *MARKS.values()))
    totals: list[float] = []
    for number in range(rounds):
        config = _config(folder, f"round-{number}", stages)
        with ray_session(config):
            found = run_roadmap(config, progress=Progress(stream=(folder / "progress.txt").open("a")))
        for result in found.stages:
            marks = {"called": 0.0, **{name: float(result["timings"][name]) for name in MARKS}}
            parts = [round(after - before, 2) for before, after in pairwise(marks.values())]
            totals.append(marks["step"])
            outcome.rows.append((f"{number + 1}. {result['name']}", marks["step"], *parts))
        outcome.samples[f"round {number + 1}"] = {result["name"]: result["timings"] for result in found.stages}
    columns = list(zip(*(row[1:] for row in outcome.rows), strict=True))
    outcome.rows.append(("median", *(median(column) for column in columns)))
    outcome.rows.append(("most", *(max(column) for column in columns)))
    outcome.bars.append(Bar("slowest stage, in seconds", max(totals), LIMIT_S, at_most=True))
    return outcome


def _config(folder: Path, name: str, stages: int) -> RunConfig:
    """The roadmap of the integration tests with the demo's model and batch, four steps a stage."""
    tiny = tiny_roadmap(folder, name=name, stages=stages).model_dump(mode="json", exclude_unset=True)
    return parse_config(
        tiny,
        [
            "model.architecture={hidden_size: 192, num_layers: 4, num_heads: 6, max_seq_len: 512}",
            "training.seq_len=256",
            "training.global_batch_tokens=8192",
            "training.token_budget=32768",
            "training.micro_batch_size=16",
            "evaluation.every_steps=null",
            "cluster.cpus_per_worker=null",
        ],
    )


SETTINGS = {"rounds": 2, "stages": 3}
QUICK = {"rounds": 1, "stages": 1}
