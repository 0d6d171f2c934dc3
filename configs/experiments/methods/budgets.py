"""Training operations per token of each arm of a grid, and the tokens that cost what full training's budget does.

    python configs/experiments/methods/budgets.py [grid | sequence]

Figures are of a run's first stage; those of later stages equal them, since no arm grows its model again.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from nexus_ray.config.tree import RunConfig
from nexus_ray.grid import load_grid
from nexus_ray.models.build import build_model
from nexus_ray.models.flops import Flops, training_flops
from nexus_ray.models.methods import Adapted, begin


def operations(config: RunConfig) -> Flops:
    """Of an arm, by the shape of its model; the weights do not matter."""
    shape = config.model.model_copy(update={"init_from": None})
    vocab_size = config.model.tokenizer.vocab_size
    model = build_model(shape, vocab_size=vocab_size, eos_id=0, seed=0)
    return training_flops(begin(Adapted(model), config).model, config.training.seq_len)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "grid"
    grid, runs = load_grid(Path(__file__).parent / f"{name}.yaml")
    arms = {run.arm: run.config for run in runs if run.seed == grid.seeds[0]}
    plain = arms[grid.baseline or "full"]
    full, budget = operations(plain).total, plain.training.token_budget / plain.training.global_batch_tokens
    print("arm          forward  inputs  weights  of full   steps     tokens")
    for arm, config in arms.items():
        flops = operations(config)
        steps = round(budget * full / flops.total)
        parts = [part / 1e6 for part in (flops.forward, flops.input_gradients, flops.weight_gradients)]
        print(
            f"{arm:12} {parts[0]:6.2f}M {parts[1]:6.2f}M {parts[2]:7.2f}M  {flops.total / full:6.1%}  {steps:6}  "
            f"{steps * config.training.global_batch_tokens:9}"
        )


if __name__ == "__main__":
    main()
