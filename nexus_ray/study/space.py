"""The space of a study: points of a grid in a fixed order, samples, and what a point sets in a run's config. Pure.

Invariant: sample i is a function of (seed, i, the knob and its range) alone, drawn for each knob by itself; so more
samples, more knobs or the order of knobs never change an earlier value. Of listed values the one with the highest hash
wins (rendezvous hashing, Thaler and Ravishankar 1998), so that a value added to a list changes only the samples that
fall on it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nexus_ray.config.source import Data, apply_overrides, copy_data, override_texts
from nexus_ray.config.study import RANGES, Knob
from nexus_ray.study.records import Point, Value, canonical

ORDER_SIGN = ">"
DIGITS = 6
"""Significant digits of a sampled number: enough for any knob, and short to read."""


@dataclass(frozen=True)
class Space:
    """Knobs by name, those that others depend on first, and the names of the base run's stages."""

    knobs: Mapping[str, Knob]
    stages: tuple[str, ...] = ()

    @classmethod
    def of(cls, knobs: Mapping[str, Knob], stages: Sequence[str] = ()) -> Space:
        """The space with its knobs in an order in which conditions can be read; needs conditions without a cycle."""
        order: dict[str, Knob] = {}
        waiting = dict(knobs)
        while waiting:
            ready = (name for name, knob in waiting.items() if not any(parent in waiting for parent in knob.when))
            name = next(ready, None)
            assert name is not None, f"conditions of {', '.join(waiting)} form a cycle"
            order[name] = waiting.pop(name)
        return cls(order, tuple(stages))

    # --- values of one knob ----------------------------------------------------------------------------------------

    def values(self, name: str) -> list[Value] | None:
        """Every value of a knob on the grid, in order; None of a range without `levels`."""
        knob = self.knobs[name]
        if knob.choice is not None:
            return list(knob.choice)
        if knob.options is not None:
            return list(knob.options)
        if knob.stages_order is not None:
            return list(_orders(knob, self.stages))
        return None if knob.levels is None else list(_levels(knob))

    def ends(self, name: str) -> list[Value]:
        """The values that stand for a knob where a config is checked: all that are listed, or the ends of a range."""
        knob = self.knobs[name]
        return self.values(name) or [_number(knob, end) for end in knob.range]

    def _draw(self, name: str, seed: int, index: int) -> Value:
        knob = self.knobs[name]
        if knob.kind in RANGES:
            return _drawn(knob, _unit(seed, index, name))
        listed = self.values(name) or []
        return max(listed, key=lambda value: (_unit(seed, index, name, canonical(value)), canonical(value)))

    def holds(self, name: str, params: Mapping[str, Value]) -> bool:
        """Whether the conditions of a knob hold among the values chosen so far."""
        return all(parent in params and matches(c, params[parent]) for parent, c in self.knobs[name].when.items())

    # --- points ----------------------------------------------------------------------------------------------------

    def sample(self, seed: int, index: int) -> Point:
        """Point `index` of the endless random sequence of a seed."""
        params: dict[str, Value] = {}
        for name in self.knobs:
            if self.holds(name, params):
                params[name] = self._draw(name, seed, index)
        return Point(params)

    def grid(self) -> Iterator[Point]:
        """Every combination that the conditions allow, the last knob changing fastest. Needs `is_finite`."""
        return (Point(params) for params in self._combinations(tuple(self.knobs), {}, self._listed))

    @property
    def is_finite(self) -> bool:
        """Whether every knob has listed values or `levels`."""
        return all(self.values(name) is not None for name in self.knobs)

    @property
    def is_countable(self) -> bool:
        """Whether samples come from a finite set: whole numbers and listed values only."""
        return not any(knob.kind in ("uniform", "log_uniform") for knob in self.knobs.values())

    def every(self) -> Iterator[Point]:
        """Every point that a sample can be, for a space that `is_countable`."""
        return (Point(params) for params in self._combinations(tuple(self.knobs), {}, self._all_values))

    def _all_values(self, name: str) -> Sequence[Value]:
        knob = self.knobs[name]
        return range(int(knob.range[0]), int(knob.range[1]) + 1) if knob.kind in RANGES else self._values[name]

    def corners(self) -> Iterator[Point]:
        """Every combination of listed values with the ends of ranges."""
        return (Point(params) for params in self._combinations(tuple(self.knobs), {}, self.ends))

    @cached_property
    def _values(self) -> dict[str, list[Value]]:
        return {name: self.values(name) or [] for name in self.knobs}

    def _listed(self, name: str) -> list[Value]:
        return self._values[name]

    def _combinations(self, names: Sequence[str], params: dict[str, Value], of: Any) -> Iterator[dict[str, Value]]:
        if not names:
            yield params
        elif not self.holds(names[0], params):
            yield from self._combinations(names[1:], params, of)
        else:
            for value in of(names[0]):
                yield from self._combinations(names[1:], {**params, names[0]: value}, of)

    def contains(self, point: Point) -> bool:
        """Whether a point can be had from here: exactly the knobs whose conditions hold, with values of theirs."""
        wanted: dict[str, Value] = {}
        for name in self.knobs:
            if self.holds(name, wanted):
                if name not in point.params or not self._has(name, point.params[name]):
                    return False
                wanted[name] = point.params[name]
        return len(wanted) == len(point.params)

    def _has(self, name: str, value: Value) -> bool:
        knob = self.knobs[name]
        if knob.kind in RANGES:
            low, high = knob.range
            return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return canonical(value) in {canonical(listed) for listed in self.values(name) or []}

    def witness(self, name: str, value: Value) -> Point | None:
        """A point in which a knob has that value; the others have their first, or one that its conditions ask for.

        None if the conditions of the knob, or of those that it depends on, cannot be met together.
        """
        asked: dict[str, list[Any]] = {}
        waiting = [name]
        while waiting:
            for parent, condition in self.knobs[waiting.pop()].when.items():
                asked.setdefault(parent, []).append(condition)
                waiting.append(parent)
        params: dict[str, Value] = {}
        for knob in self.knobs:
            if knob == name:
                params[knob] = value
            elif self.holds(knob, params):
                conditions = asked.get(knob, [])
                fitting = (v for v in self.ends(knob) if all(matches(condition, v) for condition in conditions))
                params[knob] = next(fitting, None)
        return Point(params) if self.holds(name, params) else None

    # --- configs ---------------------------------------------------------------------------------------------------

    def settings(self, point: Point) -> dict[str, Value]:
        """Config values by dotted path that a point sets, the order of the stages aside."""
        out: dict[str, Value] = {}
        for name, value in point.params.items():
            knob = self.knobs[name]
            if knob.options is not None:
                out |= knob.options[str(value)]
            elif knob.stages_order is None:
                out[knob.path or name] = value
        return out

    def order(self, point: Point) -> list[str] | None:
        """Names of the stages in a point's order; None if it sets none."""
        for name, value in point.params.items():
            if self.knobs[name].stages_order is not None:
                return str(value).split(ORDER_SIGN)
        return None

    def apply(self, data: Data, point: Point) -> Data:
        """A run's plain data with a point's settings, and then its order of stages: paths name the base's stages."""
        data = apply_overrides(data, list(override_texts(self.settings(point))))
        if order := self.order(point):
            by_name = {stage["name"]: stage for stage in data["stages"]}
            data["stages"] = [copy_data(by_name[name]) for name in order]
        return data


