"""The tax: steady tokens per second of a stage over a bare PyTorch loop on the same cores.

The stage runs as users run it: a Ray head, a Ray Train worker, Ray Data feeding a long plan, DeepSpeed, every step in
`metrics.jsonl`, the driver following it. The bare loop runs in turns with it, beside the same Ray cluster (the stage
sleeping), and alone before Ray starts and after it has ended. The stage's worker runs under `session.KEEP_MEMORY`, as
ours do on a CPU; the bare loop runs as `python train.py` would, and once more under the same setting (`tuned`), so that
what the setting gives and what Ray takes can be told apart.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from nexus_ray.config.tree import RunConfig
from nexus_ray.progress import Progress
from nexus_ray.record import MetricsTail
from nexus_ray.session import KEEP_MEMORY, ray_session
from tests.benchmarks.contestants import PausingHooks, Processes, Stage
from tests.benchmarks.figures import Bar, Outcome, Segment, paired_ratio, spread
from tests.benchmarks.material import BATCH_TOKENS, bench_config, bench_job, write_corpus
from tests.benchmarks.processes import descendants, title

BEYOND = 20
"""The plan is so many times longer than what is measured, so that Ray Data still reads while we measure."""
BARS: dict[str, dict[str, float | None]] = {
    "1 worker, 1 thread": {"beside idle Ray": 0.98, "alone": None},
    "1 worker, 2 threads": {"beside idle Ray": 0.97, "alone": 0.90},
    "2 workers, 1 thread": {"beside idle Ray": 0.97, "alone": 0.90},
}
SHAPES = {"1 worker, 1 thread": (1, 1), "1 worker, 2 threads": (1, 2), "2 workers, 1 thread": (2, 1)}


def run(
    folder: Path, *, shapes: list[str], rounds: int, seconds: float, tokens: int, batch_tokens: int, nice: int
) -> Outcome:
    """`nice`: of the bare loop."""
    outcome = Outcome(
        "tax: tokens/s of a stage over a bare PyTorch loop",
        ("", "stage", "bare beside Ray", "bare alone", "stage/beside", "least", "most", "stage/alone", "stage/tuned"),
    )
    corpora = [write_corpus(folder / "tokens", name, tokens, seed=i) for i, name in enumerate(("new", "old"))]
    for shape in shapes:
        workers, threads = SHAPES[shape]
        place = folder / shape.replace(",", "").replace(" ", "-")
        config = bench_config(
            place / "runs",
            ("new", "old"),
            f"cluster.num_workers={workers}",
            f"cluster.cpus_per_worker={threads}",
            f"training.global_batch_tokens={batch_tokens}",
            f"training.token_budget={batch_tokens}",
        )
        found = _compare(config, corpora, place, rounds=rounds, seconds=seconds, nice=nice)
        _judge(outcome, shape, found, batch_tokens)
    return outcome


def _compare(
    config: RunConfig, corpora: Any, place: Path, *, rounds: int, seconds: float, nice: int
) -> dict[str, list[Segment]]:
    """All segments of one shape, in the order alone, (beside, stage, tuned) x rounds, beside, alone."""
    workers = config.cluster.num_workers
    found: dict[str, list[Segment]] = {"stage": [], "beside": [], "alone": [], "tuned": []}
    steps = _steps(config, corpora, place / "pace", seconds)
    budget = (steps + 1) * (rounds + 1) * BEYOND * config.training.global_batch_tokens
    config = _longer(config, budget, every=steps + 1)
    job = bench_job(config, corpora, PausingHooks(str(place / "stage")))
    loop = "tests.benchmarks.bare"
    bare = Processes(loop, job, place / "bare", steps=steps, world=workers, nice=nice)
    tuned = Processes(loop, job, place / "tuned", steps=steps, world=workers, nice=nice, environment=KEEP_MEMORY)
    try:
        bare.warm_up()
        tuned.warm_up()
        alone = max(2, rounds // 2)
        found["alone"] += [bare.segment() for _ in range(alone)]
        with ray_session(config):
            stage = Stage(job, place / "stage", _fit)
            stage.warm_up()
            for _ in range(rounds):
                found["beside"].append(_counted(bare))
                found["stage"].append(_counted(stage))
                found["tuned"].append(tuned.segment())
            found["beside"].append(_counted(bare))
            stage.close()
        found["alone"] += [bare.segment() for _ in range(alone)]
    finally:
        bare.close()
        tuned.close()
    return found


def _steps(config: RunConfig, corpora: Any, place: Path, seconds: float) -> int:
    """Steps that fill a segment, from a short try of the bare loop."""
    job = bench_job(config, corpora, None)
    bare = Processes("tests.benchmarks.bare", job, place, steps=2, world=config.cluster.num_workers)
    try:
        bare.warm_up()
        return max(2, round(seconds / min(bare.segment().step_seconds)))
    finally:
        bare.close()


def _longer(config: RunConfig, token_budget: int, *, every: int) -> RunConfig:
    training = config.training.model_copy(update={"token_budget": token_budget})
    evaluation = config.evaluation.model_copy(update={"every_steps": every})
    return config.model_copy(update={"training": training, "evaluation": evaluation})


def _fit(job: Any) -> Any:
    """`fit` with a driver that follows the record and prints, as the roadmap's does."""
    from nexus_ray.train.launch import fit

    progress = Progress(stream=io.StringIO())
    with MetricsTail(job.run, job.stage_index, job.attempt, (progress.update,)):
        progress.stage(job.stage, job.stream.steps)
        return fit(job)


