"""Tables of the methods' grids in Markdown, and `plot.svg`: what was learned against what was forgotten.

    python configs/experiments/methods/tables.py runs [--plot plot.svg]      (storage; tables of what is finished)

Losses are nats per held-out token, from the runs' own records. Learned: loss of the base on a new domain, less that
after the domain's stage. Forgotten: loss on an earlier domain at the end, less that after the stage that learned it (of
the base for English). Intervals are t-intervals over seeds; differences are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analyse import mean_cell, table
from scatter import COLOURS, INK, WIDTH, Dot, document, panel

BASE, OLD, PLAIN = "base", "english", "full"


@dataclass(frozen=True)
class Cell:
    """One finished run."""

    arm: str
    seed: int
    loss: dict[str, dict[str, float]]
    """By stage (`base` first) and domain."""
    stages: tuple[dict[str, Any], ...]
    """From `run.json`."""
    learned_in: dict[str, str]
    """Stage of each new domain."""

    def learned(self, domain: str) -> float:
        """Nats gained over the base at the end of the domain's own stage."""
        return self.loss[BASE][domain] - self.loss[self.learned_in[domain]][domain]

    def forgotten(self, domain: str) -> float:
        """Nats lost since the domain was learned."""
        return self.loss[list(self.loss)[-1]][domain] - self.loss[self.learned_in.get(domain, BASE)][domain]

    @property
    def new(self) -> list[str]:
        return list(self.learned_in)

    @property
    def earlier(self) -> list[str]:
        """Domains that a later stage could make the model forget."""
        return [OLD, *self.new[:-1]]


def load(storage: Path, grid: str) -> list[Cell]:
    """The finished runs of a grid, in its own order; none if it was not begun."""
    results = storage / f"{grid}-grid" / "results.json"
    if not results.exists():
        return []
    cells = []
    for entry in json.loads(results.read_text())["runs"]:
        if entry["outcome"] == "done":
            record = json.loads((storage / entry["name"] / "run.json").read_text())
            learned_in = {stage["name"]: stage["name"] for stage in record["stages"]}  # stages go by their domain
            cells.append(Cell(entry["arm"], entry["seed"], entry["loss"], tuple(record["stages"]), learned_in))
    return cells


def arms(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.arm, []).append(cell)
    return found


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def against(cells: Sequence[Cell], plain: Sequence[Cell], figure: Any) -> str:
    """Mean difference to full training, seed by seed."""
    usual = {cell.seed: figure(cell) for cell in plain}
    return mean_cell((figure(cell) - usual[cell.seed] for cell in cells if cell.seed in usual), "+.3f")


def size(cells: Sequence[Cell]) -> list[str]:
    stage = cells[0].stages[-1]
    return [f"{stage['trainable_parameters']:,}", f"{sum(s['tokens'] for s in cells[0].stages):,}"]


def single(cells: list[Cell]) -> str:
    """One adaptation."""
    groups = arms(cells)
    rows = [
        [
            arm,
            *size(group),
            mean_cell(c.learned(c.new[0]) for c in group),
            mean_cell(c.forgotten(OLD) for c in group),
            *(against(group, groups.get(PLAIN, []), f) for f in (lambda c: c.learned(c.new[0]), _forgotten_old)),
        ]
        for arm, group in groups.items()
    ]
    head = ["arm", "trained", "tokens", "learned", "forgotten", "learned - full's", "forgotten - full's"]
    return table(head, rows)


def _forgotten_old(cell: Cell) -> float:
    return cell.forgotten(OLD)


def learned_mean(cell: Cell) -> float:
    return mean(cell.learned(domain) for domain in cell.new)


def forgotten_mean(cell: Cell) -> float:
    return mean(cell.forgotten(domain) for domain in cell.earlier)


def final_mean(cell: Cell) -> float:
    """Loss at the end, over all domains that the model has met."""
    last = cell.loss[list(cell.loss)[-1]]
    return mean(last[domain] for domain in (OLD, *cell.new))


def sequence(cells: list[Cell]) -> str:
    """Three domains in turn."""
    groups = arms(cells)
    rows = []
    for arm, group in groups.items():
        plain = groups.get(PLAIN, [])
        rows.append(
            [
                arm,
                *size(group),
                mean_cell(map(learned_mean, group)),
                mean_cell(map(forgotten_mean, group)),
                mean_cell(map(final_mean, group)),
                *(against(group, plain, figure) for figure in (learned_mean, forgotten_mean, final_mean)),
            ]
        )
    head = ["arm", "trained", "tokens", "learned", "forgotten", "loss at the end, four domains"]
    text = table([*head, "learned - full's", "forgotten - full's", "loss at the end - full's"], rows)
    order = cells[0].new
    by_domain = [
        [arm, *(f"{mean(c.learned(d) for c in group):.3f}" for d in order)]
        + [f"{mean(c.forgotten(d) for c in group):.3f}" for d in group[0].earlier]
        for arm, group in groups.items()
    ]
    head = ["arm", *(f"learned {d}" for d in order), *(f"forgotten {d}" for d in cells[0].earlier)]
    return text + table(head, by_domain)


# --- the plot ------------------------------------------------------------------------------------------------------

ARMS = ("full", "replay05", "lora08", "lora32", "expand4", "expand2", "osft25", "l2", "kl05", "wise", "lora08merge")
LABELS = ("forgotten, nats per token (less is better) →", "↑ learned, nats per token")


def dot(arm: str, x: list[float], y: list[float]) -> Dot:
    return Dot(arm, x, y, COLOURS[ARMS.index(arm) % len(COLOURS)] if arm in ARMS else INK)


def plot(adaptation: list[Cell], several: list[Cell], rates: list[Cell]) -> str:
    """Both experiments side by side, as an SVG document."""
    dots = [
        dot(arm, [c.forgotten(OLD) for c in g], [c.learned(c.new[0]) for c in g]) for arm, g in arms(adaptation).items()
    ]
    lines = []
    for arm in arms(adaptation):
        own = [c for c in adaptation if c.arm == arm and c.seed == 0]
        line = [(c.forgotten(OLD), c.learned(c.new[0])) for c in rates if c.arm.startswith(f"{arm}-")]
        if line and own:
            lines.append((arm, sorted([*line, (own[0].forgotten(OLD), own[0].learned(own[0].new[0]))])))
    parts = [panel("One adaptation: English, then French", LABELS, dots, lines)] if dots else []
    dots = [dot(arm, [*map(forgotten_mean, g)], [*map(learned_mean, g)]) for arm, g in arms(several).items()]
    parts += [panel("A sequence: French, Python, Spanish (means)", LABELS, dots, left=WIDTH)] if dots else []
    return document(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("storage", nargs="?", default="runs", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    adaptation, several, rates = (load(args.storage, grid) for grid in ("methods", "sequence", "rates"))
    for title, cells, tables in (("One adaptation", adaptation, single), ("A sequence", several, sequence)):
        print(f"## {title}\n{tables(cells) if cells else 'no run of this grid is finished yet'}")
    if rates:
        print(f"## Learning rates\n{single([*rates, *(c for c in adaptation if c.seed == 0)])}")
    if args.plot:
        args.plot.write_text(plot(adaptation, several, rates))


if __name__ == "__main__":
    main()
