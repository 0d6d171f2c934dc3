"""Searchers are functions of the record: what they propose next does not depend on how the record came about."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config.study import Knob
from nexus_ray.errors import ConfigError
from nexus_ray.study import optuna_search
from nexus_ray.study.judge import Judge
from nexus_ray.study.records import Objectives, Point
from nexus_ray.study.search import Grid, Random, Searcher, Seen, searcher
from nexus_ray.study.space import Space
from tests.studies import Killed, Lab, Log, a_study

KNOBS: dict[str, dict[str, Any]] = {
    "method": {"options": {"full": {}, "lora": {"continual.use_lora": True}}},
    "continual.lora_rank": {"int_log_uniform": [2, 64], "when": {"method": "lora"}},
    "training.learning_rate": {"log_uniform": [1e-4, 1e-2]},
    "continual.replay_ratio": {"choice": [0.0, 0.1, 0.3]},
}


def space(knobs: dict[str, dict[str, Any]] = KNOBS) -> Space:
    return Space.of({name: Knob.model_validate(knob) for name, knob in knobs.items()})


def value(point: Point) -> Objectives:
    """Best at a learning rate of 1e-3 and a ratio of 0.1; LoRA is bad."""
    params: dict[str, Any] = {
        "training.learning_rate": 1.0,
        "continual.replay_ratio": 0.0,
        "method": "",
        **point.params,
    }
    distance = abs(math.log10(params["training.learning_rate"]) + 3) + 3 * abs(params["continual.replay_ratio"] - 0.1)
    return Objectives(-distance - 2 * (params["method"] == "lora"), 0.5 - params["continual.replay_ratio"], 1.0)


def play(search: Searcher, count: int) -> list[Seen]:
    history: list[Seen] = []
    while len(history) < count and (proposal := search.ask(history)):
        levels = (value(proposal.point),)
        history.append(Seen(proposal.point, proposal.index, levels, True, proposal.note))
    return history


def test_the_grid_leaves_out_what_is_known() -> None:
    small = space({"a": {"choice": [1, 2]}, "b": {"choice": [1, 2]}})
    grid = Grid(small)
    history = play(grid, 9)
    assert [seen.point for seen in history] == list(small.grid()) and grid.total(history) == 4
    wider = Grid(space({"a": {"choice": [0, 1, 2]}, "b": {"choice": [1, 2]}}))
    added = play(wider, 0) or wider.ask(history)
    assert added is not None and added.point.params == {"a": 0, "b": 1}  # type: ignore[union-attr]
    assert wider.total(history) == 6 and wider.total([]) == 6


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 50), st.integers(1, 12), st.integers(1, 12))
def test_more_trials_keep_the_first_ones(seed: int, few: int, more: int) -> None:
    first = [seen.point for seen in play(Random(space(), few, seed), 99)]
    assert [seen.point for seen in play(Random(space(), few + more, seed), 99)][:few] == first


def test_random_points_never_repeat_and_end_with_the_space() -> None:
    tiny = space({"a": {"choice": [1, 2, 3]}, "b": {"int_uniform": [1, 2], "when": {"a": 3}}})
    search = Random(tiny, 50, 0)
    history = play(search, 99)
    assert {seen.point.id for seen in history} == {point.id for point in tiny.every()} and len(history) == 4
    assert search.total([]) == search.total(history) == 4
    scarce = Random(space({"a": {"choice": list(range(3000))}, "b": {"choice": [0]}}), 3000, 1)
    most = [Seen(Point({"a": a, "b": 0}), 5 * a) for a in range(2999)]
    last = scarce.ask(most)
    assert last is not None and last.point.params["a"] == 2999, "found although nearly every sample is known"


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_optunas_proposals_are_a_function_of_the_history(tmp_path: Path, sampler: str) -> None:
    search = {"kind": "optuna", "trials": 30, "startup": 5, "population": 6, "sampler": sampler, "seed": 2}
    study = a_study(tmp_path, space=KNOBS, search=search)
    asked = play(searcher(study.config, study.space), 18)
    assert len({seen.point.id for seen in asked}) == 18
    assert all(study.space.contains(seen.point) for seen in asked)
    fresh = searcher(study.config, study.space)
    for count in (0, 3, 6, 11, 17):
        proposal = fresh.ask(asked[:count])
        assert proposal is not None
        assert (proposal.point, proposal.note) == (asked[count].point, asked[count].note), f"after {count} points"
    if sampler == "nsga2":
        generations = [seen.note[key] for seen in asked for key in seen.note if key.endswith("generation")]
        assert generations == sorted(generations) and max(generations) == 2, "generations go on through the record"


def test_tpe_finds_more_than_chance(tmp_path: Path) -> None:
    def best(kind: dict[str, Any]) -> float:
        study = a_study(tmp_path, space=KNOBS, search=kind)
        return max(value(seen.point).new for seen in play(searcher(study.config, study.space), 40)[10:])

    tpe = [best({"kind": "optuna", "trials": 40, "seed": seed}) for seed in range(3)]
    chance = [best({"kind": "random", "trials": 40, "seed": seed}) for seed in range(3)]
    assert sum(tpe) > sum(chance)


def test_a_bound_of_forgetting_is_a_constraint(tmp_path: Path) -> None:
    def late(bound: float) -> list[float]:
        objective = {"kind": "new_under_forgetting", "max_forgetting": bound}
        search = {"kind": "optuna", "trials": 40, "startup": 8}
        study = a_study(tmp_path, space=KNOBS, search=search, objective=objective)
        return [value(seen.point).forgetting for seen in play(searcher(study.config, study.space), 36)[12:]]

    kept = [forgetting <= 0.25 for forgetting in late(0.25)]
    assert sum(kept) > len(kept) / 2, "a third by chance, and the score alone would lead to a ratio of 0.1"
    assert sum(kept) > sum(forgetting <= 0.25 for forgetting in late(9.0))


@pytest.mark.parametrize("slack", [0.0, 0.5])
def test_the_constraint_at_a_rung_is_as_loose_as_the_judge(tmp_path: Path, slack: float) -> None:
    import optuna

    objective = {"kind": "new_under_forgetting", "max_forgetting": 0.2, "rung_slack": slack}
    search = {"kind": "optuna", "trials": 30, "startup": 1}
    study = a_study(tmp_path, space=KNOBS, search=search, objective=objective)
    proposer = searcher(study.config, study.space)
    assert isinstance(proposer, optuna_search.Optuna)
    judge = Judge(study.config.stopping, study.config.objective)
    point = study.space.sample(0, 0)
    for forgetting in (0.1, 0.2, 0.25, 0.3, 0.35):
        scores = Objectives(-1.0, forgetting, 1.0)
        for levels, at_rung in (((scores, None), True), ((scores, scores), False)):
            [trial] = proposer._trials(optuna, [Seen(point, 0, levels)])
            kept = all(broken <= 0 for broken in trial.constraints.values())
            assert kept == (judge.merit(scores, at_rung=at_rung)[0] == 1), (forgetting, at_rung)


def test_points_are_compared_at_one_rung(tmp_path: Path) -> None:
    search = {"kind": "optuna", "trials": 30, "startup": 3}
    optuna = searcher(a_study(tmp_path, space=KNOBS, search=search).config, space())
    assert isinstance(optuna, optuna_search.Optuna)
    score = Objectives(-1.0, 0.1, 1.0)

    def seen(*levels: Objectives | None) -> Seen:
        return Seen(Point({}), 0, levels)

    assert optuna.level([]) == 0
    assert optuna.level([seen(score, None, None)] * 5) == 0
    assert optuna.level([seen(score, score, None)] * 3 + [seen(score, None, None)]) == 1
    assert optuna.level([seen(score, score, score)] * 2 + [seen(score, score, None)]) == 1


def test_a_weighted_objective_is_what_optuna_follows(tmp_path: Path) -> None:
    """Equal histories, other weights: other proposals; where only cost counts, the cheap end."""

    def taken(**weights: float) -> list[float]:
        search = {"kind": "optuna", "trials": 30, "startup": 6}
        objective = {"kind": "weighted", "weights": {"new": 0.0, "forgetting": 0.0, **weights}}
        study = a_study(tmp_path, space=KNOBS, search=search, objective=objective)
        points = [seen.point for seen in play(searcher(study.config, study.space), 30)]
        return [value(point).forgetting for point in points[10:]]

    new, forgetting = taken(new=1.0), taken(forgetting=1.0)
    assert new != forgetting and sum(forgetting) < sum(new)


def test_failed_and_running_points_and_a_widened_space(tmp_path: Path) -> None:
    search = {"kind": "optuna", "trials": 30, "startup": 2}
    narrow = a_study(tmp_path, space=KNOBS, search=search)
    history = play(searcher(narrow.config, narrow.space), 6)
    history[2] = Seen(history[2].point, 2, (None,), True, history[2].note)
    history[5] = Seen(history[5].point, 5, (None,), False, history[5].note)
    wide = {**KNOBS, "continual.replay_ratio": {"choice": [0.0, 0.1, 0.2, 0.3]}}
    wide_study = a_study(tmp_path, space=wide, search=search)
    proposal = searcher(wide_study.config, wide_study.space).ask(history)
    assert proposal is not None and wide_study.space.contains(proposal.point)


def test_a_study_with_optuna_resumes_as_if_undisturbed(tmp_path: Path) -> None:
    search = {"kind": "optuna", "trials": 9, "startup": 3}
    stopping = {"rule": "asha", "eta": 3, "rungs": [0.3, 0.6]}
    study = a_study(tmp_path, space=KNOBS, search=search, stopping=stopping)

    def score(point: Point, seed: int, share: float) -> Objectives:
        return value(point)

    whole = Log()
    ended = Lab(study, score, steps=4).run(whole)
    assert len(ended.trials()) == 9
    for room in range(3, len(whole.events), 7):
        log, lab = Log(room=room), Lab(study, score, steps=4)
        with pytest.raises(Killed):
            lab.run(log)
        log.room = None
        assert lab.run(log).trials() == ended.trials()


def test_without_optuna_there_is_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    study = a_study(tmp_path, space=KNOBS, search={"kind": "optuna", "trials": 3})
    with pytest.raises(ConfigError, match=r"pip install 'optuna>=5'.*kind: random"):
        searcher(study.config, study.space).ask([])
