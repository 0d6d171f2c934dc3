"""What to try next: a short list, each with its reason. Rules of thumb over the front and the effects, not a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from nexus_ray.config.paths import models_at
from nexus_ray.study.effects import Effects, KnobEffect
from nexus_ray.study.front import Front, Member
from nexus_ray.study.records import Value
from nexus_ray.study.replicates import is_number

MAX_SUGGESTIONS = 6
_WIDE = 0.34
"""Share of a knob's tested range that an untested stretch beside the winner must have to be worth a trial."""


@dataclass(frozen=True)
class Suggestion:
    """One thing to do, and why."""

    action: str
    reason: str
    knob: str | None = None
    values: tuple[Value, ...] = ()
    """Values of the knob to add to the space, if the action is to add some."""


Accepts = Callable[[str, Value], bool]
"""Whether a run takes a value of a knob."""


def field_accepts(knob: str, value: Value) -> bool:
    """Whether the config field that a knob is named after takes a value; True of other names, which say nothing."""
    *parents, last = knob.split(".")
    fields = [model.model_fields[last] for model in models_at(parents) if last in model.model_fields]
    for field in fields:
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
            adapter.validate_python(value)
        except ValidationError:
            continue
        return True
    return not fields


def suggestions(front: Front, effects: Sequence[Effects], *, accepts: Accepts = field_accepts) -> list[Suggestion]:
    """What to try after this study, most useful first.

    `effects`: of the objectives that matter (usually new and forgetting); a knob counts as idle if it is on none.
    `accepts` drops values that a run would refuse.
    """
    winner = next(member for member in front.members if member.id == front.winner.id)
    found = [*_replicate(front), *_infeasible(front)]
    for knob, value in winner.replicated.point.params.items():
        seen = [effect for each in effects for effect in each.knobs if effect.knob == knob]
        if not seen:
            continue
        if all(effect.clear is False for effect in seen):
            found.append(_idle(knob, value, effects))
        elif is_number(value):
            for further in (_boundary(knob, value, seen), _gap(knob, value, front.members)):
                if further is not None and all(accepts(knob, new) for new in further.values):
                    found.append(further)
                    break
    return found[:MAX_SUGGESTIONS]


def _replicate(front: Front) -> list[Suggestion]:
    winner, close = front.winner, [rival.id for rival in front.winner.within_noise]
    single = [m.id for m in front.members if m.on_front and len(m.replicated.by_seed) == 1]
    if winner.id in single or all(rival.noise is None for rival in winner.rivals):
        runners = [rival.id for rival in winner.rivals[:1]]
        return [
            Suggestion(
                f"Run two more seeds of {' and of '.join(_named(front, [winner.id, *runners]))}.",
                "The winner ran with one seed: nothing says how much of its lead is chance.",
            )
        ]
    if close:
        names = "; of ".join(_named(front, [winner.id, *close[:2]]))
        return [
            Suggestion(
                f"Run more seeds of {names}, or take the cheapest of them.",
                f"{len(close)} other point{'s are' if len(close) > 1 else ' is'} within the seed noise of the winner.",
            )
        ]
    return []


def _named(front: Front, points: Sequence[str]) -> list[str]:
    """Points in words, the last part of each knob's path and its value."""
    params = {member.id: member.replicated.point.params for member in front.members}
    return [
        ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in params[point].items()) or "the base" for point in points
    ]


def _infeasible(front: Front) -> list[Suggestion]:
    if front.winner.feasible:
        return []
    return [
        Suggestion(
            "Allow more replay or a lower learning rate, or raise the bound on forgetting.",
            f"No point keeps the bound; {_named(front, [front.winner.id])[0]} forgets least.",
        )
    ]


def _idle(knob: str, value: Value, effects: Sequence[Effects]) -> Suggestion:
    names = " or ".join(each.metric for each in effects)
    return Suggestion(
        f"Fix {knob} at {value} and spend the trials on other knobs.",
        f"Its effect on {names} cannot be told from none: the 95 % interval covers zero.",
        knob,
    )


def _boundary(knob: str, value: Value, effects: Sequence[KnobEffect]) -> Suggestion | None:
    """The winner has the lowest or highest value tried, and the knob matters."""
    tried = [float(level.value) for effect in effects for level in effect.levels if is_number(level.value)]  # type: ignore[arg-type]
    low, high, here = min(tried), max(tried), float(value)  # type: ignore[arg-type]
    if not any(effect.clear for effect in effects) or here not in (low, high) or (here == low and low <= 0):
        return None
    further = here * 2 if here == high else here / 2
    further = int(further) if isinstance(value, int) and further == int(further) else further
    return Suggestion(
        f"Widen {knob} beyond {value}: add {further:g}.",
        f"The winner has the {'highest' if here == high else 'lowest'} value tried, and the effect is clear.",
        knob,
        (further,),
    )


def _gap(knob: str, value: Value, members: Sequence[Member]) -> Suggestion | None:
    """The longest untested stretch next to the winner's value."""
    rows: Sequence[Mapping[str, Value]] = [member.replicated.point.params for member in members]
    tried = sorted({float(row[knob]) for row in rows if knob in row and is_number(row[knob])})  # type: ignore[arg-type]
    place, best = tried.index(float(value)), (0.0, 0.0, 0.0)  # type: ignore[arg-type]
    log = tried[0] > 0 and tried[-1] / tried[0] >= 10
    scaled = [math.log(x) for x in tried] if log else tried
    for low, high in ((place - 1, place), (place, place + 1)):
        if low >= 0 and high < len(tried):
            best = max(best, ((scaled[high] - scaled[low]) / (scaled[-1] - scaled[0]), tried[low], tried[high]))
    share, low_value, high_value = best
    if share < _WIDE or (isinstance(value, int) and high_value - low_value < 2):
        return None
    middle = math.sqrt(low_value * high_value) if low_value > 0 else (low_value + high_value) / 2
    middle = round(middle) if isinstance(value, int) else float(f"{middle:.2g}")
    if not low_value < middle < high_value:
        return None
    return Suggestion(
        f"Try {knob}={middle:g}.",
        f"Nothing was tried between {low_value:g} and {high_value:g}, next to the winner at {value}.",
        knob,
        (middle,),
    )
