"""A study's folder as the report shows it, and what `nexus-ray tune` leaves there at the end.

    report.html     the page
    results.json    every trial with its figures, the front, the winner, what was spent, what turns took
    results.csv     one line a trial
    best.yaml       the config of the winner's run, under another name: `nexus-ray roadmap best.yaml` repeats it

All are functions of the study's own files, and are written anew each time.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console

from nexus_ray.config import fingerprint, parse_config, to_yaml
from nexus_ray.config.source import parse_yaml
from nexus_ray.config.study import StudyConfig, rung_shares
from nexus_ray.errors import ConfigError
from nexus_ray.report.study import Decision, StudyView, print_study
from nexus_ray.report.study_page import compare_study, render_study
from nexus_ray.storage import Storage
from nexus_ray.study.course import share_spent
from nexus_ray.study.front import Front, Goal
from nexus_ray.study.judge import COST_UNIT
from nexus_ray.study.load import Study, load_study
from nexus_ray.study.log import LOST, NAME, read_study
from nexus_ray.study.records import Point, Trial, Value
from nexus_ray.study.replicates import METRICS
from nexus_ray.study.turns import overheads
from nexus_ray.synthesis.append_log import read_log
from nexus_ray.tune.plan import knob_text


def is_study(folder: str) -> bool:
    """Whether a folder holds a study."""
    return Storage(folder).exists("study.json")


def show_study(folder: Storage, out: Path | None = None, *, console: Console | None = None) -> str | None:
    """Print a study and, if asked, write its page; returns the page's path."""
    view = study_view(folder)[0]
    if out is not None:
        return compare_study(view, out, console=console)
    if not view.trials:
        raise ConfigError(f"study {view.name!r} has no trial yet; start it with `nexus-ray tune`")
    print_study(view, console or Console())
    return None


def write_study(folder: Storage) -> str:
    """Write page, results and the winner's config; returns the page's path."""
    view, study = study_view(folder)
    folder.write_text(render_study(view), "report.html")
    folder.write_json(results(view, study), "results.json")
    folder.write_text(_csv(view.trials), "results.csv")
    if view.front is not None:
        folder.write_text(best_config(view, study, view.front), "best.yaml")
    return folder.path("report.html")


def study_view(folder: Storage) -> tuple[StudyView, Study]:
    """A study from its folder, finished or not. Raises DataError if there is none."""
    config, trials = read_study(folder)
    study = load_study(folder.local_path / "study.yaml")
    points = {trial.point.id: trial.point for trial in trials}
    view = StudyView(
        config.name,
        trials,
        _goal(config),
        base=folder.path("base.yaml"),
        overrides={name: _settings(study, point) for name, point in points.items()},
        space={name: knob_text(study.space, name) for name in study.space.knobs},
        decisions=_decisions(study, trials),
    )
    return view, study


def best_config(view: StudyView, study: Study, front: Front) -> str:
    """The config that repeats the winner's run, checked: it loads, and to the same numbers."""
    best = view.representative(front.winner.id)
    own = study.config_of(best.point, best.seed)
    text = to_yaml(own.model_copy(update={"name": f"{own.name}-again"}))
    assert fingerprint(parse_config(parse_yaml(text, where="best.yaml"))) == fingerprint(own), (
        "best.yaml is another run"
    )
    return f"# The winner of study {view.name}: {view.label(best.point.params)}, seed {best.seed}.\n{text}"


def results(view: StudyView, study: Study) -> dict[str, Any]:
    """The content of `results.json`."""
    full = {trial.point.id: study.budget(trial.point) for trial in view.trials}
    front = view.front
    return {
        "name": view.name,
        "tokens": sum(trial.reports[-1].tokens for trial in view.trials if trial.reports),
        "share_of_full_budgets": share_spent(view.trials, full),
        "seconds_besides_training": overheads(read_log(study.folder, NAME, lost=LOST)),
        "winner": None if front is None else front.winner.id,
        "front": [] if front is None else [member.id for member in front.on_front()],
        "trials": [_entry(trial) for trial in view.trials],
    }


def _entry(trial: Trial) -> dict[str, Any]:
    last = trial.reports[-1] if trial.reports else None
    return {
        "trial": trial.id,
        "point": trial.point.id,
        "seed": trial.seed,
        "status": trial.status,
        "reason": trial.reason,
        "params": dict(trial.point.params),
        "steps": last and last.step,
        "tokens": last and last.tokens,
        **{key: last and getattr(last.objectives, key) for key in METRICS},
    }


def _csv(trials: Sequence[Trial]) -> str:
    knobs = list(dict.fromkeys(knob for trial in trials for knob in trial.point.params))
    plain = ("trial", "point", "seed", "status", "steps", "tokens", *METRICS)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*plain, *knobs])
    for trial in trials:
        entry = _entry(trial)
        writer.writerow([*(entry[name] for name in plain), *(trial.point.params.get(knob) for knob in knobs)])
    return out.getvalue()


def _goal(config: StudyConfig) -> Goal:
    rule = config.objective
    if rule.kind == "new_under_forgetting":
        return Goal("new_under_forgetting", rule.max_forgetting)
    weights = rule.weights
    return Goal(
        "weighted", None, {"new": weights.new, "forgetting": weights.forgetting, "cost": weights.cost / COST_UNIT}
    )


def _settings(study: Study, point: Point) -> Mapping[str, Value]:
    """Config values by path that turn the study's base run into a point's; of a refused point, what it asks for."""
    own: dict[str, Any] = dict(study.space.settings(point))
    if study.refusal(point) is not None:
        return own
    config = study.config_of(point, study.config.seeds[0])
    if study.space.order(point):
        own["stages"] = study.space.apply(study.base, point)["stages"]
    if config.data.fraction != study.base.get("data", {}).get("fraction", 1.0):
        own["data.fraction"] = config.data.fraction
    return own


def _decisions(study: Study, trials: Sequence[Trial]) -> list[Decision]:
    """What the judge said, at the tokens where it said so."""
    shares = rung_shares(study.config.stopping)
    budgets = {trial.point.id: study.budget(trial.point) for trial in trials}
    out = []
    for trial in trials:
        for decision in trial.decisions:
            edge = shares[decision.rung] * Fraction(budgets[trial.point.id])
            reached = [report.tokens for report in trial.reports if report.tokens >= edge]
            if reached:
                out.append(Decision(trial.id, reached[0], decision.verdict))
    return out
