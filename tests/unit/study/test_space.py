"""Points of a grid stand in a fixed order; samples depend on (seed, index, knob) alone; conditions hold in each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config.study import Knob
from nexus_ray.study.records import Point
from nexus_ray.study.space import Space, matches
from tests.studies import a_study


def space(**knobs: dict[str, Any]) -> Space:
    return Space.of({name.replace("__", "."): Knob.model_validate(knob) for name, knob in knobs.items()}, ("a", "b"))


NESTED = {
    "rank": {"choice": [4, 8], "when": {"method": "lora"}},
    "method": {"options": {"full": {}, "lora": {"continual.use_lora": True}, "expand": {"continual.expand_blocks": 2}}},
    "dropout": {"uniform": [0.0, 0.5], "when": {"rank": [8]}},
    "order": {"stages_order": "permutations"},
    "late": {"int_uniform": [1, 9], "when": {"dropout": {"above": 0.25}}},
}
values = st.lists(st.integers(-50, 50), min_size=1, max_size=6, unique=True)


def test_the_grid_has_a_fixed_order_and_no_point_twice() -> None:
    found = [dict(point.params) for point in space(a={"choice": [1, 2]}, b={"uniform": [0, 1], "levels": 3}).grid()]
    assert found == [{"a": a, "b": b} for a in (1, 2) for b in (0.0, 0.5, 1.0)]


def test_conditional_knobs_multiply_only_where_they_apply() -> None:
    knobs = {**NESTED, "dropout": {**NESTED["dropout"], "levels": 2}, "late": {**NESTED["late"], "levels": 3}}
    points = list(space(**knobs).grid())
    assert len(points) == len({point.id for point in points}) == 2 * (1 + 1 + (1 + (1 + 3)))
    assert all(("rank" in p.params) == (p.params["method"] == "lora") for p in points)
    assert [p.params["method"] for p in points] == ["full"] * 2 + ["lora"] * 10 + ["expand"] * 2, (
        "file order, parents 1st"
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**40), st.integers(0, 10**6))
def test_every_sample_is_a_point_of_its_space(seed: int, index: int) -> None:
    nested = space(**NESTED)
    point = nested.sample(seed, index)
    assert nested.contains(point) and point == nested.sample(seed, index)
    assert ("late" in point.params) == (float(point.params.get("dropout", 0)) > 0.25)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(values, values, st.integers(0, 1000), st.randoms())
def test_an_added_value_changes_only_the_samples_that_fall_on_it(
    old: list[int], more: list[int], seed: int, random: Any
) -> None:
    new = old + [value for value in more if value not in old]
    random.shuffle(new)
    before, after = space(x={"choice": old}), space(x={"choice": new}, y={"uniform": [0, 1]})
    for index in range(30):
        one, other = before.sample(seed, index).params["x"], after.sample(seed, index).params["x"]
        assert one == other or other not in old


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_other_knobs_do_not_change_a_knobs_samples(seed: int, index: int) -> None:
    alone = space(x={"log_uniform": [1e-5, 1e-2]}).sample(seed, index).params["x"]
    among = space(w={"choice": [1, 2]}, x={"log_uniform": [1e-5, 1e-2]}, y={"int_uniform": [0, 3]})
    assert among.sample(seed, index).params["x"] == alone


def test_samples_spread_as_they_should() -> None:
    wide = space(
        u={"uniform": [2, 4]},
        l={"log_uniform": [1e-4, 1.0]},
        i={"int_uniform": [1, 4]},
        c={"choice": "abcd"[:0] or ["a", "b", "c", "d"]},
        j={"int_log_uniform": [1, 64]},
    )
    points = [wide.sample(0, index).params for index in range(4000)]
    assert abs(sum(float(p["u"]) for p in points) / 4000 - 3) < 0.05  # type: ignore[arg-type]
    assert abs(sum(math.log10(float(p["l"])) for p in points) / 4000 + 2) < 0.1  # type: ignore[arg-type]
    for name, each in (("i", (1, 2, 3, 4)), ("c", "abcd")):
        counts = [sum(p[name] == value for p in points) for value in each]
        assert sum(counts) == 4000 and min(counts) > 880, (name, counts)
    products = [(float(p["u"]) - 3) * (math.log10(float(p["l"])) + 2) for p in points]  # type: ignore[arg-type]
    assert abs(sum(products) / 4000) < 0.06, "knobs are drawn apart: together they would give 0.67 in the mean"
    small = sum(int(p["j"]) <= 8 for p in points) / 4000  # type: ignore[arg-type]
    assert 0.5 < small < 0.65, "half of the logarithms of 0.5 to 64.5 lie below 5.7, 58 % below 8.5"


@settings(max_examples=50, deadline=None)
@given(values, values, st.integers(0, 100))
def test_a_widened_space_holds_the_points_of_the_narrow_one(old: list[int], more: list[int], seed: int) -> None:
    narrow = space(x={"choice": old}, y={"uniform": [0.2, 0.4], "when": {"x": old[0]}})
    wide = space(x={"choice": sorted(set(old) | set(more))}, y={"uniform": [0.0, 1.0], "when": {"x": old}})
    point = narrow.sample(seed, seed)
    assert narrow.contains(point)
    assert wide.contains(point) == (point.params["x"] == old[0]), "absent where the wide space wants it"


def test_contains_is_strict() -> None:
    nested = space(**NESTED)
    good = {"method": "full", "order": "a>b"}
    assert nested.contains(Point(good))
    for other in (
        {**good, "rank": 4},
        {"method": "full"},
        {**good, "method": "ful"},
        {**good, "order": "a"},
        {**good, "x": 1},
    ):
        assert not nested.contains(Point(other)), other


@pytest.mark.parametrize(
    ("condition", "value", "met"),
    [
        (1, 1.0, True),
        (True, 1, False),
        ([1, 2], 2, True),
        ("a", "b", False),
        ({"above": 0}, 0, False),
        ({"above": 0, "below": 1}, 0.5, True),
        ({"above": 0}, "x", False),
        ({"below": 2}, True, False),
    ],
)
def test_conditions(condition: Any, value: Any, met: bool) -> None:
    assert matches(condition, value) is met


def test_points_reach_the_configs(tmp_path: Path) -> None:
    study = a_study(
        tmp_path,
        space={
            "method": {"options": {"full": {}, "lora": {"continual.use_lora": True, "training.learning_rate": 3.0e-5}}},
            "continual.lora_rank": {"choice": [4, 32], "when": {"method": "lora"}},
            "order": {"stages_order": "permutations"},
            "first_lr": {"path": "stages.0.override.training.weight_decay", "choice": [0.0, 0.5]},
        },
        common={"training.micro_batch_size": 2},
    )
    point = Point({"method": "lora", "continual.lora_rank": 32, "order": "two>one", "first_lr": 0.5})
    assert point in list(study.space.grid())
    config = study.config_of(point, 7)
    assert (config.name, config.seed) == (f"s-{point.id}-s7", 7)
    assert (config.continual.use_lora, config.continual.lora_rank) == (True, 32)
    assert config.training.learning_rate == 3.0e-5 and config.training.micro_batch_size == 2
    assert [stage.name for stage in config.stages] == ["two", "one"]
    assert config.stages[1].override["training.weight_decay"] == 0.5, "paths name the base run's stages"
    assert config.stages[0].override == {}


def test_a_small_budget_reads_the_same_share_of_its_text(tmp_path: Path) -> None:
    knobs = {"training.token_budget": {"choice": [90_000, 450_000, 900_000]}}
    shares = [
        a_study(tmp_path, space=knobs).config_of(point, 0).data.fraction
        for point in a_study(tmp_path, space=knobs).space.grid()
    ]
    assert shares == [0.2, 1.0, 1.0], "never more than there is"
    larger = a_study(tmp_path, space=knobs, full_tokens=9_000_000)
    assert larger.config_of(next(larger.space.grid()), 0).data.fraction == 0.02
    off = a_study(tmp_path, space=knobs, simulated_epoching=False)
    assert off.config_of(next(off.space.grid()), 0).data.fraction == 1.0
