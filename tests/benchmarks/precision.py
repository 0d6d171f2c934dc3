"""bf16 (fp32 master weights, ZeRO 1) over fp32, on one and on two threads: the same worker loop in turns, no Ray."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from nexus_ray.config import detect_hardware
from nexus_ray.session import KEEP_MEMORY
from tests.benchmarks.contestants import PausingHooks, Processes, Stage
from tests.benchmarks.figures import Bar, Outcome, paired_ratio, spread
from tests.benchmarks.material import BATCH_TOKENS, bench_config, bench_job, write_corpus

PRECISIONS = {"fp32": 0, "bf16": 1}
"""ZeRO stage of each."""


def run(folder: Path, *, rounds: int, steps: int, threads: list[int], tokens: int, batch_tokens: int) -> Outcome:
    amx = detect_hardware().amx_bf16
    outcome = Outcome(
        "precision: tokens/s in bf16 (fp32 masters, ZeRO 1) over fp32",
        ("", "fp32", "bf16", "bf16/fp32", "least", "most"),
    )
    corpora = [write_corpus(folder / "tokens", name, tokens, seed=i) for i, name in enumerate(("new", "old"))]
    for count in threads:
        samples: dict[str, list[Any]] = {name: [] for name in PRECISIONS}
        stages = {
            name: _stage(folder / f"{name}-{count}", corpora, name, count, steps, rounds, batch_tokens)
            for name in PRECISIONS
        }
        try:
            for _ in range(rounds):
                samples["fp32"].append(stages["fp32"].segment())
                samples["bf16"].append(stages["bf16"].segment())
            samples["fp32"].append(stages["fp32"].segment())
        finally:
            for stage in stages.values():
                stage.close()
        rates = {name: [s.tokens_per_second(batch_tokens) for s in segments] for name, segments in samples.items()}
        ratios = paired_ratio(rates["bf16"], rates["fp32"])
        label = f"{count} thread{'s' if count > 1 else ''}"
        outcome.rows.append((label, median(rates["fp32"]), median(rates["bf16"]), *spread(ratios)))
        if amx:
            outcome.bars.append(Bar(f"{label}: bf16 over fp32", median(ratios), 1.4))
        outcome.samples[label] = {name: [asdict(s) for s in segments] for name, segments in samples.items()}
    outcome.notes.append(
        "this processor has AMX, and precision: auto is bf16"
        if amx
        else "this processor has no AMX: no bar applies, and precision: auto is fp32"
    )
    return outcome


def _stage(
    place: Path, corpora: Any, precision: str, threads: int, steps: int, rounds: int, batch_tokens: int
) -> Stage:
    config = bench_config(
        place / "runs",
        ("new", "old"),
        f"cluster.cpus_per_worker={threads}",
        f"training.precision={precision}",
        f"training.zero_stage={PRECISIONS[precision]}",
        f"training.global_batch_tokens={batch_tokens}",
        f"training.token_budget={batch_tokens * (steps + 1) * (rounds + 4)}",
        f"evaluation.every_steps={steps + 1}",
    )
    job = bench_job(config, corpora, PausingHooks(str(place / "batons")))

    def run(job: Any) -> None:
        name = "tests.benchmarks.own_loop"
        worker = Processes(name, job, place / "process", steps=steps, environment=KEEP_MEMORY)
        if worker.wait():
            raise RuntimeError(f"the {precision} loop ended with an error; see above")

    stage = Stage(job, place / "batons", run)
    stage.warm_up()
    return stage


SETTINGS = {"rounds": 4, "steps": 4, "threads": [1, 2], "tokens": 1_000_000, "batch_tokens": BATCH_TOKENS}
QUICK = {"rounds": 1, "steps": 1, "threads": [1], "tokens": 100_000, "batch_tokens": 512}
