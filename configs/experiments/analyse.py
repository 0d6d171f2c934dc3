"""Tables of the replay and re-warming experiments, in Markdown, from the records of a grid's finished runs.

    python configs/experiments/analyse.py replay runs        (grid, storage; an unfinished grid gives what there is)
    python configs/experiments/analyse.py rewarm runs

Losses are nats per held-out token. Every figure is computed on all held-out documents and on each of 2,000 resamples
of them, paired over arms. Intervals of single seeds cover 95 % of the resamples; those of means are t-intervals over
seeds, followed by the lowest and highest seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nexus_ray.evaluate.bootstrap import interval, resampled_figures
from nexus_ray.evaluate.scores import DomainScore, scores_from_bytes

OLD, NEW, CONTROL = "english", "french", "control"
"""Domains, and the arm that trains on the old one alone."""
SAMPLES = 2000
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Quantiles of Student's t by degrees of freedom."""
PUBLISHED = {0.0: (3.56, 1.11), 0.01: (2.83, 1.12), 0.05: (2.57, 1.12), 0.25: (2.33, 1.16)}
"""Ibrahim et al. 2024, table 2, strong shift: loss on the old and on the new data by replay ratio."""
PUBLISHED_BEFORE = 2.17
CONVERGED = 0.01
"""Nats that as many steps more on the old data may gain; a base that gains more was not converged."""
STYLES = (".3f", ".1%", ".3f", ".1%", ".3f", ".4f")

Figures = NDArray[np.float64]
"""[1 + SAMPLES]: a figure, then its resamples."""


@dataclass(frozen=True)
class Run:
    """What is used of one finished run."""

    arm: str
    seed: int
    record: dict[str, Any]
    config: dict[str, Any]
    before: dict[str, DomainScore]
    after: dict[str, DomainScore]
    spike: float
    """Highest training loss of the first 50 steps."""

    @property
    def replay(self) -> float:
        return float(self.config["continual"]["replay_ratio"])

    @property
    def peak(self) -> float:
        return float(self.config["training"]["learning_rate"])

    @property
    def warmup(self) -> int:
        return int(self.config["continual"]["warmup_steps"])

    @property
    def constant(self) -> bool:
        return bool(self.config["training"]["schedule"]["kind"] == "constant")


def load_grid(storage: Path, grid: str) -> list[Run]:
    """The finished runs of a grid, in its own order."""
    entries = json.loads((storage / f"{grid}-grid" / "results.json").read_text())["runs"]
    return [load_run(storage / e["name"], e["arm"], e["seed"]) for e in entries if e["outcome"] == "done"]


