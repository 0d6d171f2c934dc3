"""Tables of the search in Markdown: early stopping against the whole grid, from what `nexus-ray tune` left.

    python configs/experiments/study/tables.py front runs        (storage; the study of the full grid's front, as YAML)
    python configs/experiments/study/tables.py tables runs       (whichever of study, full, noise and front are there)
    python configs/experiments/study/tables.py plot runs         (the grid's points and the winner, as SVG)

New: negated bits per byte of French; forgotten: bits per byte of English; operations in 1e15. Noise: two standard
deviations over seeds, pooled over the points of noise.yaml. Gap: the full grid's best point that keeps the bound, less
the early-stopping winner, both at their full budgets and seed 0. Front: over all three, of the full grid's seed 0;
means and t-intervals over that seed and those of front.yaml, and in what share of the resampled seeds a point stays on
the front of those points. Minutes are by the events of a study's log.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import variance
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analyse import table
from scatter import COLOURS, Dot, document, panel

from nexus_ray.report.study import estimate_text, membership
from nexus_ray.study.front import study_front
from nexus_ray.study.load import load_study
from nexus_ray.study.records import Objectives, Point, Report, Trial

HERE = Path(__file__).resolve().parent
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
    names = ("study", "full", "noise", "front")
    studies = {name: found for name in names if (found := load(storage, name)) is not None}
    parts = []
    for name, study in studies.items():
        trials = sorted(study["trials"], key=lambda trial: (trial["status"] != "finished", -(trial["new"] or -99)))
        spent, share = study["tokens"], study["share_of_full_budgets"]
        whole, busy = (study["seconds"][key] / 60 for key in ("first_to_last_event", "with_a_turn"))
        parts.append(
            f"\n{name}: {len(trials)} trials, {spent:,} tokens, {share:.1%} of their full budgets; {whole:.1f} minutes "
            f"from first to last event, {busy:.1f} of them with a trial at work\n"
        )
        parts.append(table(["point", "seed", "status", "tokens", "new", "forgotten", "operations"], map(_row, trials)))
        spans = study["seconds_besides_training"]
        parts.append(table(["seconds", "median", "most"], [[k, v["median"], v["most"]] for k, v in spans.items()]))
    parts.append(_front(studies))
    return "".join([*parts, _verdict(studies)])


def front_study(storage: Path) -> str:
    """The study file that runs the points of the full grid's front with two more seeds."""
    full = load(storage, "full")
    if full is None or not full["front"]:
        raise SystemExit(f"{storage} has no finished trial of the full grid; run full.yaml first")
    space = load_study(HERE / "full.yaml").space
    params = {trial["point"]: trial["params"] for trial in full["trials"]}
    options = {_label(point): dict(space.settings(Point(params[point]))) for point in full["front"]}
    head = (
        "# The points of the full grid's front, best new score first, with two more seeds; seed 0 is full.yaml's.\n"
        "# Written by `tables.py front` (see full.yaml); an option is called by the point's id in full.yaml's study.\n"
        "#   nexus-ray tune configs/experiments/study/front.yaml\n"
    )
    study = {
        "name": "front",
        "base": "../replay/run.yaml",
        "space": {"point": {"options": options}},
        "search": {"kind": "grid"},
        "seeds": [1, 2],
        "objective": {"kind": "new_under_forgetting", "max_forgetting": BOUND},
        "stopping": {"rule": "none"},
    }
    return head + yaml.safe_dump(study, sort_keys=False, width=120)


def _label(point: str) -> str:
    return f"p{point}"  # an id of digits alone would be a number to YAML


def _front(studies: dict[str, dict[str, Any]]) -> str:
    full, more = studies.get("full"), studies.get("front")
    if full is None or not full["front"]:
        return ""
    params = {_label(point): _params(full, point) for point in full["front"]}
    trials = [
        *(_trial(entry, entry["params"]) for entry in full["trials"] if _label(entry["point"]) in params),
        *(_trial(entry, params.get(entry["params"]["point"])) for entry in (more["trials"] if more else ())),
    ]
    front, rows = study_front([trial for trial in trials if trial is not None]), []
    for member in sorted(front.members, key=lambda member: -member.estimates["new"].mean):
        new, forgotten = (estimate_text(member.estimates[key]) for key in ("new", "forgetting"))
        operations = f"{member.estimates['cost'].mean * 1e-15:.4f}"
        point, seeds = member.replicated.point, len(member.replicated.by_seed)
        rows.append([member.id, _words(point.params), seeds, new, forgotten, operations, membership(member)])
    head = ["point", "settings", "seeds", "new", "forgotten", "operations", "on the front"]
    return "\nfront of the full grid\n" + table(head, rows) + "".join(f"\n{text}\n" for text in front.remarks)


