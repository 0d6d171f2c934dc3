"""Tables of the forgetting budget in Markdown, from the records of its grid's finished runs.

    python configs/experiments/control/tables.py bound runs       (storage; what the fixed 10 % arm forgets)
    python configs/experiments/control/tables.py tables runs      (tables of what is finished, and the actions)

Bits per byte of held-out text. Forgotten: English after, less before, on all of its held-out documents. Overshoot:
forgotten, less the bound. Peak: the highest that the evaluations during the stage found lost, each less what the first
model scored on the same sample, less the bound. Cost: French after, less that of the fixed 10 % arm of the same seed.
Means over seeds with t-intervals.

The bound is what the 10 % arm forgets, so that among the arms this one holds it closest. What control is worth is asked
of the curve through the fixed arms of a seed: between neighbours, forgotten and French both go straight with the
logarithm of the ratio. Each controlled arm is compared with the ratio that forgets just the bound, and with the one
that forgets just what the arm did.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analyse import mean_cell, table

from nexus_ray.evaluate.hooks import START
from nexus_ray.evaluate.scores import scores_from_bytes

OLD, NEW, FIXED, HELD = "english", "french", "r10", ("control", "eager")


@dataclass(frozen=True)
class Cell:
    """One run that ended, or was stopped by its controller (then it has no scores)."""

    arm: str
    seed: int
    outcome: str
    bits: dict[str, dict[str, float]]
    """By stage (`base` first) and domain."""
    replay: float
    """Share of replay in all rows."""
    during: list[float]
    """What the sample of the evaluations had lost at each of them since the first model scored it."""
    log: list[dict[str, Any]]
    """`control.jsonl`, the last line of each step."""

    @property
    def forgotten(self) -> float:
        return self._last[OLD] - self.bits["base"][OLD]

    @property
    def new(self) -> float:
        return self._last[NEW]

    @property
    def _last(self) -> dict[str, float]:
        return list(self.bits.values())[-1]

    @property
    def actions(self) -> list[dict[str, Any]]:
        return [line["action"] for line in self.log if line["action"]]


def load(storage: Path, grid: str = "control") -> list[Cell]:
    """The runs of the grid that have ended, in its own order."""
    entries = json.loads((storage / f"{grid}-grid" / "results.json").read_text())["runs"]
    return [cell for entry in entries if (cell := load_run(storage / entry["name"], entry)) is not None]


def load_run(folder: Path, entry: dict[str, Any]) -> Cell | None:
    """None if it has not ended."""
    if not (folder / "run.json").exists():
        return None
    record = json.loads((folder / "run.json").read_text())
    if record["outcome"] not in ("done", "stopped"):
        return None
    steps = last_of_steps(folder / "metrics.jsonl")
    found = [line[f"eval/bits_per_byte/{OLD}"] for line in steps if f"eval/bits_per_byte/{OLD}" in line]
    start = scores_from_bytes((folder / "base" / START).read_bytes())[OLD].bits_per_byte
    return Cell(
        entry["arm"],
        entry["seed"],
        record["outcome"],
        entry.get("bits_per_byte", {}),
        steps[-1]["train/replay_fraction"],
        [value - start for value in found],
        last_of_steps(folder / "control.jsonl"),
    )


def last_of_steps(file: Path) -> list[dict[str, Any]]:
    """The last line of each step, in order; empty where there is no file."""
    if not file.exists():
        return []
    lines = (json.loads(line) for line in file.read_text().splitlines())
    steps = {line["step"]: line for line in lines}
    return [steps[step] for step in sorted(steps)]


def bound(cells: Sequence[Cell]) -> float:
    """Mean forgetting of the fixed 10 % arm over its seeds, to three decimals."""
    found = [cell.forgotten for cell in cells if cell.arm == FIXED]
    if not found:
        raise SystemExit(f"no run of the arm {FIXED} has ended; run the grid with --only {FIXED} first")
    return round(mean(found), 3)


def on_curve(fixed: Sequence[Cell], forgotten: float) -> tuple[float, float]:
    """(share of replay, new) at which the curve through one seed's fixed arms has forgotten just so much; the lowest
    share if there are several, NaN if there is none."""
    points = sorted((cell.replay, cell.forgotten, cell.new) for cell in fixed)
    for (less, most, new), (more, least, newer) in pairwise(points):
        if most >= forgotten >= least and most > least:
            way = (most - forgotten) / (most - least)
            return less * (more / less) ** way, new + way * (newer - new)
    return math.nan, math.nan


def against_curve(cells: Sequence[Cell], limit: float) -> str:
    """Each controlled arm beside the fixed ratios that forget the bound and what it forgot; paired by seed."""
    rows = []
    for arm in HELD:
        held = [cell for cell in cells if cell.arm == arm]
        fixed = {cell.seed: [one for one in cells if one.arm not in HELD and one.seed == cell.seed] for cell in held}
        for what, levels in (("the bound", [limit] * len(held)), ("as much", [cell.forgotten for cell in held])):
            found = [on_curve(fixed[cell.seed], level) for cell, level in zip(held, levels, strict=True)]
            less = [cell.new - new for cell, (_, new) in zip(held, found, strict=True)]
            shares, news = ([pair[k] for pair in found] for k in (0, 1))
            if held:
                rows.append([arm, what, mean_cell(shares, ".1%"), mean_cell(news, ".4f"), mean_cell(less, ".4f")])
    return table(["arm", "a fixed ratio that forgets", "replay", NEW, f"{NEW} of the arm, less that"], rows)


def tables(cells: Sequence[Cell]) -> str:
    limit, plain = bound(cells), {cell.seed: cell.new for cell in cells if cell.arm == FIXED}
    whole = [cell for cell in cells if cell.outcome == "done"]
    means, rows, trace = [], [], []
    for arm in dict.fromkeys(cell.arm for cell in whole):
        mine = [cell for cell in whole if cell.arm == arm]
        columns = [
            [cell.forgotten for cell in mine],
            [cell.forgotten - limit for cell in mine],
            [max(cell.during) - limit for cell in mine],
            [cell.new for cell in mine],
            [cell.new - plain[cell.seed] for cell in mine if cell.seed in plain],
        ]
        share, count = mean(cell.replay for cell in mine), mean(len(cell.actions) for cell in mine)
        means.append([arm, *(mean_cell(column, ".4f") for column in columns), f"{share:.1%}", f"{count:.1f}"])
    for cell in whole:
        figures = (cell.forgotten, cell.forgotten - limit, max(cell.during) - limit, cell.new)
        rows.append([cell.arm, cell.seed, *(f"{value:.4f}" for value in figures), f"{cell.replay:.1%}"])
    for cell in cells:
        for action in cell.actions:
            trace.append([cell.arm, cell.seed, action["step"], f"{action['replay_ratio']:.1%}", action["lr_factor"]])
            trace[-1].append(action["reason"])
    lost = {arm: mean(cell.forgotten for cell in whole if cell.arm == arm) for arm, *_ in means}
    fixed = [row for row in means if row[0] not in HELD and lost[row[0]] <= limit + 5e-4]  # the bound is rounded
    best = min(fixed, key=lambda row: mean(c.new for c in whole if c.arm == row[0]))[0] if fixed else "none"
    stopped = [f"{cell.arm} seed {cell.seed}" for cell in cells if cell.outcome == "stopped"]
    head = ["forgotten", "overshoot", "peak", NEW, "cost", "replay", "actions"]
    return "".join(
        (
            f"Bound: {limit:.3f} bits per byte. Best fixed arm that holds it: {best}. "
            f"Stopped: {', '.join(stopped) or 'none'}.\n",
            table(["arm", *head], means),
            against_curve(whole, limit),
            table(["arm", "seed", "forgotten", "overshoot", "peak", NEW, "replay"], rows),
            "\nWhat the controller did:\n",
            table(["arm", "seed", "after step", "replay ratio", "learning-rate factor", "why"], trace),
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("bound", "tables"))
    parser.add_argument("storage", nargs="?", default="runs", type=Path)
    args = parser.parse_args(argv)
    cells = load(args.storage)
    print(f"{bound(cells):.3f}" if args.what == "bound" else tables(cells))


if __name__ == "__main__":
    main()
