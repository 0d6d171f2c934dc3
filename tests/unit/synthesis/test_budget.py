"""A budget is never exceeded by what is in flight, is exact, and goes on where it stopped."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.config.generators import BudgetConfig
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.synthesis.budget import UNITS, Account, Budget, Usage, exhausted

PRICES = {"m": {"input": 0.15, "output": 0.6}}


def made(saved: dict[str, Any] | None = None, now: list[float] | None = None, **caps: Any) -> Budget:
    config = BudgetConfig(prices=PRICES, **caps)
    return Budget(config, models=["m"], clock=lambda: now[0] if now else 0.0, saved=saved)


def call(budget: Budget, prompt: int, completion: int) -> Usage:
    return budget.usage("m", requests=1, prompt_tokens=prompt, completion_tokens=completion)


def test_money_is_exact() -> None:
    budget = made()
    assert call(budget, 1_000_000, 0).money == 0.15 and call(budget, 0, 1_000_000).units == 6 * UNITS // 10
    assert sum((call(budget, 1, 0).units for _ in range(1_000_000)), 0) == 15 * UNITS // 100


def test_what_is_in_flight_counts_until_it_is_known() -> None:
    budget = made(max_tokens=100)
    calls = [call(budget, 10, 30)] * 4
    allowed = budget.reserve(calls)
    assert (allowed.count, allowed.exhausted) == (2, "") and allowed.wait_s > 0
    assert budget.reserve(calls).count == 0
    budget.settle(calls[0], call(budget, 10, 5))
    assert budget.reserve(calls).count == 1, "15 used + 40 in flight + 40"
    for _ in range(2):
        budget.settle(calls[0], calls[0])
    allowed = budget.reserve(calls)
    assert (allowed.count, allowed.exhausted, budget.spent.tokens) == (0, "max_tokens=100", 95)
    assert "Raise budget.max_tokens and run again" in str(exhausted(allowed.exhausted))


@pytest.mark.parametrize(("caps", "fits"), [({"max_requests": 3}, 3), ({"max_money": 0.0001}, 2)])
def test_each_cap_stops(caps: dict[str, Any], fits: int) -> None:
    budget = made(**caps)
    one = call(budget, 100, 40)  # 0.000039
    assert budget.reserve([one] * 9).count == fits
    for _ in range(fits):
        budget.settle(one, one)
    assert budget.reserve([one]).exhausted.startswith(next(iter(caps)))


def test_seconds_go_on_over_sessions() -> None:
    now = [0.0]
    budget = made(now=now, max_seconds=10.0)
    now[0] = 4.0
    assert budget.reserve([call(budget, 1, 1)]).seconds_left == 6.0
    later = made(saved=json.loads(json.dumps(budget.state())), now=[50.0], max_seconds=4.0)
    assert later.seconds == 4.0 and later.reserve([Usage(1)]).exhausted == "max_seconds=4"
    assert made(saved=budget.state(), max_seconds=5.0).reserve([Usage(1)]).count == 1, "raised, it goes on"


def test_a_crash_forgets_nothing() -> None:
    budget = made(max_requests=5)
    budget.reserve([call(budget, 10, 10)] * 3, "worker")
    after = made(saved=json.loads(json.dumps(budget.state())), max_requests=5)
    assert after.spent == budget.reserved and after.reserve([Usage(1)] * 9).count == 2
    budget.forget("worker")
    assert budget.spent.requests == 3 and budget.reserved == Usage()


def test_overdraft_is_told() -> None:
    budget = made()
    one = call(budget, 10, 10)
    budget.reserve([one])
    budget.settle(one, call(budget, 10, 25))
    assert budget.overdrawn.completion_tokens == 15 and budget.spent.tokens == 35


def test_forecast_after_the_first_percent() -> None:
    now = [0.0]
    budget = made(now=now, max_money=0.05, max_requests=10_000)
    one = call(budget, 1000, 500)  # 0.00045
    for _ in range(12):
        budget.reserve([one])
        budget.settle(one, one)
    now[0] = 6.0
    assert budget.forecast(9, 1000) is None and budget.forecast(0, 10) is None
    found = budget.forecast(10, 1000)
    assert found is not None
    assert (found.requests, found.tokens, found.seconds) == (1200, 1_800_000, 600.0)
    assert found.money == pytest.approx(0.54) and found.exceeded == {"max_money": pytest.approx(0.05 / 0.54)}


@pytest.mark.parametrize(
    ("figures", "requests"),
    [
        ({"borrowed": 0}, 1000),
        ({"borrowed": 5000}, 5000),
        ({"borrowed": 5000, "target": 10**6, "accepted": 5100}, 5000),
        ({"borrowed": 5000, "target": 5150, "accepted": 5100}, 150),
        ({"borrowed": 0, "target": 300, "accepted": 50}, 600),
        ({"borrowed": 0, "target": 300, "accepted": 0}, 1000),
        ({"borrowed": 0, "target": 300, "accepted": 300}, 100),
    ],
)
def test_forecast_by_what_is_still_to_be_paid(figures: dict[str, Any], requests: int) -> None:
    """100 requests were paid; borrowed answers used nothing, and a target may come before the plan's end."""
    budget = made()
    one = call(budget, 10, 10)
    budget.reserve([one] * 100)
    for _ in range(100):
        budget.settle(one, one)
    borrowed = figures["borrowed"]
    found = budget.forecast(100 + borrowed, 2 * borrowed or 1000, **figures)
    assert found is not None and found.requests == requests


