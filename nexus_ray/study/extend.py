"""Whether a changed study file goes on with a study that has begun: more is fine, something else is another study."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nexus_ray.config.faults import Fault, shown
from nexus_ray.config.study import RANGES, Knob, StudyConfig
from nexus_ray.study.records import canonical

WAY_OUT = "put it back, or give the study another `name` (shared shards and models are used again)"
FREE = ("max_concurrent", "base", "common", "space", "seeds", "search", "objective")
"""Fields that may change, or whose change is looked at by itself; `base` and `common` count through the base run's
fingerprint."""


def contradictions(old: StudyConfig, new: StudyConfig, *, old_base: str, new_base: str) -> Iterator[Fault]:
    """What keeps `new` from going on with a study of `old`; `old_base` and `new_base` are the base runs' fingerprints.

    A wider space (more values, wider ranges, more options), more trials and more seeds extend a study.
    """
    if old_base != new_base:
        yield Fault(
            "base",
            f"={new.base!r}, with `common`, is now another run (fingerprint {new_base}, the study's is {old_base}), "
            f"whose trials would not compare with the finished ones; {WAY_OUT}",
        )
    for name in StudyConfig.model_fields:
        before, after = _data(old, name), _data(new, name)
        if name not in FREE and before != after:
            yield _changed(name, before, after)
    if old.stopping.rule != "none" and _data(old, "objective") != _data(new, "objective"):
        yield _changed("objective", _data(old, "objective"), _data(new, "objective"))
    if dropped := [seed for seed in old.seeds if seed not in new.seeds]:
        yield Fault("seeds", f"={new.seeds} leaves out {dropped}, which the study has begun with; {WAY_OUT}")
    yield from _search(old, new)
    yield from _space(old, new)


def _data(config: StudyConfig, name: str) -> Any:
    return config.model_dump(mode="json")[name]


def _changed(path: str, before: Any, after: Any) -> Fault:
    return Fault(path, f"={shown(after)}: the study has begun with {shown(before)}; {WAY_OUT}")


def _search(old: StudyConfig, new: StudyConfig) -> Iterator[Fault]:
    before, after = _data(old, "search"), _data(new, "search")
    fewer = after.get("trials", 0) < before.get("trials", 0) and before["kind"] == after["kind"]
    if fewer:
        yield Fault(
            "search.trials", f"={after['trials']} is fewer than the study's {before['trials']}; a study only grows"
        )
    if {**before, "trials": None} != {**after, "trials": None}:
        yield _changed("search", before, after)


def _space(old: StudyConfig, new: StudyConfig) -> Iterator[Fault]:
    for name in sorted(set(old.space) ^ set(new.space)):
        what = "is new" if name in new.space else "is gone"
        yield Fault(f"space.{name}", f" {what}: points would have other knobs than the finished ones; {WAY_OUT}")
    for name, knob in old.space.items():
        if name in new.space and (problem := _narrower(knob, new.space[name])):
            yield Fault(f"space.{name}", f": {problem}; a space only grows: {WAY_OUT}")


def _narrower(old: Knob, new: Knob) -> str | None:
    """Why points of one knob may not be points of the other; None if all are."""
    if old.kind != new.kind:
        return f"{new.kind} where it was {old.kind}"
    if old.path != new.path:
        return f"path={new.path!r} where it was {old.path!r}"
    if problem := _conditions(old, new):
        return problem
    if old.kind in RANGES:
        (low, high), (new_low, new_high) = old.range, new.range
        return None if new_low <= low and high <= new_high else f"[{new_low}, {new_high}] is not around [{low}, {high}]"
    if old.options is not None and new.options is not None:
        gone = [label for label, value in old.options.items() if canonical(new.options.get(label)) != canonical(value)]
        return f"options {', '.join(gone)} are gone or set something else" if gone else None
    if old.stages_order is not None:
        if new.stages_order in ("permutations", old.stages_order):
            return None
        lists = old.stages_order != "permutations" and isinstance(new.stages_order, list)
        kept = lists and all(order in (new.stages_order or []) for order in old.stages_order)
        return None if kept else "orders are gone"
    kept_values = {canonical(value) for value in new.choice or []}
    gone_values = [value for value in old.choice or [] if canonical(value) not in kept_values]
    return f"{shown(gone_values)} are gone" if gone_values else None


def _conditions(old: Knob, new: Knob) -> str | None:
    if set(old.when) != set(new.when):
        return f"when={shown(new.when)} where it was {shown(old.when)}"
    for parent, before in old.when.items():
        after = new.when[parent]
        if isinstance(before, dict) or isinstance(after, dict):
            if before != after:
                return f"when.{parent}={shown(after)} where it was {shown(before)}"
            continue
        listed = [value if isinstance(value, list) else [value] for value in (before, after)]
        if any(value not in listed[1] for value in listed[0]):
            return f"when.{parent}={shown(after)} where it was {shown(before)}"
    return None
