"""One exchange settles, asks for leases and reserves what the calls can cost; a dead worker leaves no lease behind."""

from __future__ import annotations

import asyncio

from nexus_ray.config.generators import BudgetConfig, ThrottleConfig
from nexus_ray.synthesis.budget import Budget
from nexus_ray.synthesis.generators.gate import LocalGate, Settled, Tokens
from nexus_ray.synthesis.throttle import Outcome, Throttle


def made(*, in_flight: int, **caps: float) -> LocalGate:
    budget = Budget(BudgetConfig.model_validate(caps), models=["m"], clock=lambda: 0.0)
    return LocalGate(Throttle(ThrottleConfig(max_in_flight=in_flight), clock=lambda: 0.0), model="m", budget=budget)


def test_leases_that_the_budget_denies_go_back() -> None:
    gate = made(in_flight=10, max_tokens=100)
    permit = asyncio.run(gate.exchange([], [Tokens(10, 30)] * 8, "a"))
    assert (permit.count, permit.exhausted) == (2, "") and gate.throttle.in_flight == 2
    done = Settled(Outcome("ok", permit.epoch), Tokens(10, 30), Tokens(10, 10))
    asyncio.run(gate.exchange([done], [], "a"))
    permit = asyncio.run(gate.exchange([], [Tokens(10, 30)] * 8, "b"))
    assert (
        (permit.count, gate.throttle.in_flight) == (1, 2) and gate.budget is not None and gate.budget.spent.tokens == 20
    )


def test_a_worker_that_died_is_forgotten_but_its_calls_count() -> None:
    gate = made(in_flight=4, max_requests=6)
    assert asyncio.run(gate.exchange([], [Tokens(1, 1)] * 4, "a")).count == 4
    assert asyncio.run(gate.exchange([], [Tokens(1, 1)] * 4, "b")).count == 0
    gate.forget("a")
    assert asyncio.run(gate.exchange([], [Tokens(1, 1)] * 4, "b")).count == 2
    assert gate.budget is not None and gate.budget.spent.requests == 4
