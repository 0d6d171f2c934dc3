"""Every point of a grid once, in an order that depends on the key alone, whatever the grid's size."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config.prompts import ParameterConfig
from nexus_ray.synthesis.combinations import Axis, Combinations, permuted

KEY = b"k" * 32


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 400), key=st.binary(min_size=1, max_size=32))
def test_a_permutation_visits_every_number_once(size: int, key: bytes) -> None:
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_a_permutation_of_more_than_64_bits() -> None:
    size = 10**40 + 7
    seen = {permuted(index, size, KEY) for index in range(500)}
    assert len(seen) == 500 and max(seen) < size
    assert sum(number > size // 2 for number in seen) in range(200, 300)


def _axes(*values: int, weights: dict[str, int] | None = None, choose: int | None = None) -> list[Axis]:
    axes = [Axis(f"p{n}", ParameterConfig(values=[f"v{v}" for v in range(count)])) for n, count in enumerate(values)]
    if weights:
        axes[0] = Axis("p0", ParameterConfig(values=axes[0].config.values, weights=weights))
    if choose:
        axes.append(Axis("list", ParameterConfig(values=list("abcde"), choose=choose)))
    return axes


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    weight=st.integers(1, 4),
    choose=st.sampled_from([None, 1, 3, 5]),
    key=st.one_of(st.none(), st.binary(min_size=1, max_size=8)),
)
def test_each_combination_once(counts: list[int], weight: int, choose: int | None, key: bytes | None) -> None:
    weights = {"v0": weight} if key is not None and weight > 1 else None
    grid = Combinations(_axes(*counts, weights=weights, choose=choose), key)
    drawn = [tuple(grid[draw].items()) for draw in range(grid.size)]
    assert len(set(drawn)) == grid.size
    with pytest.raises(IndexError):
        grid[grid.size]


def test_the_order_written_has_the_last_parameter_fastest() -> None:
    grid = Combinations(_axes(2, 2, choose=4), None)
    assert [tuple(grid[draw].values()) for draw in (0, 1, 5)] == [
        ("v0", "v0", ("a", "b", "c", "d")),
        ("v0", "v0", ("a", "b", "c", "e")),
        ("v0", "v1", ("a", "b", "c", "d")),
    ]


def test_draws_do_not_depend_on_what_was_drawn_before() -> None:
    axes = _axes(3, 40, weights={"v1": 5})
    forward, single = Combinations(axes, KEY), Combinations(axes, KEY)
    assert single[77] == [forward[draw] for draw in range(78)][77]
    assert Combinations(axes, b"other")[77] != single[77] or Combinations(axes, b"other")[78] != single[78]


def test_weights_are_chances() -> None:
    grid = Combinations(_axes(4, 1000, 1000, weights={"v1": 2, "v3": 4}), KEY)
    counts = Counter(grid[draw]["p0"] for draw in range(4000))
    for value, weight in {"v0": 1, "v1": 2, "v2": 1, "v3": 4}.items():
        assert abs(counts[value] - 500 * weight) < 4 * (500 * weight) ** 0.5
