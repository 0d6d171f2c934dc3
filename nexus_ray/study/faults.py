"""What can be wrong with a study file: its own fields, paths, conditions and settings that get in each other's way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from nexus_ray.config.faults import Fault, rule, shown
from nexus_ray.config.load import NO_INFLUENCE
from nexus_ray.config.paths import choice, dotted, keys_at, nearest_path, setting_paths
from nexus_ray.config.source import Data
from nexus_ray.config.study import RANGES, Knob, StudyConfig
from nexus_ray.study.space import Space, matches

FIXED = ("name", "seed", "storage")
"""Paths that follow from the study: its name, its `seeds`, and where its base run stores."""
OPEN = ("domains", "stages", "anchors")
"""Parts of a run whose keys are the user's own; paths inside them are checked with the runs."""
MOST_STAGES = 6
"""Stages whose 720 orders `permutations` may list."""
_UNIONS = ("search", "objective", "stopping")


def file_faults(error: ValidationError, data: Data) -> Iterator[Fault]:
    """The faults of a study file's own fields."""
    for detail in error.errors(include_url=False):
        location = list(detail["loc"])
        if location and location[0] in _UNIONS and len(location) > 1:
            del location[1]  # the kind, which is no key of the file
        path, kind, value = dotted(location) or "(top level)", detail["type"], detail["input"]
        if kind == "value_error":
            yield Fault(path, f": {(detail.get('ctx') or {}).get('error', detail['msg'])}")
        elif kind == "extra_forbidden":
            allowed = keys_at(location[:-1], data, root=StudyConfig)
            yield Fault(path, f"={shown(value)}: unknown key; {choice(location[-1], allowed, what='known are')}")
        elif kind == "missing":
            yield Fault(path, " is missing; set it")
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            context = detail["ctx"]
            tag = str(context["discriminator"]).strip("'")
            found = f"={context['tag']!r} is unknown" if "tag" in context else " is missing"
            known = str(context.get("expected_tags", "")).replace("'", "") or "see the documentation"
            yield Fault(f"{path}.{tag}", f"{found}; use one of {known}" if "tag" in context else f"{found}; set it")
        else:
            yield Fault(path, f"={shown(value)}: {rule(detail)}")


def space_faults(config: StudyConfig, overrides: Sequence[str] = ()) -> Iterator[Fault]:
    """The faults of `common`, `space` and the command line's `path=value` that show without the base run."""
    for path in config.common:
        if problem := _path_problem(path):
            yield Fault(f"common.{path}", f": {problem}")
    for name, knob in config.space.items():
        yield from _knob_faults(name, knob)
    conditions = list(_condition_faults(config.space))
    yield from conditions
    if not conditions:
        yield from _collisions(config.space)
    yield from _override_faults(config.space, overrides)


def base_faults(config: StudyConfig, base: Data) -> Iterator[Fault]:
    """The faults of a sound space beside a sound base run, `common` in place."""
    yield from _order_faults(config, base)
    yield from _unreachable(config, base)


def _path_problem(path: str) -> str | None:
    """Why a study cannot set the config value at `path`; None if it can."""
    known = setting_paths()
    if path in FIXED:
        return f"{path} of a trial follows from the study; use its `name` and `seeds`, or set it in the base run"
    if path in known or any(path.startswith(f"{root}.") for root in known):
        return None
    inside = [other for other in known if other.startswith(path + ".")]
    if inside:
        return f"is a section; name a value inside it by its whole path, such as {inside[0]}"
    near = nearest_path(path, known)
    return "is no path of a run's config" + (f"; did you mean {near}?" if near else "; `nexus-ray` configs list them")


def _override_faults(space: Mapping[str, Knob], overrides: Sequence[str]) -> Iterator[Fault]:
    """What the command line cannot set for all trials. `storage` it can: a study may lie elsewhere."""
    always = {knob.path or name: name for name, knob in space.items() if not knob.when and knob.options is None}
    for path in (override.partition("=")[0].strip() for override in overrides):
        if path != "storage" and (problem := _path_problem(path)):
            yield Fault(f"override {path}", f": {problem}")
        elif path in always:
            why = f": space.{always[path]} sets it in every trial; narrow the knob, or drop the override"
            yield Fault(f"override {path}", why)


def _knob_faults(name: str, knob: Knob) -> Iterator[Fault]:
    if knob.kind == "stages_order":
        return
    if knob.options is not None:
        for label, settings in knob.options.items():
            for path in settings:
                if problem := _path_problem(path):
                    yield Fault(f"space.{name}.options.{label}.{path}", f": {problem}")
        return
    path = knob.path or name
    where = f"space.{name}" + (".path" if knob.path else "")
    if problem := _path_problem(path):
        yield Fault(where, f"={path}: {problem}" if knob.path else f": {problem}")
    elif any(path == root or path.startswith(root + ".") for root in NO_INFLUENCE):
        yield Fault(where, f": {path} changes no number of a run, so there is nothing to compare; set it in `common`")


def _condition_faults(space: Mapping[str, Knob]) -> Iterator[Fault]:
    for name, knob in space.items():
        for parent in knob.when:
            if parent not in space:
                known = choice(parent, [other for other in space if other != name], what="knobs are")
                yield Fault(f"space.{name}.when.{parent}", f": no knob of that name; {known}")
    seen: set[str] = set()
    for name in space:
        cycle = _cycle(space, name)
        if cycle and not seen & set(cycle):
            seen |= set(cycle)
            way = " -> ".join([*cycle, cycle[0]])
            yield Fault(f"space.{cycle[0]}.when", f": the conditions run in a circle ({way}); drop one of them")