def load_run(folder: Path, arm: str, seed: int) -> Run:
    record = json.loads((folder / "run.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    last = record["stages"][-1]
    places = (folder / "base", folder / "stages" / f"{last['index']:02d}-{last['name']}")
    before, after = (scores_from_bytes((place / "evaluation.npz").read_bytes()) for place in places)
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:50]
    return Run(arm, seed, record, config, before, after, max(json.loads(line)["train/loss"] for line in lines))


# --- figures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """One seed's losses: on the old domain before, and by arm on the old and the new one after."""

    before: Figures
    old: dict[str, Figures]
    new: dict[str, Figures]


def losses(scores: Sequence[DomainScore], name: str) -> list[Figures]:
    """Loss of each score and its resamples, paired: the same documents are drawn for all."""
    drawn = resampled_figures(scores, SAMPLES, seed=0, name=name)["loss"]
    return [np.concatenate([[score.loss], drawn[:, column]]) for column, score in enumerate(scores)]


def by_seed(runs: Sequence[Run]) -> dict[int, Losses]:
    out = {}
    for seed in sorted({run.seed for run in runs}):
        mine = [run for run in runs if run.seed == seed]
        before, *old = losses([mine[0].before[OLD], *(run.after[OLD] for run in mine)], OLD)
        new = losses([run.after[NEW] for run in mine], NEW)
        names = [run.arm for run in mine]
        out[seed] = Losses(before, dict(zip(names, old, strict=True)), dict(zip(names, new, strict=True)))
    return out


def recovered(forgot: Figures, forgot_without: Figures) -> Figures:
    """Share of the forgetting without replay that replay saves: 1 - F(r) / F(0)."""
    return 1.0 - forgot / forgot_without


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Concordant less discordant pairs over all pairs; ties count as neither. 0 without a pair."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    return float(sum(np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs) / max(1, len(pairs)))


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least two independent values."""
    half = T_975[min(len(values) - 1, max(T_975))] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def published(ratio: float) -> tuple[float, float]:
    """(share recovered, extra loss on the new data) of the paper."""
    (worst, plain), (old, new) = PUBLISHED[0.0], PUBLISHED[ratio]
    return 1 - (old - PUBLISHED_BEFORE) / (worst - PUBLISHED_BEFORE), new - plain


# --- text --------------------------------------------------------------------------------------------------------


def cell(figures: Figures, style: str = ".3f") -> str:
    """`1.234 [1.200, 1.270]`: the figure and the interval of its resamples."""
    found = interval(figures[1:])
    return f"{figures[0]:{style}} [{found[0]:{style}}, {found[1]:{style}}]" if found else "–"


def mean_cell(values: Iterable[float], style: str = ".3f") -> str:
    """`1.234 [1.1, 1.3] (1.20 to 1.27)`: mean over seeds, its t-interval, lowest and highest."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2:
        return f"{known[0]:{style}}" if known else "–"
    low, high = t_interval(known)
    return f"{np.mean(known):{style}} [{low:{style}}, {high:{style}}] ({min(known):{style}} to {max(known):{style}})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def provenance(runs: Sequence[Run]) -> str:
    """What the numbers come from."""
    training, before = runs[0].config["training"], runs[0].before
    commits = {f"{r.record['commit']}{' and changes' if r.record['dirty'] else ''}" for r in runs}
    prints = [f"{r.arm} seed {r.seed} {r.record['fingerprint']}" for r in runs]
    held_out = [f"{name} {len(s.nll_by_document)} documents, {s.tokens:,} tokens" for name, s in before.items()]
    return (
        f"- commit {', '.join(sorted(commits))}; config fingerprints: {', '.join(prints)}\n"
        f"- {len(runs)} runs of {training['token_budget']:,} tokens, {training['global_batch_tokens']:,} a step\n"
        f"- held-out text: {'; '.join(held_out)}\n"
        f"- {OLD} before: {cell(losses([before[OLD]], OLD)[0])} nats per token\n"
    )


# --- the two experiments -------------------------------------------------------------------------------------------


def replay(runs: Sequence[Run]) -> str:
    """Forgetting, share recovered and cost by replay ratio, beside Ibrahim et al. 2024."""
    ratio = {run.arm: run.replay for run in sorted(runs, key=lambda run: run.replay) if run.arm != CONTROL}
    plain = next(iter(ratio))
    seeds = {seed: part for seed, part in by_seed(runs).items() if plain in part.old}
    rows: list[list[str]] = []
    found: dict[str, list[list[Figures]]] = {arm: [] for arm in ratio}
    for arm, (seed, part) in itertools.product(ratio, seeds.items()):
        if arm in part.old:
            old, plain_old, end = part.old[arm], part.old[plain], part.old.get(CONTROL, part.before * math.nan)
            share = recovered(old - part.before, plain_old - part.before)
            against = [old - end, recovered(old - end, plain_old - end)]
            found[arm].append([old - part.before, share, *against, part.new[arm], part.new[arm] - part.new[plain]])
            rows.append([arm, str(seed), cell(old), *map(cell, found[arm][-1], STYLES)])
    means = []
    for arm, value in ratio.items():
        columns = [[float(part[k][0]) for part in found[arm]] for k in range(6)]
        paper = [f"{published(value)[0]:.0%}", f"{published(value)[1]:.2f}"] if value in PUBLISHED else ["–", "–"]
        ours = list(map(mean_cell, columns, STYLES))
        means.append([f"{value:.0%}", *ours[:4], paper[0], *ours[4:], paper[1]])
    signs = []
    for seed, part in seeds.items():
        there = [arm for arm in ratio if arm in part.old]
        tau = kendall_tau([ratio[arm] for arm in there], [float(part.old[arm][0]) for arm in there])
        change = part.old.get(CONTROL, part.before * math.nan) - part.before
        converged = "yes" if change[0] > -CONVERGED else "no"
        signs.append([seed, f"{tau:+.2f}", cell(change, ".4f"), converged if CONTROL in part.old else "–"])
    head = ["F", "recovered", "F against control", "recovered against control", NEW, "cost A"]
    return "".join(
        (
            provenance(runs),
            table(["replay", *head[:4], "paper", *head[4:], "paper"], means),
            table(["arm", "seed", f"{OLD} after", *head], rows),
            f"\nExpected: Kendall's tau of -1, and {OLD} alone gains less than {CONVERGED} (the base had converged).\n",
            table(["seed", "tau of replay and F", f"{OLD} after the control arm, less before", "converged"], signs),
        )
    )


def rewarm(runs: Sequence[Run], usual: str = "peak10") -> str:
    """Final losses by peak learning rate and warm-up length, with the signs of Gupta et al. 2023."""
    arms = {run.arm: run for run in runs}
    swept = sorted((arm for arm in arms if not arms[arm].constant), key=lambda arm: arms[arm].peak)
    peaks = [arm for arm in swept if arms[arm].warmup == arms[usual].warmup]
    lengths = [arm for arm in swept if arms[arm].peak == arms[usual].peak]
    every = [*(arm for arm in arms if arms[arm].constant), *peaks]
    seeds, rows, signs = by_seed(runs), [], []
    points: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    for run in runs:
        part = seeds[run.seed]
        figures = [part.old[run.arm], part.old[run.arm] - part.before, part.new[run.arm]]
        rows.append([run.arm, run.seed, *map(cell, figures), f"{run.spike:.2f}"])
        points[run.arm].append([*(float(figure[0]) for figure in figures), run.spike])
    for seed, part in seeds.items():
        if len(part.old) == len(arms):  # else not finished yet
            ends = [{arm: float(figures[0]) for arm, figures in side.items()} for side in (part.old, part.new)]
            tau = [kendall_tau([arms[arm].peak for arm in every], [end[arm] for arm in every]) for end in ends]
            spread = [float(np.ptp([e[arm] for arm in lengths]) / np.ptp([e[arm] for arm in peaks])) for e in ends]
            extremes = [min(ends[0], key=ends[0].__getitem__), max(ends[1], key=ends[1].__getitem__)]
            signs.append([seed, *(f"{v:+.2f}" for v in tau), *extremes, *(f"{v:.1%}" for v in spread)])
    head = [f"{OLD} after", "F", NEW, "highest loss of steps 1-50"]
    means = [[a, f"{r.peak:.2g}", r.warmup, *map(mean_cell, zip(*points[a], strict=True))] for a, r in arms.items()]
    spreads = [f"warm-up spread / peak spread, {name}" for name in (OLD, NEW)]
    return "".join(
        (
            provenance(runs),
            table(["arm", "peak", "warm-up steps", *head], means),
            table(["arm", "seed", *head], rows),
            f"\nKendall's tau of the peak over {', '.join(every)}. Expected (Gupta et al. 2023): +1, -1, the "
            "constant minimum twice, and next to nothing from the warm-up.\n",
            table(["seed", "tau, F", f"tau, {NEW}", "forgets least", "learns least", *spreads], signs),
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", choices=("replay", "rewarm"))
    parser.add_argument("storage", nargs="?", default="runs", type=Path)
    args = parser.parse_args(argv)
    runs = load_grid(args.storage, args.experiment)
    print(
        {"replay": replay, "rewarm": rewarm}[args.experiment](runs) if runs else "no run of this grid is finished yet"
    )


if __name__ == "__main__":
    main()
