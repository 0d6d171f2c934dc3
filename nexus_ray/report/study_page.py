"""The page of a study: Pareto front, parallel coordinates, effects, learning curves, laws; nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from markupsafe import Markup
from rich.console import Console

from nexus_ray.errors import ConfigError
from nexus_ray.report import study_plots, summary
from nexus_ray.report.page import environment
from nexus_ray.report.plots import Chart, Point, Series, line_chart, scatter, short
from nexus_ray.report.study import (
    BETTER,
    NAMES,
    StudyView,
    advice_text,
    counts,
    estimate_text,
    headline,
    letters,
    membership,
    pair_text,
    print_study,
    ranked,
)
from nexus_ray.storage import Storage
from nexus_ray.study.effects import Effects
from nexus_ray.study.front import Front, study_front
from nexus_ray.study.records import Trial, Value
from nexus_ray.study.replicates import METRICS, Metric
from nexus_ray.tracking import redact_addresses, redact_text


def compare_study(view: StudyView, out: str | Path, *, console: Console | None = None) -> str:
    """Print a study, write its page to `out`, and return the page's path.

    Raises:
        ConfigError: the study has no trial.
    """
    if not view.trials:
        raise ConfigError(f"study {view.name!r} has no trial yet; start it with `nexus-ray tune`")
    print_study(view, console or Console())
    target = Path(out).absolute()
    Storage(str(target.parent)).write_text(render_study(view), target.name)
    return str(target)


def render_study(view: StudyView) -> str:
    """The page as text, without credentials that a knob's values or a trial's reason may hold."""
    front = view.front
    best = None if front is None else view.representative(front.winner.id)
    page = (
        environment()
        .get_template("study.html.j2")
        .render(
            view=view,
            title=headline(view),
            counts=counts(view),
            front=front,
            marks={} if front is None else letters(front),
            ranked=[] if front is None else ranked(view, front),
            best=best,
            best_yaml="" if best is None else redact_text(yaml.safe_dump(view.settings(best), sort_keys=False)),
            pareto=None if front is None else _pareto(view, front),
            parallel=_parallel(view, front),
            dots=[_dots(view, effects) for effects in view.effects],
            curves=[_curves(view, metric) for metric in METRICS[:2]],
            law_charts=[] if view.laws is None else study_plots.law_charts(view.laws, unit=view.law_unit),
            names=NAMES,
            metrics=METRICS,
            estimate=estimate_text,
            pair=pair_text,
            membership=membership,
            advice_text=advice_text,
        )
    )
    return redact_addresses(page)


def _tip(view: StudyView, params: Mapping[str, Value], parts: Sequence[str]) -> str:
    return "\n".join([view.label(params), *parts])


def _pareto(view: StudyView, front: Front) -> Markup:
    points, marks = [], letters(front)
    for member in sorted(front.members, key=lambda member: member.on_front):  # full marks lie on top
        new, lost = member.estimates["new"], member.estimates["forgetting"]
        label = marks.get(member.id, "") + (", winner" if member.id == front.winner.id else "")
        said = [
            f"new {estimate_text(new)}",
            f"forgetting {estimate_text(lost)}",
            f"cost {short(member.estimates['cost'].mean)}",
        ]
        tip = _tip(view, member.replicated.point.params, [*said, f"on the front: {membership(member)}"])
        colour = 1 if member.id == front.winner.id else 0 if member.on_front else -1
        spread = (lost.interval, new.interval)
        points.append(Point(label, lost.mean, new.mean, colour, spread[0], tip, spread[1], hollow=not member.on_front))
    flat = study_front(view.trials, view.goal, axes=METRICS[:2]) if len(front.axes) == 3 else front
    line = [(m.estimates["forgetting"].mean, m.estimates["new"].mean) for m in flat.on_front()]
    return scatter(
        "Pareto front",
        points,
        x_label="forgetting, bits per byte (left is better)",
        y_label="new-domain score, negated bits per byte (up is better)",
        note=f"full marks: on the front over {', '.join(front.axes)}; whiskers: 95 % over seeds",
        line=line,
        bound=view.goal.max_forgetting,
    )


def _parallel(view: StudyView, front: Front | None) -> Markup | None:
    """All points that reported; those that finished with their objectives."""
    last: dict[str, list[Trial]] = {}
    for trial in view.trials:
        if trial.reports and trial.status != "failed":
            last.setdefault(trial.point.id, []).append(trial)
    on_front = {member.id for member in front.members if member.on_front} if front else set()
    every = list(dict.fromkeys(view.short_name(k) for trials in last.values() for k in trials[0].point.params))
    lines = []
    for point, trials in last.items():
        done = [trial for trial in trials if trial.final] or trials
        means = {m: sum(getattr(t.reports[-1].objectives, m) for t in done) / len(done) for m in METRICS}
        params = trials[0].point.params
        state = (
            "finished" if done[0].final else f"{done[0].status} at {summary.count(done[0].reports[-1].tokens)} tokens"
        )
        style = ["wins" if front and point == front.winner.id else "front" if point in on_front else "faint"]
        style += [] if done[0].final else ["stopped"]
        colour = 1 if "wins" in style else 0 if "front" in style else -1
        tip = _tip(view, params, [*(f"{NAMES[m]} {short(means[m])}" for m in METRICS), state])
        named = {view.short_name(knob): value for knob, value in params.items()}
        named |= {NAMES[m]: means[m] for m in METRICS} if done[0].final else {}
        cut = None if done[0].final else len(every)
        lines.append(study_plots.Line(named, tip, colour, " ".join(style), cut))
    axes = [study_plots.Axis(name, _known(lines, name)) for name in every]
    axes += [
        study_plots.Axis(NAMES[m], known, upside_down=m != "new") for m in METRICS if (known := _known(lines, NAMES[m]))
    ]
    if not axes:
        return None
    note = "objectives: up is better; dashed: not finished, so without final objectives"
    return study_plots.parallel("All points, knobs and objectives", axes, lines, note)


def _known(lines: Sequence[study_plots.Line], name: str) -> tuple[Value, ...]:
    found = {str(line.values[name]): line.values[name] for line in lines if name in line.values}
    return tuple(found.values())


def _dots(view: StudyView, effects: Effects) -> list[Markup]:
    charts = []
    for place, knob in enumerate(effects.knobs):
        clear = {True: "clear", False: "not told from none", None: "no interval"}[knob.clear]
        title = f"{view.short_name(knob.knob)} on {NAMES[effects.metric]}"
        note = f"{clear}; {knob.among} points have it"
        charts.append(study_plots.dots(knob, title=title, note=note, colour=place, better=BETTER[effects.metric]))
    return charts


def _curves(view: StudyView, metric: Metric) -> Markup:
    """Means over seeds of the front's points, and every other trial behind them; decisions of the judge as dots."""
    marks = letters(view.front) if view.front else {}
    series = [_mean_curve(view, metric, point, mark, colour) for colour, (point, mark) in enumerate(marks.items())]
    decided = {(decision.trial, decision.tokens) for decision in view.decisions}
    for trial in view.trials:
        values = [(float(report.tokens), float(getattr(report.objectives, metric))) for report in trial.reports]
        ends = {trial.reports[-1].tokens} if trial.status == "stopped" and trial.reports else set()
        dots = [value for value in values if (trial.id, int(value[0])) in decided or value[0] in ends]
        xs, ys = [x for x, _ in values], [y for _, y in values]
        if trial.point.id not in marks:
            series.append(Series(trial.id, xs, ys, -1, "faint", dots, quiet=True))
    note = f"{BETTER[metric]}; grey: trials off the front; dots: decisions of the judge on them"
    return line_chart(Chart(NAMES[metric].capitalize(), series, (), note, width=940, height=280))


def _mean_curve(view: StudyView, metric: Metric, point: str, mark: str, colour: int) -> Series:
    trials = [trial for trial in view.trials if trial.point.id == point and trial.final]
    shared = sorted(set.intersection(*({report.tokens for report in trial.reports} for trial in trials)))
    rows = [{r.tokens: float(getattr(r.objectives, metric)) for r in trial.reports} for trial in trials]
    means = [sum(row[tokens] for row in rows) / len(rows) for tokens in shared]
    return Series(f"{mark} {view.label(trials[0].point.params)}", [float(x) for x in shared], means, colour)
