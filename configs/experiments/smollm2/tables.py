"""The table of SmolLM2's methods in Markdown: what each taught, what it cost elsewhere, and what it took.

    python configs/experiments/smollm2/tables.py runs

Losses are nats per held-out token, with 95 % intervals from 2,000 resamples of the held-out documents, paired over
before and after. Tokens per second is the median over the steps of training, memory the worker's peak.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analyse import Figures, Run, cell, load_grid, losses, table

DOMAINS = ("shakespeare", "general", "code")


def main(storage: Path) -> None:
    runs = load_grid(storage, "smollm2")
    if not runs:
        print("no run of this grid is finished yet")
        return
    print(
        "\n".join(
            f"- {run.arm}: commit {run.record['commit'][:12]}, fingerprint {run.record['fingerprint']}" for run in runs
        )
    )
    before = runs[0].before
    print(table(["before", *DOMAINS], [["loss", *(figure(losses([before[name]], name)[0]) for name in DOMAINS)]]))
    head = ["arm", *(f"{name}: change" for name in DOMAINS), "trained", "tokens/s", "peak memory"]
    print(table(head, [[run.arm, *changes(run), *costs(storage, run)] for run in runs]))


def changes(run: Run) -> list[str]:
    """Loss after, less before, by domain."""
    pairs = (losses([run.before[name], run.after[name]], name) for name in DOMAINS)
    return [figure(after - start, "+.3f") for start, after in pairs]


def figure(values: Figures, style: str = ".3f") -> str:
    """With its interval, if there are documents enough for one."""
    text = cell(values, style)
    return text if text != "–" else f"{values[0]:{style}}"


def costs(storage: Path, run: Run) -> list[str]:
    stage: dict[str, Any] = run.record["stages"][-1]
    lines = (storage / run.record["name"] / "metrics.jsonl").read_text().splitlines()
    pace = statistics.median(json.loads(line)["perf/tokens_per_second"] for line in lines)
    share = stage["trainable_parameters"] / stage["parameters"]
    return [
        f"{stage['trainable_parameters']:,} ({share:.1%})",
        f"{pace:.0f}",
        f"{stage['peak_memory_bytes'] / 1e9:.2f} GB",
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