def _params(study: dict[str, Any], point: str) -> dict[str, Any]:
    return next(trial["params"] for trial in study["trials"] if trial["point"] == point)


def _trial(entry: dict[str, Any], params: dict[str, Any] | None) -> Trial | None:
    """A finished trial under the full grid's settings; None for one that has not finished, or left the front since."""
    if entry["status"] != "finished" or params is None:
        return None
    objectives = Objectives(entry["new"], entry["forgetting"], entry["cost"])
    report = Report(entry["steps"], entry["tokens"], objectives)
    return Trial(Point(params), entry["seed"], "finished", (report,))


def _words(params: Any) -> str:
    return ", ".join(f"{knob.rpartition('.')[2]} {value}" for knob, value in params.items())


def _row(trial: dict[str, Any]) -> list[Any]:
    figures = ["" if trial[key] is None else f"{trial[key] * unit:.4f}" for key, unit in FIGURES]
    return [_words(trial["params"]), trial["seed"], trial["status"], trial["tokens"], *figures]


def plot(storage: Path) -> str:
    """Every point of the full grid by what it forgot and learned; those that no other beats in both stand out. Of two
    warm-ups the longer is labelled."""
    full, early, more = (load(storage, name) or {"trials": []} for name in ("full", "study", "front"))
    whole = [trial for trial in full["trials"] if trial["status"] == "finished"]
    winner = (best(early["trials"]) or {"point": None})["point"]
    dots: list[Dot] = []
    for trial in whole:
        again = [other for other in more["trials"] if other["params"]["point"] == _label(trial["point"])]
        seeds = [trial, *(other for other in again if other["status"] == "finished")]
        beaten = any(
            other["new"] >= trial["new"] and other["forgetting"] <= trial["forgetting"] and other is not trial
            for other in whole
        )
        label = _short(trial["params"]) + (": found by early stopping" if trial["point"] == winner else "")
        x, y = ([seed[key] for seed in seeds] for key in ("forgetting", "new"))
        dots.append(Dot(label, x, y, COLOURS[1 + METHODS.index(_method(trial["params"]))], faint=beaten))
    axes = ("English forgotten, bits per byte (less is better) →", "↑ score on French, negated bits per byte")
    return document([panel("24 points of a study: full training, LoRA, new blocks", axes, dots)])


METHODS = ("full", "LoRA 8", "LoRA 32", "2 new blocks")


def _method(params: dict[str, Any]) -> str:
    names = {"full": "full", "expand": "2 new blocks", "lora": f"LoRA {params.get('continual.lora_rank')}"}
    return names[params["method"]]


def _short(params: dict[str, Any]) -> str:
    """`LoRA 8, 25% replay` at the lowest forgetting, `5%` further on."""
    replay, longer = params["continual.replay_ratio"], params["continual.warmup_steps"] == 50
    text = f"{_method(params)}, {replay:.0%} replay" if replay == 0.25 else f"{replay:.0%}"
    return text if longer else ""


FIGURES = (("new", 1.0), ("forgetting", 1.0), ("cost", 1e-15))


def _verdict(studies: dict[str, dict[str, Any]]) -> str:
    """The winner against the grid's best, in units of the noise, and what it took of the grid's tokens."""
    early, whole = (best(studies[name]["trials"]) if name in studies else None for name in ("study", "full"))
    if early is None or whole is None:
        return "\nOne of the two has no winner yet.\n"
    gap, unit = whole["new"] - early["new"], noise(studies["noise"]["trials"]) if "noise" in studies else None
    said = f"{gap:.4f}" + ("" if unit is None else f", {gap / unit:.2f} of the noise of {unit:.4f}")
    left = sum(trial["status"] != "finished" for trial in studies["full"]["trials"])
    share = f"{studies['study']['tokens'] / studies['full']['tokens']:.1%} of the grid's tokens"
    return (
        f"\nThe winner is {early['point']}, the grid's best {whole['point']}; gap {said}. Early stopping took {share}"
        f"{f', of which {left} trials have not finished' if left else ''}.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("front", "tables", "plot"))
    parser.add_argument("storage", nargs="?", default="runs", type=Path)
    args = parser.parse_args(argv)
    print({"front": front_study, "tables": tables, "plot": plot}[args.what](args.storage))


if __name__ == "__main__":
    main()
