"""The mixture never drifts: after any number of sequences every count is within one of its exact share."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.stream.mixture import MAX_CYCLE, cycle_ranks, fair_cycle, stage_counts

counts = st.lists(st.integers(1, 200), min_size=1, max_size=8).map(tuple)


@given(counts)
def test_every_prefix_of_a_cycle_is_within_one_of_the_exact_share(counts: tuple[int, ...]) -> None:
    order = fair_cycle(counts)
    length = sum(counts)
    seen = np.eye(len(counts))[order].cumsum(axis=0)
    exact = np.arange(1, length + 1)[:, None] * np.asarray(counts) / length
    assert np.abs(seen - exact).max() < 1
    assert tuple(seen[-1].astype(int)) == counts


@given(counts)
def test_ranks_count_earlier_occurrences_of_the_same_domain(counts: tuple[int, ...]) -> None:
    order, ranks = fair_cycle(counts), cycle_ranks(counts)
    for domain in range(len(counts)):
        assert ranks[order == domain].tolist() == list(range(counts[domain]))


@given(
    st.decimals("0.001", "0.999", places=3).map(lambda d: Fraction(str(d))),
    st.lists(st.integers(1, 10**9), min_size=1, max_size=5),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
@settings(deadline=None)
def test_the_replay_ratio_is_kept_exactly_whatever_the_sizes_of_the_sources(
    ratio: Fraction, replay: list[int], new: list[int]
) -> None:
    new_weights = {f"new{i}": Fraction(w) for i, w in enumerate(new)}
    replay_weights = {f"old{i}": Fraction(w) for i, w in enumerate(replay)}
    counts, cycle = stage_counts(new_weights, replay_weights, ratio)
    assert sum(counts.values()) == cycle <= MAX_CYCLE
    replayed = sum(count for name, count in counts.items() if name.startswith("old"))
    few = len(replay) > ratio * cycle or len(new) > (1 - ratio) * cycle
    assert few or Fraction(replayed, cycle) == ratio
    assert min(counts.values()) >= 1


def test_one_percent_of_replay_is_one_in_every_hundred() -> None:
    counts, cycle = stage_counts({"new": Fraction(1)}, {"old": Fraction(1)}, Fraction("0.01"))
    assert (counts, cycle) == ({"new": 99, "old": 1}, 100)


def test_without_replay_sources_the_ratio_is_zero() -> None:
    assert stage_counts({"new": Fraction(1)}, {}, Fraction("0.25")) == ({"new": 1}, 1)


def test_a_ratio_of_one_leaves_no_new_domain() -> None:
    assert stage_counts({"new": Fraction(1)}, {"old": Fraction(3)}, Fraction(1)) == ({"old": 1}, 1)
