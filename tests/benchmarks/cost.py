"""The step time of LoRA, new blocks and OSFT over their ideal: full training's, in proportion to operations.

Operations per token are those of `nexus_ray.models.flops`. Every method trains the same model, with blocks as wide as
SmolLM2-135M's, in the worker loop of a stage, without Ray and in turns with full training. Memory is the process's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from nexus_ray.config.tree import RunConfig
from nexus_ray.models.build import build_model
from nexus_ray.models.flops import training_flops
from nexus_ray.models.methods import Adapted, begin
from nexus_ray.session import KEEP_MEMORY
from tests.benchmarks.contestants import PausingHooks, Processes, Stage
from tests.benchmarks.figures import Bar, Outcome, Segment, spread
from tests.benchmarks.material import EOS, VOCAB, bench_config, bench_job, write_corpus

SHAPE = {"hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "intermediate_size": 1536, "max_seq_len": 2048}
METHODS: Mapping[str, tuple[str, ...]] = {
    "full": (),
    "LoRA, rank 16": ("continual.use_lora=true", "continual.lora_rank=16"),
    "2 new blocks": ("continual.expand_blocks=2", "continual.expansion.max_drift=100"),
    "OSFT, a quarter": ("continual.use_osft=true",),
}
LIMIT = 1.15
JUDGED = ("LoRA, rank 16", "2 new blocks")


def run(folder: Path, *, layers: int, threads: int, rounds: int, steps: int, tokens: int, batch_tokens: int) -> Outcome:
    outcome = Outcome(
        f"cost: step time over full training's, {layers} blocks of SmolLM2-135M's width, {threads} thread(s)",
        ("", "step s", "of full", "operations of full", "over ideal", "least", "most", "peak GB", "of full's"),
    )
    corpora = [write_corpus(folder / "tokens", name, tokens, seed=i) for i, name in enumerate(("new", "old"))]
    configs = {
        name: bench_config(
            folder / name.replace(" ", "-").replace(",", "") / "runs",
            ("new", "old"),
            f"model.architecture={ {**SHAPE, 'num_layers': layers} }",
            *overrides,
            f"cluster.cpus_per_worker={threads}",
            "training.micro_batch_size=4",
            f"training.global_batch_tokens={batch_tokens}",
            f"training.token_budget={batch_tokens * (steps + 1) * (4 * rounds + 4)}",
            f"evaluation.every_steps={steps + 1}",
        )
        for name, overrides in METHODS.items()
    }
    flops = {name: operations(config) for name, config in configs.items()}
    stages = {name: _stage(config, corpora, steps) for name, config in configs.items()}
    found: dict[str, list[Segment]] = {name: [] for name in METHODS}
    ratios: dict[str, list[float]] = {name: [] for name in METHODS}
    try:
        left = stages["full"].segment()
        found["full"].append(left)
        for _ in range(rounds):
            for name in list(METHODS)[1:]:
                found[name].append(stages[name].segment())
                right = stages["full"].segment()
                found["full"].append(right)
                ratios[name].append(found[name][-1].seconds / ((left.seconds + right.seconds) / 2))
                left = right
    finally:
        for stage in stages.values():
            stage.close()
    memory = {name: stage.told["peak_memory_bytes"] / 1e9 for name, stage in stages.items()}
    for name in METHODS:
        share = flops[name] / flops["full"]
        over = [ratio / share for ratio in ratios[name]]
        seconds = median(s.seconds / s.steps for s in found[name])
        spreads = (median(ratios[name]), share, *spread(over)) if over else (1.0, 1.0, None, None, None)
        outcome.rows.append((name, seconds, *spreads, memory[name], memory[name] / memory["full"]))
        if name in JUDGED:
            outcome.bars.append(Bar(f"{name}: step time over ideal", median(over), LIMIT, at_most=True))
        outcome.samples[name] = [asdict(segment) for segment in found[name]]
    outcome.notes.append("peak GB is the whole process, libraries (about 0.6 GB) included")
    return outcome


def operations(config: RunConfig) -> float:
    """Floating-point operations of training one token."""
    model = build_model(config.model, vocab_size=VOCAB, eos_id=EOS, seed=0)
    return training_flops(begin(Adapted(model), config).model, config.training.seq_len).total


def _stage(config: RunConfig, corpora: Any, steps: int) -> Stage:
    place = Path(config.storage).parent
    job = bench_job(config, corpora, PausingHooks(str(place / "batons")))

    def run(job: Any) -> None:
        name = "tests.benchmarks.own_loop"
        worker = Processes(name, job, place / "process", steps=steps, environment=KEEP_MEMORY)
        if worker.wait():
            raise RuntimeError("a worker loop ended with an error; see above")

    stage = Stage(job, place / "batons", run)
    stage.warm_up()
    return stage


SETTINGS = {"layers": 8, "threads": 1, "rounds": 4, "steps": 3, "tokens": 500_000, "batch_tokens": 1024}
QUICK = {"layers": 2, "threads": 1, "rounds": 1, "steps": 1, "tokens": 100_000, "batch_tokens": 1024}
