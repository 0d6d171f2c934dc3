"""A study's folder as the report shows it, and what `nexus-ray tune` leaves there at the end.

    report.html     the page
    results.json    every trial with its figures, the front, the winner, laws, what was spent, what turns took
    results.csv     one line a trial
    best.yaml       the config of the winner's run, under another name: `nexus-ray roadmap best.yaml` repeats it

All are functions of the study's own files, and are written anew each time.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console

from nexus_ray.config import fingerprint, parse_config, to_yaml
from nexus_ray.config.source import parse_yaml
from nexus_ray.config.study import StudyConfig, rung_shares
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.report.study import Decision, StudyView, print_study
from nexus_ray.report.study_page import compare_study, render_study
from nexus_ray.storage import Storage
from nexus_ray.study.advice import Advice, HeldOut, Laws, best_ratio, fit_laws
from nexus_ray.study.course import share_spent
from nexus_ray.study.front import Front, Goal
from nexus_ray.study.history import Event
from nexus_ray.study.judge import COST_UNIT
from nexus_ray.study.laws import MIN_RATIOS, MIN_SETTINGS, Fitted
from nexus_ray.study.load import Study, load_study
from nexus_ray.study.log import LOST, NAME, as_recorded, read_study
from nexus_ray.study.measured import BUDGET, RATIO, from_trials
from nexus_ray.study.records import Point, Trial, Value
from nexus_ray.study.replicates import METRICS
from nexus_ray.study.turns import made, overheads
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
    """Write page, results and the winner's config; returns where the page lies."""
    view, study = study_view(folder)
    events = list(read_log(folder, NAME, lost=LOST))
    folder.write_text(_csv(view.trials), "results.csv")
    if view.front is not None:
        folder.write_text(best_config(view, study, view.front), "best.yaml")
    folder.write_json(results(view, study, events), "results.json")
    folder.write_text(render_study(view), "report.html")
    return folder.child("report.html").uri


def study_view(folder: Storage) -> tuple[StudyView, Study]:
    """A study from its folder, finished or not. Raises DataError if there is none."""
    config, trials = read_study(folder)
    with _files(folder) as place:
        study = as_recorded(load_study(place / "study.yaml"), folder)
    points = {trial.point.id: trial.point for trial in trials}
    view = StudyView(
        config.name,
        trials,
        _goal(config),
        base=folder.child("base.yaml").uri,
        overrides={name: _settings(study, point) for name, point in points.items()},
        space={name: knob_text(study.space, name) for name in study.space.knobs},
        decisions=_decisions(study, trials),
    )
    if view.front is not None:
        laws, advice, remarks = _laws(study, trials, view.representative(view.front.winner.id).point, view.goal)
        view = replace(view, laws=laws, advice=advice, remarks=remarks)
    return view, study


@contextmanager
def _files(folder: Storage) -> Iterator[Path]:
    """The study file and its base run on this machine."""
    if folder.is_local:
        yield folder.local_path
        return
    with tempfile.TemporaryDirectory(prefix="nexus-ray-study-") as place:
        for name in ("study.yaml", "base.yaml"):
            Path(place, name).write_bytes(folder.read_bytes(name))
        yield Path(place)


def best_config(view: StudyView, study: Study, front: Front) -> str:
    """The config that repeats the winner's run, checked: it loads, and to the same numbers."""
    best = view.representative(front.winner.id)
    own = study.config_of(best.point, best.seed)
    text = to_yaml(own.model_copy(update={"name": f"{own.name}-again"}))
    assert fingerprint(parse_config(parse_yaml(text, where="best.yaml"))) == fingerprint(own), (
        "best.yaml is another run"
    )
    return f"# The winner of study {view.name}: {view.label(best.point.params)}, seed {best.seed}.\n{text}"


def results(view: StudyView, study: Study, events: Sequence[Event]) -> dict[str, Any]:
    """The content of `results.json`; `events` are those of the study's log."""
    full = {trial.point.id: study.budget(trial.point) for trial in view.trials}
    front = view.front
    return {
        "name": view.name,
        "tokens": sum(trial.reports[-1].tokens for trial in view.trials if trial.reports),
        "share_of_full_budgets": share_spent(view.trials, full),
        "seconds": wall_clock(events),
        "seconds_besides_training": overheads(events),
        "made": made(events),
        "winner": None if front is None else front.winner.id,
        "front": [] if front is None else [member.id for member in front.on_front()],
        "laws": view.laws and _law_entries(view.laws),
        "advice": [asdict(advice) for advice in view.advice],
        "remarks": [*(front.remarks if front else ()), *view.remarks],
        "trials": [_entry(trial) for trial in view.trials],
    }


