"""Means over seeds, the Pareto front, its certainty, and the winner."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.errors import ConfigError
from nexus_ray.study.front import Front, Goal, Member, hypervolume, non_dominated, study_front
from nexus_ray.study.records import Objectives, Point, Report, Trial
from nexus_ray.study.replicates import common_tokens, grouped, mean_interval, resampled_means, seed_weights, t_quantile
from tests.study_views import study_trials, trial

VALUES = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=9)


def _member(front: Front, params: dict[str, object]) -> Member:
    return next(m for m in front.members if dict(m.replicated.point.params) == params)


@given(VALUES)
def test_the_front_is_what_nobody_beats(rows: list[tuple[int, ...]]) -> None:
    def beaten(a: tuple[int, ...]) -> bool:
        return any(all(y <= x for x, y in zip(a, b, strict=True)) and a != b for b in rows)

    assert non_dominated(np.array(rows, dtype=float)).tolist() == [not beaten(row) for row in rows]


@given(VALUES, st.permutations(range(3)))
def test_hypervolume_counts_the_cells_below_the_reference(rows: list[tuple[int, ...]], axes: list[int]) -> None:
    cells = sum(
        any(all(value <= at for value, at in zip(row, cell, strict=True)) for row in rows)
        for cell in itertools.product(range(4), repeat=3)
    )
    values = np.array(rows, dtype=float)[:, axes]
    assert hypervolume(values, np.full(3, 4.0)) == pytest.approx(cells)


def test_quantiles_of_student() -> None:
    for degrees, value in ((1, 12.706), (2, 4.303), (9, 2.262), (30, 2.042)):  # any table
        assert t_quantile(0.975, degrees) == pytest.approx(value, abs=2e-3)
    assert t_quantile(0.995, 2) == pytest.approx(9.925, abs=2e-3) and t_quantile(0.5, 3) == 0.0


def test_resampled_means_vary_as_the_unbiased_variance_of_the_mean() -> None:
    points = grouped(study_trials((0, 1, 2)))
    drawn = resampled_means(points, 40_000, seed=1)[:, 0, 0]
    values = points[0].values()[:, 0]
    assert drawn.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.03)


def test_points_of_equal_seeds_are_drawn_together_and_others_are_not() -> None:
    assert (seed_weights((0, 1, 2), 50, seed=0) == seed_weights((0, 1, 2), 50, seed=0)).all()
    assert not (seed_weights((0, 1, 2), 50, seed=0) == seed_weights((0, 1, 3), 50, seed=0)).all()
    common = [0.3 * seed for seed in range(3)]  # a seed moves both alike, so their order never changes
    trials = [trial({"a": a}, s, -2.0 + a * 0.01 + common[s], 0.2 - 0.01 * a) for a in (0, 1) for s in range(3)]
    front = study_front(trials, axes=("new", "forgetting"))
    assert _member(front, {"a": 1}).probability == 1.0 and _member(front, {"a": 0}).probability == 0.0
    assert front.winner.probability == 1.0
    assert front.winner.rivals[0].interval == pytest.approx((0.01, 0.01), abs=1e-9)  # paired
    assert front.winner.rivals[0].within_noise  # but within two standard deviations of either alone


def test_a_single_seed_has_no_interval_and_says_so() -> None:
    front = study_front(study_trials((4,)))
    assert all(m.probability is None and m.estimates["new"].interval is None for m in front.members)
    assert front.winner.probability is None and front.hypervolume_interval is None
    assert all(rival.within_noise is None and rival.interval is None for rival in front.winner.rivals)
    assert "one seed" in front.remarks[0] and "no interval" in front.remarks[0]
    mixed = study_front(
        [*study_trials((4,)), trial({"method": "x"}, 0, -1.0, 0.1), trial({"method": "x"}, 1, -1.1, 0.1)]
    )
    assert "18 of 19 points ran with one seed" in mixed.remarks[0]


def test_the_winner_keeps_the_bound_and_rivals_are_told_apart() -> None:
    trials = [
        *(trial({"a": "far"}, s, -1.8 + 0.001 * s, 0.9) for s in range(3)),
        *(trial({"a": "near"}, s, -2.0 + 0.001 * s, 0.3) for s in range(3)),
        *(trial({"a": "twin"}, s, -2.001 + 0.001 * s, 0.3) for s in range(3)),
        *(trial({"a": "low"}, s, -2.4 + 0.001 * s, 0.1) for s in range(3)),
    ]
    front = study_front(trials, Goal(max_forgetting=0.5))
    names = {m.id: m.replicated.point.params["a"] for m in front.members}
    assert names[front.winner.id] == "near" and front.winner.feasible
    assert [names[rival.id] for rival in front.winner.rivals] == ["twin", "low"]
    assert [rival.within_noise for rival in front.winner.rivals] == [True, False]
    hopeless = study_front(trials, Goal(max_forgetting=0.01)).winner
    assert names[hopeless.id] == "low" and not hopeless.feasible and not hopeless.rivals
    weighted = study_front(trials, Goal("weighted", weights={"new": 1.0, "forgetting": 3.0}))
    assert names[weighted.winner.id] == "low"


def test_only_finished_trials_are_candidates() -> None:
    trials = [*study_trials((0,)), trial({"a": 1}, 0, 5.0, 0.0, status="stopped"), Trial(Point({"a": 2}), 0, "failed")]
    trials += [trial({"a": 3}, seed, 5.0, 0.0, status="paused") for seed in (0, 1)]
    front = study_front(trials)
    stopped = "1 trials were stopped early; their points are no candidates here."
    assert len(front.members) == 18 and stopped in front.remarks
    assert "2 trials are paused at a rung, short of their budgets, and are no candidates here." in front.remarks
    assert common_tokens(trials) == 250_000 and len(grouped(trials, tokens=250_000)) == 20


def test_a_point_that_one_of_its_seeds_stopped_does_not_win_by_another() -> None:
    trials = [*study_trials((0, 1)), trial({"a": 1}, 0, 5.0, 0.0), trial({"a": 1}, 1, 5.0, 0.0, status="stopped")]
    assert {"a": 1} not in [member.replicated.point.params for member in study_front(trials).members]
    with pytest.raises(ConfigError, match="no trial of this study has finished"):
        study_front(trials[-2:])


def test_a_winner_that_failed_with_a_seed_is_said_to_have() -> None:
    failed = dataclasses.replace(trial({"a": 1}, 1, 5.0, 0.0), status="failed")
    front = study_front([*study_trials((0, 1)), trial({"a": 1}, 0, 5.0, 0.0), failed])
    assert front.winner.id == failed.point.id
    assert "The winner failed with seed 1 and is judged by its other seeds alone." in front.remarks


def test_wrong_axes_and_empty_studies_are_refused() -> None:
    with pytest.raises(ConfigError, match="no trial of this study has finished"):
        study_front([Trial(Point({"a": 2}), 0, "failed")])
    with pytest.raises(ConfigError, match="axes="):
        study_front(study_trials(), axes=("new",))
    with pytest.raises(ConfigError, match="reference="):
        study_front(study_trials(), axes=("new", "cost"), reference=(1.0,))


def test_a_value_that_is_not_finite_is_left_out() -> None:
    bad = Trial(Point({"a": 1}), 0, "finished", (Report(1, 1, Objectives(float("nan"), 0.1, 1.0)),))
    assert grouped([bad]) == [] and mean_interval(np.array([1.0])) is None
