"""Effects of knobs, in grids and in searches, against known truths."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from nexus_ray.study.effects import Effects, KnobEffect, crossed_interval, knob_effects
from nexus_ray.study.front import Goal, study_front
from nexus_ray.study.records import Trial
from nexus_ray.study.suggest import field_accepts, suggestions
from tests.study_views import METHOD, RANK, RATIO, WARMUP, study_trials, trial, truth


def _knob(effects: Effects | None, name: str) -> KnobEffect:
    assert effects is not None
    return next(knob for knob in effects.knobs if knob.knob == name)


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_grid_gives_marginal_means_with_the_rank_among_lora_alone(seeds: tuple[int, ...]) -> None:
    effects = knob_effects(study_trials(seeds), "new")
    assert effects is not None and effects.method == "marginal means" and effects.tokens is None
    method, rank, warmup = (_knob(effects, knob) for knob in (METHOD, RANK, WARMUP))
    assert method.size == pytest.approx(0.35 - 0.06, abs=0.005) and method.clear
    assert rank.among == 12 and rank.size == pytest.approx(0.072, abs=0.006) and rank.clear
    assert rank.contrast is not None and rank.contrast[0] < 0.072 < rank.contrast[1]
    assert warmup.clear is False and warmup.size < 0.005
    assert [level.value for level in _knob(effects, RATIO).levels] == [0.0, 0.05, 0.25]


@pytest.mark.parametrize("count", [18, 30])
def test_a_search_gives_an_additive_model_that_finds_the_same(count: int) -> None:
    generator = np.random.default_rng(3)
    trials: list[Trial] = []
    for _ in range(count):
        ratio, warmup = float(generator.uniform(0, 0.25)), int(generator.integers(0, 50))
        params: dict[str, object] = {METHOD: "full", RATIO: ratio, WARMUP: warmup}
        if generator.uniform() < 0.6:
            params = {**params, METHOD: "lora", RANK: int(generator.choice([4, 8, 16, 32]))}
        new, lost = truth(params)  # type: ignore[arg-type]
        trials.append(trial(params, 0, new + 0.004 * generator.normal(), lost))  # type: ignore[arg-type]
    effects = knob_effects(trials, "new")
    assert effects is not None and effects.method == "additive model"
    assert effects.explained is not None and effects.explained > 0.8
    rank, ratio_effect = _knob(effects, RANK), _knob(effects, RATIO)
    assert rank.clear and rank.size == pytest.approx(0.006 * 28, rel=0.35) and rank.among < count
    assert ratio_effect.clear and ratio_effect.levels[0].mean > ratio_effect.levels[-1].mean
    assert _knob(effects, WARMUP).clear is False
    mean_rank = np.mean([float(t.point.params[RANK]) for t in trials if RANK in t.point.params])  # type: ignore[arg-type]
    assert _knob(effects, METHOD).size == pytest.approx(0.35 - 0.006 * mean_rank, rel=0.12)
    assert (rank.importance or 0) > (_knob(effects, WARMUP).importance or 0)


@pytest.mark.parametrize("lost", [0.0, 0.1])
def test_an_objective_that_never_changes_has_flat_curves_and_says_so(lost: float) -> None:
    """Forgetting of a first stage, say; nine points of ten, so that they are no grid."""
    params = [{RATIO: ratio, WARMUP: warmup} for ratio in (0.0, 0.1, 0.2) for warmup in (1, 2, 3)][:-1]
    trials = [trial(p, 0, -2.0 - float(p[RATIO]), lost) for p in params]
    effects = knob_effects(trials, "forgetting")
    assert effects is not None and effects.method == "additive model" and effects.explained is None
    assert [knob.size for knob in effects.knobs] == [0.0, 0.0] and "no knob changes it" in effects.remarks[-1]
    assert {level.mean for knob in effects.knobs for level in knob.levels} == {lost}
    assert all(knob.contrast is None and knob.importance is None for knob in effects.knobs)


def test_noise_alone_explains_nothing() -> None:
    generator = np.random.default_rng(0)
    trials = [
        trial({"a": float(a), "b": float(b)}, 0, float(generator.normal()), 0.1)
        for a, b in generator.uniform(size=(20, 2))
    ]
    effects = knob_effects(trials, "new")
    assert effects is not None and "no effect can be read" in effects.remarks[0]
    assert not any(knob.clear for knob in effects.knobs)


def test_stopped_trials_are_compared_where_all_have_reports() -> None:
    effects = knob_effects(study_trials(stop_below=-2.2), "new")
    assert effects is not None and effects.tokens == 250_000 and effects.method == "marginal means"
    assert _knob(effects, RANK).size == pytest.approx(0.072, abs=0.006)


def test_a_single_knob_at_one_seed_has_no_interval() -> None:
    effects = knob_effects([trial({"a": a}, 0, -2.0 + a, 0.1) for a in (0.0, 0.1)], "new")
    assert effects is not None and effects.knobs[0].clear is None and effects.knobs[0].levels[0].interval is None
    assert knob_effects([trial({"a": 1}, 0, -2.0, 0.1)], "new") is None


def test_crossed_intervals_cover_and_hardly_more() -> None:
    generator, hits = np.random.default_rng(0), 0
    for _ in range(600):
        table = 1.0 + 0.3 * generator.normal(size=(5, 1)) + 0.2 * generator.normal(size=(1, 3))
        low, high = crossed_interval(table + 0.1 * generator.normal(size=(5, 3))) or (0, 0)
        hits += low <= 1.0 <= high
    assert 0.93 <= hits / 600 <= 0.995


def test_what_to_try_next_says_why() -> None:
    trials = study_trials()
    front = study_front(trials, Goal(max_forgetting=0.5))
    effects = [found for metric in ("new", "forgetting") if (found := knob_effects(trials, metric))]  # type: ignore[arg-type]
    found = suggestions(front, effects)
    by_knob = {item.knob: item for item in found}
    assert by_knob[RATIO].values == (0.5,) and "highest value tried" in by_knob[RATIO].reason
    assert "Fix continual.warmup_steps" in by_knob[WARMUP].action and "covers zero" in by_knob[WARMUP].reason
    assert "within the seed noise" in found[0].reason and "replay_ratio=0.25" in found[0].action
    inner = suggestions(study_front(trials, Goal(max_forgetting=0.7)), effects)
    gap = next(item for item in inner if item.knob == RATIO)
    assert 0.05 < float(gap.values[0]) < 0.25  # type: ignore[arg-type]
    assert "next to the winner" in gap.reason
    single = study_front([t for t in trials if t.seed == 0], Goal(max_forgetting=0.01))
    reasons = " ".join(item.reason + item.action for item in suggestions(single, []))
    assert "one seed" in reasons and "raise the bound" in reasons


def test_a_value_that_the_run_refuses_is_not_suggested() -> None:
    """The winner has a ratio of 0.6, the highest: 1.2 is no ratio, so what lies between is all there is to try."""
    trials = [
        trial({RATIO: ratio, WARMUP: warmup}, seed, -2.0 + ratio + 0.001 * seed, 0.1)
        for ratio in (0.0, 0.05, 0.6)
        for warmup in (1, 2)
        for seed in (0, 1, 2)
    ]
    effects = [found for found in [knob_effects(trials, "new")] if found is not None]
    front = study_front(trials, Goal(max_forgetting=0.5))

    def tried(**accepts: Any) -> list[Any]:
        return [value for item in suggestions(front, effects, **accepts) if item.knob == RATIO for value in item.values]

    assert tried(accepts=lambda knob, value: True) == [1.2]
    [between] = tried()
    assert 0.05 < between < 0.6
    assert tried(accepts=lambda knob, value: False) == []


def test_a_value_is_held_against_the_field_of_its_knob() -> None:
    assert field_accepts(RATIO, 1.0) and not field_accepts(RATIO, 1.2)
    assert field_accepts(RANK, 8) and not field_accepts(RANK, 0.5) and not field_accepts(WARMUP, -1)
    assert field_accepts(METHOD, 3) and field_accepts("stages.0.override.training.seq_len", 0), "nothing is known"


def test_effects_hold_no_reference_to_order() -> None:
    trials = study_trials()
    shuffled = [trials[i] for i in np.random.default_rng(1).permutation(len(trials))]
    first, second = (knob_effects(part, "new") for part in (trials, shuffled))
    assert first is not None and second is not None
    for knob in first.knobs:
        assert _knob(second, knob.knob).size == pytest.approx(knob.size)
    assert dataclasses.asdict(first).keys() == dataclasses.asdict(second).keys()
