"""The student's table in Markdown, and ten accepted stories to read.

    python configs/experiments/distillation/tables.py runs

Losses are nats per held-out token; intervals are 95 %, t over seeds, of differences paired by seed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analyse import load_grid, mean_cell, table

from nexus_ray.storage import Storage
from nexus_ray.synthesis.ledger import Ledger

DOMAINS = ("stories", "english")
SHOWN = 10


def main(storage: Path) -> None:
    runs = load_grid(storage, "distillation")
    scores = {(run.arm, run.seed): _losses(storage / run.record["name"]) for run in runs}
    seeds = sorted({seed for _, seed in scores})
    commits = sorted({run.record["commit"][:12] for run in runs})
    print(f"commits {', '.join(commits)}; seeds {seeds}")
    rows = [
        [arm, *(" / ".join(f"{scores[arm, seed][row][name]:.3f}" for seed in seeds) for name in DOMAINS)]
        for arm, row in (("stories", 0), ("stories", 1), ("english", 1))
    ]
    rows[0][0] = "(before)"
    print(table(["trained on", *(f"{name}, by seed" for name in DOMAINS)], rows))
    for name in DOMAINS:
        print(f"{name}: stories less english {mean_cell([_gap(scores, seed, name) for seed in seeds], '+.3f')}")
    ledger = Ledger.load(Storage(str(storage / "distillation-stories" / "synthesis" / "stories")))
    accepted = list(ledger.rows())
    for row in accepted[:: len(accepted) // SHOWN][:SHOWN]:
        print(f"\n> {' '.join(row.text.split())}")


def _losses(run: Path) -> list[dict[str, float]]:
    document = json.loads((run / "scores.json").read_text())
    return [dict(zip(document["domains"], row, strict=True)) for row in document["loss"]]


def _gap(scores: dict[tuple[str, int], list[dict[str, float]]], seed: int, name: str) -> float:
    return scores["stories", seed][-1][name] - scores["english", seed][-1][name]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
