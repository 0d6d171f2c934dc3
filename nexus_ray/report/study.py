"""What a study says, in words and in the terminal: counts, front, effects, winner, what to try next.

Made from the study's trials alone; an unfinished study gives what there is. The page is in `study_page.py`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nexus_ray.report import summary
from nexus_ray.report.plots import short
from nexus_ray.study.advice import Advice, Laws
from nexus_ray.study.effects import Effects, knob_effects
from nexus_ray.study.front import Front, Goal, Member, candidates, study_front
from nexus_ray.study.records import Trial, Value
from nexus_ray.study.replicates import METRICS, Estimate, Metric
from nexus_ray.study.suggest import Suggestion, suggestions
from nexus_ray.tracking import redact_text

NAMES: Mapping[Metric, str] = {"new": "new-domain score", "forgetting": "forgetting", "cost": "cost"}
BETTER: Mapping[Metric, str] = {"new": "up is better", "forgetting": "down is better", "cost": "down is better"}


@dataclass(frozen=True)
class Decision:
    """What the judge said of a trial at a rung."""

    trial: str
    tokens: int
    action: Literal["continued", "paused", "promoted", "stopped"]


@dataclass(frozen=True)
class StudyView:
    """A study as the page and the terminal show it."""

    name: str
    trials: Sequence[Trial]
    goal: Goal = field(default_factory=Goal)
    base: str = "run.yaml"
    """Config file that every trial overrides."""
    common: Mapping[str, Value] = field(default_factory=dict)
    """Config values of all trials by dotted path."""
    overrides: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    """Config values of a point by its id, where a knob stands for several paths; default: the point's own knobs."""
    space: Mapping[str, str] = field(default_factory=dict)
    """Each knob's path and what it could be, in words."""
    decisions: Sequence[Decision] = ()
    laws: Laws | None = None
    advice: Sequence[Advice] = ()
    law_unit: str = "bits per byte"
    remarks: Sequence[str] = ()

    @cached_property
    def front(self) -> Front | None:
        """The front over all objectives that differ; None until a trial has finished."""
        if not candidates(self.trials):
            return None
        costs = {trial.final.cost for trial in self.trials if trial.final}
        return study_front(self.trials, self.goal, axes=METRICS if len(costs) > 1 else METRICS[:2])

    @cached_property
    def effects(self) -> list[Effects]:
        """Of the new-domain score and of forgetting."""
        return [found for metric in METRICS[:2] if (found := knob_effects(self.trials, metric)) is not None]

    @cached_property
    def next(self) -> list[Suggestion]:
        return [] if self.front is None else suggestions(self.front, self.effects)

    def label(self, params: Mapping[str, Value]) -> str:
        """A point in words: `replay_ratio=0.05, use_lora=True`."""
        return redact_text(", ".join(f"{self.short_name(knob)}={value}" for knob, value in params.items())) or "base"

    def short_name(self, knob: str) -> str:
        """The last part of a knob's path, or all of it where two knobs end alike."""
        knobs = {name for trial in self.trials for name in trial.point.params}
        last = knob.rpartition(".")[2]
        return knob if sum(name.rpartition(".")[2] == last for name in knobs) > 1 else last

    def settings(self, trial: Trial) -> dict[str, Value]:
        """Config values by path with which the base config repeats a trial."""
        own = self.overrides.get(trial.point.id, trial.point.params)
        return {**self.common, **own, "seed": trial.seed, "name": f"{self.name}-{trial.id}-again"}

    def command(self, trial: Trial) -> str:
        """The command that repeats a trial."""
        pairs = [f"{path}={_yaml_inline(value)}" for path, value in self.settings(trial).items()]
        return redact_text(shlex.join(["nexus-ray", "roadmap", self.base, *pairs]))

    def representative(self, point: str) -> Trial:
        """The finished trial of a point with the lowest seed."""
        return min((t for t in self.trials if t.point.id == point and t.final), key=lambda trial: trial.seed)


# --- terminal ----------------------------------------------------------------------------------------------------


def print_study(view: StudyView, console: Console) -> None:
    """Counts, the points by rank, effects, the winner's command and what to try next."""
    console.print(Text(f"{view.name}: {counts(view)}", style="bold"))
    if view.front is not None:
        console.print(_points_table(view, view.front))
        console.print(Text(headline(view)))
        console.print(Text(f"again: {view.command(view.representative(view.front.winner.id))}"), soft_wrap=True)
        for remark in view.front.remarks:
            console.print(Text(remark, style="dim"))
    for remark in view.remarks:
        console.print(Text(remark, style="dim"))
    for effects in view.effects:
        console.print(_effects_table(view, effects))
    for advice in view.advice:
        console.print(Text(advice_text(advice)))
    for item in view.next:
        console.print(Text(f"next: {item.action} {item.reason}"))


