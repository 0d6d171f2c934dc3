"""The judge against brute force: a sure place is one that no score of the missing points can take."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config.study import StudyConfig
from nexus_ray.study.judge import Judge, Rung
from nexus_ray.study.records import Objectives


def judge(stopping: dict[str, Any], objective: dict[str, Any] | None = None) -> Judge:
    config = StudyConfig.model_validate(
        {
            "name": "s",
            "base": "run.yaml",
            "space": {"a": {"choice": [1]}},
            "stopping": stopping,
            "objective": objective or {"kind": "weighted"},
        }
    )
    return Judge(config.stopping, config.objective)


def rung(merits: list[int], missing: int) -> Rung:
    return Rung(0, {f"p{place}": (1, float(merit)) for place, merit in enumerate(merits)}, len(merits) + missing)


def halving(merits: dict[str, float], eta: int) -> set[str]:
    """Synchronous successive halving, written out: the best 1 / eta, the earlier of equals first."""
    order = sorted(merits, key=lambda name: (-merits[name], list(merits).index(name)))
    return set(order[: max(1, len(order) // eta)])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), max_size=7), st.integers(0, 3), st.integers(2, 4))
def test_sure_places_are_those_that_nothing_can_take(merits: list[int], missing: int, eta: int) -> None:
    known = {f"p{place}": float(merit) for place, merit in enumerate(merits)}
    outcomes = []
    for scores in itertools.product([-1.0, 0.5, 1.5, 2.5, 3.5, 9.0], repeat=missing):
        late = {f"late{place}": score for place, score in enumerate(scores)}
        if known or late:
            outcomes.append(halving({**known, **late}, eta))
    always = set.intersection(*outcomes) & set(known) if outcomes else set()
    asha = judge({"rule": "asha", "eta": eta})
    assert set(asha.sure(rung(merits, missing))) == always


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(2, 4))
def test_with_none_missing_it_is_successive_halving(merits: list[int], eta: int) -> None:
    asha = judge({"rule": "asha", "eta": eta})
    full = rung(merits, 0)
    assert set(asha.sure(full)) == halving({name: merit for name, (_, merit) in full.merits.items()}, eta)
    assert asha.likely(full) == asha.sure(full)[: len(merits) // eta]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(1, 4))
def test_the_median_rule(merits: list[int], grace: int) -> None:
    median = judge({"rule": "median", "rungs": [0.5], "grace": grace})
    for count in range(1, len(merits) + 1):
        *others, own = merits[:count]
        expected = "continued"
        if len(others) >= grace and sum(other > own for other in others) > len(others) / 2:
            expected = "stopped"
        assert median.arrival(rung(merits[:count], 3), f"p{count - 1}").kind == expected


def test_merit_under_a_bound_of_forgetting() -> None:
    rule = judge({"rule": "none"}, {"kind": "new_under_forgetting", "max_forgetting": 0.5, "rung_slack": 0.1})

    def merit(new: float, forgetting: float, *, at_rung: bool = False) -> tuple[int, float]:
        return rule.merit(Objectives(new, forgetting, 0.0), at_rung=at_rung)

    assert merit(-2.0, 0.5) > merit(-2.1, 0.1) > merit(-1.0, 0.51) > merit(-0.5, 0.6)
    assert merit(-1.0, 0.54, at_rung=True) > merit(-1.1, 0.1, at_rung=True) > merit(-1.0, 0.56, at_rung=True)


def test_merit_by_weights() -> None:
    weights = {"new": 2.0, "forgetting": 3.0, "cost": 0.5}
    rule = judge({"rule": "none"}, {"kind": "weighted", "weights": weights})
    assert rule.merit(Objectives(-1.0, 0.5, 2e15), at_rung=False) == (1, -2.0 - 1.5 - 1.0)


@pytest.mark.parametrize(
    ("stopping", "shares"),
    [
        ({"rule": "none"}, []),
        ({"rule": "asha"}, [1 / 9, 1 / 3]),
        ({"rule": "asha", "eta": 2, "min_share": 0.125}, [0.125, 0.25, 0.5]),
        ({"rule": "asha", "min_share": 0.3}, [0.3, 0.9]),
        ({"rule": "asha", "rungs": [0.2, 0.6]}, [0.2, 0.6]),
        ({"rule": "median"}, [0.25, 0.5]),
    ],
)
def test_where_the_rungs_are(stopping: dict[str, Any], shares: list[float]) -> None:
    assert [float(share) for share in judge(stopping).shares] == pytest.approx(shares)


def test_a_signal_above_its_limit_or_no_number_is_an_alarm() -> None:
    rule = judge({"rule": "median", "max_signal": {"grad_norm": 5.0}})
    assert rule.alarm({"grad_norm": 5.0, "other": 9.0}) is None and rule.alarm({}) is None
    for value in (5.1, float("nan")):
        assert "grad_norm" in str(rule.alarm({"grad_norm": value}))