def test_a_budget_that_starts_again_is_told_by_its_holders() -> None:
    budget = made(max_requests=10)
    one = call(budget, 10, 10)
    for holder in ("a", "b"):
        budget.reserve([one] * 3, holder)
        budget.settle(one, one, holder)
    budget.forget("gone")
    again = made(saved=json.loads(json.dumps(budget.state())), max_requests=10)
    assert again.spent.requests == 6 and again.reserved == Usage()
    again.announce(Account(spent=one + one + one + one, reserved=one), "a")  # it went on after the state was saved
    assert (again.spent.requests, again.reserved.requests) == (4 + 3, 1)
    again.settle(one, one, "a")
    assert again.spent.requests == 8 and again.reserve([one] * 9, "b").count == 2
    assert json.loads(json.dumps(again.state()))["requests"] == 10


def test_calls_of_a_silent_holder_do_not_keep_a_budget_open() -> None:
    budget = made(max_requests=3)
    budget.reserve([call(budget, 1, 1)] * 3, "silent")
    again = made(saved=budget.state(), max_requests=3)
    assert again.reserve([Usage(1)], "a").exhausted == "max_requests=3"


def test_cost_per_accepted_row_includes_the_rejected() -> None:
    budget = made()
    one = call(budget, 1000, 500)
    for _ in range(10):
        budget.reserve([one])
        budget.settle(one, one)
    cost = budget.per_accepted(4)
    assert cost is not None and cost["money"] == pytest.approx(10 * 0.00045 / 4) and cost["requests"] == 2.5
    assert budget.per_accepted(0) is None


def test_faults_name_the_way_out() -> None:
    with pytest.raises(ConfigError, match="no price for other; add `other:"):
        Budget(BudgetConfig(max_money=1.0, prices=PRICES), models=["other"], clock=lambda: 0.0)
    good = made().state()
    holders = [{"a": good}, {"a": {**good, "requests": 1}}, {"a": {}}, ["a"]]
    made(saved={**good, "holders": holders[0]})
    for broken in (
        {},
        {"requests": "x"},
        {**good, "units": -1},
        {**good, "seconds": "x"},
        *({**good, "holders": one} for one in holders[1:]),
    ):
        with pytest.raises(DataError, match="saved budget"):
            made(saved=broken)


sizes = st.tuples(st.integers(0, 50), st.integers(0, 50))


@given(st.lists(st.tuples(st.lists(sizes, max_size=5), st.integers(0, 5), st.floats(0, 1)), max_size=30))
def test_no_cap_is_ever_exceeded(turns: list[tuple[list[tuple[int, int]], int, float]]) -> None:
    budget = made(max_requests=20, max_tokens=500, max_money=0.0001)
    flying: list[Usage] = []
    for sizes, ended, share in turns:
        wanted = [call(budget, *size) for size in sizes]
        flying += wanted[: budget.reserve(wanted).count]
        for one in flying[:ended]:
            used = call(budget, int(one.prompt_tokens * share), int(one.completion_tokens * share))
            budget.settle(one, used)
        flying = flying[ended:]
        worst = budget.spent + budget.reserved
        assert worst.requests <= 20 and worst.tokens <= 500 and worst.units <= UNITS // 10_000
        assert budget.reserved == sum(flying, Usage()) and not any(budget.overdrawn.values)