def _counted(contestant: Stage | Processes) -> Segment:
    """A segment, with what Ray's processes (but for the training workers) used of the processors meanwhile."""
    before = descendants()
    segment = contestant.segment()
    used: dict[str, float] = {}
    for pid, cpu in descendants().items():
        name = title(pid)
        if pid in before and not name.startswith(("RayTrainWorker", "python")):
            used[name] = used.get(name, 0.0) + cpu - before[pid]
    return replace(segment, helpers_cpu={name: round(cpu, 2) for name, cpu in used.items() if cpu >= 0.01})


def _judge(outcome: Outcome, shape: str, found: dict[str, list[Segment]], batch_tokens: int) -> None:
    rates = {name: [s.tokens_per_second(batch_tokens) for s in segments] for name, segments in found.items()}
    ratios = paired_ratio(rates["stage"], rates["beside"])
    ratio, least, most = spread(ratios)
    alone = median(rates["stage"]) / median(rates["alone"])
    tuned = median(ours / theirs for ours, theirs in zip(rates["stage"], rates["tuned"], strict=True))
    outcome.rows.append(
        (shape, *(median(rates[name]) for name in ("stage", "beside", "alone")), ratio, least, most, alone, tuned)
    )
    for name, value in (("beside idle Ray", ratio), ("alone", alone)):
        limit = BARS[shape][name]
        if limit is not None:
            outcome.bars.append(Bar(f"{shape}: stage over the bare loop {name}", value, limit))
    for name in ("stage", "beside"):
        what = "the stage runs" if name == "stage" else "the bare loop runs"
        outcome.notes.append(f"{shape}: while {what}, Ray's other processes use {_helpers(found[name])}")
    outcome.samples[shape] = {
        "ratios": ratios,
        **{name: [asdict(s) for s in segments] for name, segments in found.items()},
    }


def _helpers(segments: list[Segment]) -> str:
    """`3.1% of one core (raylet 1.2%, ...)`."""
    seconds, used = sum(s.seconds for s in segments), Counter[str]()
    for segment in segments:
        used.update(segment.helpers_cpu)
    parts = ", ".join(f"{name} {cpu / seconds:.1%}" for name, cpu in used.most_common(4))
    return f"{used.total() / seconds:.1%} of one core ({parts})"


SETTINGS = {
    "shapes": list(SHAPES),
    "rounds": 5,
    "seconds": 15.0,
    "tokens": 2_000_000,
    "batch_tokens": BATCH_TOKENS,
    "nice": 0,
}
QUICK = {"shapes": list(SHAPES)[:1], "rounds": 1, "seconds": 0.5, "tokens": 100_000, "batch_tokens": 512, "nice": 0}