def _cycle(space: Mapping[str, Knob], start: str) -> list[str]:
    """The circle of conditions through a knob; [] if there is none."""
    waiting, done = [[start]], set()
    while waiting:
        way = waiting.pop()
        for parent in space[way[-1]].when if way[-1] in space else ():
            if parent == start:
                return way
            if parent not in done:
                done.add(parent)
                waiting.append([*way, parent])
    return []


def _unreachable(config: StudyConfig, base: Data) -> Iterator[Fault]:
    """Conditions that no value of their knob meets."""
    space = Space.of(config.space, _stage_names(base))
    for name, knob in space.knobs.items():
        for parent, condition in knob.when.items():
            other = space.knobs[parent]
            listed = space.values(parent)
            if other.kind in RANGES:
                low, high = other.range
                ok = not isinstance(condition, dict) or (
                    condition.get("above", low - 1) < high and condition.get("below", high + 1) > low
                )
                what = f"[{low}, {high}]"
            else:
                ok = any(matches(condition, value) for value in listed or [])
                what = ", ".join(str(value) for value in listed or [])
            if not ok:
                yield Fault(
                    f"space.{name}.when.{parent}",
                    f"={shown(condition)} never holds: {parent} has {what}; name one of its values",
                )
        if knob.when and all(space.witness(name, value) is None for value in space.ends(name)):
            yield Fault(f"space.{name}.when", f"={shown(knob.when)}: these cannot hold together; drop some of them")


def _collisions(space: Mapping[str, Knob]) -> Iterator[Fault]:
    """Two knobs that may set the same path in one point."""
    setters: list[tuple[str, str, dict[str, Any]]] = []
    for name, knob in space.items():
        needs = _needs(space, name)
        if knob.options is not None:
            setters += [(path, name, {**needs, name: [label]}) for label, s in knob.options.items() for path in s]
        elif knob.kind != "stages_order":
            setters.append((knob.path or name, name, needs))
    told: set[frozenset[str]] = set()
    for (path, one, needs), (other_path, other, other_needs) in combinations(setters, 2):
        overlap = path == other_path or path.startswith(other_path + ".") or other_path.startswith(path + ".")
        if not overlap or one == other or _exclude(needs, other_needs) or frozenset((one, other)) in told:
            continue
        told.add(frozenset((one, other)))
        yield Fault(
            f"space.{other}",
            f" sets {other_path}, and so does space.{one} in the same point; drop one, or give them conditions "
            "(`when`) on one knob that exclude each other",
        )


def _needs(space: Mapping[str, Knob], name: str) -> dict[str, Any]:
    """What other knobs must be for this one to be there, through all levels: by knob, the first condition on it."""
    out: dict[str, Any] = {}
    waiting = [name]
    while waiting:
        for parent, condition in space[waiting.pop()].when.items():
            out.setdefault(parent, condition)
            waiting.append(parent)
    return out


def _exclude(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of conditions name disjoint values of some knob."""
    for knob in set(one) & set(other):
        first, second = one[knob], other[knob]
        if isinstance(first, dict) or isinstance(second, dict):
            continue
        if not any(matches(second, value) for value in (first if isinstance(first, list) else [first])):
            return True
    return False


def _stage_names(base: Data) -> list[str]:
    stages = base.get("stages")
    return [str(stage.get("name")) for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []


def _order_faults(config: StudyConfig, base: Data) -> Iterator[Fault]:
    """What orders of stages cannot be, or cannot be compared with."""
    names = _stage_names(base)
    orders = [name for name, knob in config.space.items() if knob.stages_order is not None]
    for name in orders[1:]:
        yield Fault(f"space.{name}", f": space.{orders[0]} orders the stages already; keep one of them")
    for name in orders[:1]:
        where, wanted = f"space.{name}.stages_order", config.space[name].stages_order
        if wanted == "permutations" and not 2 <= len(names) <= MOST_STAGES:
            yield Fault(where, f": the run has {len(names)} stages; {_few_or_many(len(names))}")
        for place, order in enumerate(wanted if isinstance(wanted, list) else []):
            if sorted(order) != sorted(names):
                yield Fault(f"{where}.{place}", f"={order}: name every stage once: {', '.join(names)}")
        if config.stopping.rule != "none":
            yield Fault(
                "stopping.rule",
                f"={config.stopping.rule} compares trials at rungs, where two orders have learned different domains; "
                f"set stopping: {{rule: none}}, or take {name} out of the space",
            )
        yield from _order_needs(base, where)


def _few_or_many(count: int) -> str:
    return "there is one order; drop the knob" if count < 2 else f"list the orders to try (over {MOST_STAGES})"


def _order_needs(base: Data, where: str) -> Iterator[Fault]:
    stages = [stage for stage in base.get("stages", []) if isinstance(stage, dict)]
    learned = {domain for stage in stages for domain in stage.get("domains") or {}}
    for index, stage in enumerate(stages):
        ahead = sorted(learned & set(stage.get("replay") or {}))
        if ahead:
            yield Fault(
                where,
                f": stages.{index}.replay of the base run names {', '.join(ahead)}, which in another order may not "
                "have been learned yet; leave `replay` out (a stage then replays what came before it), or write the "
                "orders as `options` that set `stages` whole",
            )
    model = base.get("model") or {}
    tokenizer = model.get("tokenizer") or {}
    if tokenizer.get("source", "train") == "train" and not tokenizer.get("train_on") and not model.get("init_from"):
        yield Fault(
            where,
            ": the tokenizer is trained on the first stage's domains, which differ by order; name them in "
            "model.tokenizer.train_on of the base run",
        )