def _points_table(view: StudyView, front: Front) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("point", overflow="fold")
    for name in ("seeds", "new", "forgetting", "cost", "on the front"):
        table.add_column(name, justify="right")
    marks = letters(front)
    for member in ranked(view, front):
        style = "bold green" if member.id == front.winner.id else "" if member.feasible else "dim"
        cells = [estimate_text(member.estimates[metric]) for metric in METRICS[:2]]
        row = [str(len(member.replicated.by_seed)), *cells, short(member.estimates["cost"].mean), membership(member)]
        table.add_row(marks.get(member.id, ""), Text(view.label(member.replicated.point.params), style=style), *row)
    return table


def _effects_table(view: StudyView, effects: Effects) -> Table:
    title = f"effects on {NAMES[effects.metric]}, {effects.method}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("knob", "effect", "95 %", "by value"):
        table.add_column(name, overflow="fold")
    for knob in effects.knobs:
        levels = ", ".join(f"{level.value}: {level.mean:.3f}" for level in knob.levels)
        table.add_row(view.short_name(knob.knob), f"{knob.size:.3f}", pair_text(knob.contrast), levels)
    return table


# --- words -------------------------------------------------------------------------------------------------------


def counts(view: StudyView) -> str:
    """How many trials there are of each state, and the tokens they took."""
    states = [trial.status for trial in view.trials]
    parts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return f"{len(states)} trials ({', '.join(parts)}), {summary.count(spent(view))} tokens"


def spent(view: StudyView) -> int:
    """Tokens trained by all trials."""
    return sum(trial.reports[-1].tokens for trial in view.trials if trial.reports)


def headline(view: StudyView) -> str:
    """The result in a sentence or two."""
    front = view.front
    if front is None:
        return "No trial has finished yet."
    member = next(item for item in front.members if item.id == front.winner.id)
    new, lost = (member.estimates[metric].mean for metric in METRICS[:2])
    text = f"{view.label(member.replicated.point.params)} scores {new:.3f} and forgets {lost:.3f}"
    if not front.winner.feasible:
        return f"No point keeps forgetting below {view.goal.max_forgetting}; {text}, the least."
    close, unknown = front.winner.within_noise, [r for r in front.winner.rivals if r.within_noise is None]
    if close:
        return f"{text}; {len(close)} other point{'s are' if len(close) > 1 else ' is'} within its seed noise."
    if unknown or not front.winner.rivals:
        return f"{text}; there is no second seed to tell its lead from noise." if unknown else f"{text}."
    return f"{text}, ahead of all others by more than the seed noise."


def advice_text(advice: Advice) -> str:
    """A law's answer for a budget in a sentence."""
    start = f"{advice.tokens:,.0f} tokens, forgetting at most {advice.max_forgetting:g}: "
    if advice.ratio is None:
        answer = "no replay ratio"
    else:
        spread = "" if advice.interval is None else f" [{advice.interval[0]:.3g}, {advice.interval[1]:.3g}]"
        expected = f"expected loss {advice.new:.3f}, forgetting {advice.forgetting:.3f}"
        answer = f"replay ratio {advice.ratio:.3g}{spread}, {expected}"
    return start + answer + "".join(f". Careful: {warning}" for warning in advice.warnings)


def ranked(view: StudyView, front: Front) -> list[Member]:
    """Points that keep the bound by falling score, then the others by rising forgetting."""

    def key(member: Member) -> tuple[bool, float]:
        values = member.replicated.values().mean(axis=0)
        score = float(view.goal.score(values))
        return (not member.feasible, -score if member.feasible else member.estimates["forgetting"].mean)

    return sorted(front.members, key=key)


def letters(front: Front) -> dict[str, str]:
    """A letter for each point of the front, by its id: A has the best score of the first axis."""
    return {member.id: _letter(place) for place, member in enumerate(front.on_front())}


def _letter(place: int) -> str:
    return (_letter(place // 26 - 1) if place >= 26 else "") + chr(ord("A") + place % 26)


def membership(member: Member) -> str:
    """`yes, 93 %`: on the front by its means, and in this share of the resampled seeds."""
    said = "yes" if member.on_front else "no"
    return said if member.probability is None else f"{said}, {member.probability:.0%}"


def estimate_text(estimate: Estimate) -> str:
    """`1.234 [1.200, 1.270]`"""
    return f"{estimate.mean:.3f}" + ("" if estimate.interval is None else f" {pair_text(estimate.interval)}")


def pair_text(pair: tuple[float, float] | None) -> str:
    """`[1.200, 1.270]`, or that there is none."""
    return "no interval" if pair is None else f"[{pair[0]:.3f}, {pair[1]:.3f}]"


def _yaml_inline(value: Value) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