def matches(condition: Any, value: Value) -> bool:
    """Whether a value meets a condition of `when`."""
    if isinstance(condition, dict):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return value > condition.get("above", -math.inf) and value < condition.get("below", math.inf)
    listed = condition if isinstance(condition, list) else [condition]
    return any(_same(wanted, value) for wanted in listed)


def _same(one: Any, other: Any) -> bool:
    """Equal, and 1 is 1.0 but not true."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _orders(knob: Knob, stages: Sequence[str]) -> Iterator[str]:
    listed = itertools.permutations(stages) if knob.stages_order == "permutations" else knob.stages_order or []
    return (ORDER_SIGN.join(order) for order in listed)


def _levels(knob: Knob) -> Iterator[Value]:
    low, high = knob.range
    count = knob.levels or 2
    return iter(dict.fromkeys(_between(knob, low, high, k / (count - 1)) for k in range(count)))


def _drawn(knob: Knob, share: float) -> Value:
    """The value of a range for a number in [0, 1); every whole number has its own part of the scale."""
    low, high = knob.range
    if knob.kind.startswith("int"):
        low, high = low - 0.5, high + 0.5
    return _between(knob, low, high, share)


def _between(knob: Knob, low: float, high: float, share: float) -> Value:
    if "log" in knob.kind:
        return _number(knob, math.exp(math.log(low) + share * (math.log(high) - math.log(low))))
    return _number(knob, low + share * (high - low))


def _number(knob: Knob, value: float) -> Value:
    low, high = knob.range
    if knob.kind.startswith("int"):
        return int(min(max(round(value), low), high))
    return float(min(max(float(f"{value:.{DIGITS}g}"), low), high))


def _unit(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone: 53 bits of their hash."""
    text = "\x1f".join(str(part) for part in parts)
    return (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 11) / 2**53