def wall_clock(events: Iterable[Event]) -> dict[str, float]:
    """How long a study took by its log: seconds from its first event to its last, and those of them in which a trial
    had a turn. The two differ by what lay between a stop and the next start; a turn whose driver was killed was never
    timed and is in the first alone. Ray's start comes before the first event and is in neither."""
    events = list(events)
    turns = sorted((e["time"] - e["seconds"], e["time"]) for e in events if e["event"] == "timed")
    covered, end = 0.0, 0.0
    for began, ended in turns:
        covered += max(0.0, ended - max(began, end))
        end = max(end, ended)
    times = [event["time"] for event in events]
    first_to_last = max(times, default=0.0) - min(times, default=0.0)
    return {"first_to_last_event": round(first_to_last, 1), "with_a_turn": round(covered, 1)}


def _law_entries(laws: Laws) -> dict[str, Any]:
    return {
        "new": _law_entry(laws.new, laws.new_error),
        "forgetting": _law_entry(laws.forgetting, laws.forgetting_error),
    }


def _law_entry(fitted: Fitted, error: HeldOut | None) -> dict[str, Any]:
    return {
        "name": fitted.law.name,
        "formula": fitted.law.formula,
        "unit_tokens": fitted.unit,
        "scatter": fitted.scatter,
        "parameters": [asdict(parameter) for parameter in fitted.parameters()],
        "ratios_left_out": None if error is None else asdict(error),
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


def _laws(
    study: Study, trials: Sequence[Trial], winner: Point, goal: Goal
) -> tuple[Laws | None, list[Advice], list[str]]:
    """Laws of the winner's kind of run over ratio and budget, the ratio for the longest budget measured and for longer
    ones, and remarks: why there is no law, or what it does not say. Nothing of a study that does not search the ratio.
    """
    ratio = next((name for name in winner.params if _sets(study, name, RATIO)), None)
    if ratio is None:
        return None, [], []
    budgets = [name for name in winner.params if _sets(study, name, BUDGET)]
    if study.config_of(winner, study.config.seeds[0]).continual.on_forgetting == "control":
        return None, [], ["No law of replay: under control a run does not keep the ratio that it starts with."]
    fixed = {name: value for name, value in winner.params.items() if name != ratio and name not in budgets}
    same = [trial for trial in trials if set(trial.point.params) == set(winner.params)]
    rows = from_trials(same, knob=ratio, budgets=budgets, fixed=fixed)
    settings, ratios = {(row.tokens, row.ratio) for row in rows}, {row.ratio for row in rows}
    if len(settings) < MIN_SETTINGS or len(ratios) < MIN_RATIOS:
        few = (
            f"No law of replay: the finished trials with the winner's other settings have {len(settings)} settings of "
            f"ratio and budget, {len(ratios)} ratios among them; a fit takes {MIN_SETTINGS} with {MIN_RATIOS}."
        )
        return None, [], [few]
    try:
        laws = fit_laws(rows)
    except DataError as error:
        return None, [], [f"No law of replay: {error}"]
    longest = max(row.tokens for row in rows)
    remarks = []
    if study.config.simulated_epoching and len({row.tokens for row in rows}) > 1:
        remarks.append(
            "The laws are of budgets that read different shares of the rows (simulated_epoching): their exponents are "
            "those of tokens and rows together."
        )
    if goal.kind != "new_under_forgetting" or goal.max_forgetting is None:
        return laws, [], [*remarks, "The objective has no bound on forgetting, so the laws name no ratio."]
    stands_for = float(study.config.full_tokens or study.base_tokens)
    asked = sorted({longest, 2 * longest, max(longest, stands_for)})
    return laws, [best_ratio(laws, tokens=at, max_forgetting=goal.max_forgetting) for at in asked], remarks


def _sets(study: Study, name: str, path: str) -> bool:
    """Whether a knob sets a config value: it alone, or each of its options with what has to follow it."""
    knob = study.space.knobs[name]
    if knob.options is not None:
        return path == BUDGET and all(path in settings for settings in knob.options.values())
    return (knob.path or name) == path


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
