"""Tables of the search in Markdown: early stopping against the whole grid, from what `nexus-ray tune` left.

    python configs/experiments/study/tables.py runs       (storage; whichever of study, full and noise are there)

New: negated bits per byte of French; forgotten: bits per byte of English; operations in 1e15. Noise: two standard
deviations over seeds, pooled over the points of noise.yaml. Gap: the full grid's best point that keeps the bound, less
the early-stopping winner, both at their full budgets and seed 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import variance
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analyse import table

BOUND = 0.6
Trials = list[dict[str, Any]]


def load(storage: Path, name: str) -> dict[str, Any] | None:
    """`results.json` of a study; None before it has one."""
    file = storage / f"{name}-study" / "results.json"
    return json.loads(file.read_text()) if file.exists() else None


def best(trials: Trials) -> dict[str, Any] | None:
    """The finished trial of the best new score within the bound."""
    able = [trial for trial in trials if trial["status"] == "finished" and trial["forgetting"] <= BOUND]
    return max(able, key=lambda trial: trial["new"], default=None)


def noise(trials: Trials) -> float | None:
    """Two standard deviations of the new score over seeds, pooled over points; None without a second seed."""
    by_point: dict[str, list[float]] = {}
    for trial in trials:
        if trial["status"] == "finished":
            by_point.setdefault(trial["point"], []).append(trial["new"])
    spread = [values for values in by_point.values() if len(values) > 1]
    if not spread:
        return None
    degrees = sum(len(values) - 1 for values in spread)
    return 2 * (sum((len(values) - 1) * variance(values) for values in spread) / degrees) ** 0.5


def tables(storage: Path) -> str:
    studies = {name: found for name in ("study", "full", "noise") if (found := load(storage, name)) is not None}
    parts = []
    for name, study in studies.items():
        trials = sorted(study["trials"], key=lambda trial: (trial["status"] != "finished", -(trial["new"] or -99)))
        spent, share = study["tokens"], study["share_of_full_budgets"]
        parts.append(f"\n{name}: {len(trials)} trials, {spent:,} tokens, {share:.1%} of their full budgets\n")
        parts.append(table(["point", "seed", "status", "tokens", "new", "forgotten", "operations"], map(_row, trials)))
        spans = study["seconds_besides_training"]
        parts.append(table(["seconds", "median", "most"], [[k, v["median"], v["most"]] for k, v in spans.items()]))
    return "".join([*parts, _verdict(studies)])


def _row(trial: dict[str, Any]) -> list[Any]:
    point = ", ".join(f"{knob.rpartition('.')[2]} {value}" for knob, value in trial["params"].items())
    figures = ["" if trial[key] is None else f"{trial[key] * unit:.4f}" for key, unit in FIGURES]
    return [point, trial["seed"], trial["status"], trial["tokens"], *figures]


FIGURES = (("new", 1.0), ("forgetting", 1.0), ("cost", 1e-15))


def _verdict(studies: dict[str, dict[str, Any]]) -> str:
    """The winner against the grid's best, in units of the noise."""
    early, whole = (best(studies[name]["trials"]) if name in studies else None for name in ("study", "full"))
    if early is None or whole is None:
        return "\nOne of the two has no winner yet.\n"
    gap, unit = whole["new"] - early["new"], noise(studies["noise"]["trials"]) if "noise" in studies else None
    said = f"{gap:.4f}" + ("" if unit is None else f", {gap / unit:.2f} of the noise of {unit:.4f}")
    return f"\nThe winner is {early['point']}, the grid's best {whole['point']}; gap {said}.\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("storage", nargs="?", default="runs", type=Path)
    print(tables(parser.parse_args(argv).storage))


if __name__ == "__main__":
    main()
