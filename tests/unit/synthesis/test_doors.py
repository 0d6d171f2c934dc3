"""The doors of a job: one gate for an endpoint whatever roles ask it, and nothing lost when they start again."""

from __future__ import annotations

import asyncio
import json
import types
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from ray.exceptions import ActorUnavailableError

from nexus_ray.config.generators import BudgetConfig, Generator
from nexus_ray.errors import ConfigError, SynthesisError
from nexus_ray.storage import Storage
from nexus_ray.synthesis import crew, job
from nexus_ray.synthesis.budget import Account
from nexus_ray.synthesis.crew import BUDGET_FILE, Doors, _RemoteDoor, start_doors
from nexus_ray.synthesis.generators.gate import Permit, Settled, Tokens
from nexus_ray.synthesis.job import _Driver
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.setup import open_job
from nexus_ray.synthesis.throttle import Outcome
from tests.jobs import job_config

ONE = Tokens(10, 10)
TEACHER = {"kind": "openai", "model": "m", "base_url": "http://127.0.0.1:1/v1"}
SERVED = {"kind": "served", "model": "m", "server": {"command": ["serve", "{port}"]}}


def doors(folder: Path, session: str = "s", *, judge: dict[str, Any] | None = None, **settings: Any) -> Doors:
    """Doors of a job whose generator has the `settings`; a `budget` among them is its budget."""
    caps = BudgetConfig.model_validate(settings.pop("budget", {}))
    sections = {"generator": {**TEACHER, **settings}, **({"judge": judge} if judge else {})}
    roles = {role: TypeAdapter(Generator).validate_python(data) for role, data in sections.items()}
    return Doors(roles, caps, None, folder=Storage(str(folder)), session=session)


def ask(
    found: Doors, wanted: int, role: str = "generator", holder: str = "w", account: Account | None = None
) -> Permit:
    return asyncio.run(found.exchange(role, [], [ONE] * wanted, holder, account or Account()))


def ended(permit: Permit, kind: Any = "ok") -> Settled:
    return Settled(Outcome(kind, permit.epoch), ONE, Tokens(10, 4))


# --- which gate ---------------------------------------------------------------------------------------------------


def test_roles_at_one_endpoint_share_its_throttle(tmp_path: Path) -> None:
    judge = {**TEACHER, "throttle": {"max_in_flight": 8}}
    found = doors(tmp_path, judge=judge, throttle={"max_in_flight": 64})
    assert ask(found, 100).count == 8, "the smaller limit of both"
    assert ask(found, 100, "judge").count == 0
    permit = Permit(0, 0)
    refused = [ended(permit, "busy")] * 8
    asyncio.run(found.exchange("generator", refused, [], "w", Account()))
    assert ask(found, 1, "judge").wait_s > 1.0, "a refusal of the one makes the other wait, too"


def test_roles_at_one_endpoint_compete_like_two_workers(tmp_path: Path) -> None:
    found = doors(tmp_path, judge=TEACHER, throttle={"max_in_flight": 64})
    permit = ask(found, 100)
    assert ask(found, 100, "judge").count == 0
    again = asyncio.run(found.exchange("generator", [ended(permit)] * 64, [ONE] * 100, "w", Account()))
    assert again.count == 32 and ask(found, 100, "judge").count == 32


def test_other_endpoints_and_models_have_their_own(tmp_path: Path) -> None:
    for number, other in enumerate(({"model": "n"}, {"base_url": "http://127.0.0.1:2/v1"})):
        found = doors(tmp_path / str(number), judge={**TEACHER, **other})
        assert ask(found, 100).count == ask(found, 100, "judge").count == 64


def test_a_served_model_has_a_gate_for_each_worker(tmp_path: Path) -> None:
    found = doors(tmp_path, judge=SERVED, base_url="http://127.0.0.1:9/v1")
    assert [ask(found, 100, "judge", holder).count for holder in ("a", "b")] == [64, 64]
    refused = [ended(Permit(0, 0), "busy")] * 64
    asyncio.run(found.exchange("judge", refused, [], "a", Account()))
    asyncio.run(found.exchange("judge", [ended(Permit(0, 0))] * 64, [], "b", Account()))
    assert ask(found, 100, "judge", "a").count == 0 and ask(found, 100, "judge", "b").count == 64
    report = asyncio.run(found.report(1, 2, 0))
    assert report["in_flight"]["judge"] == {"limit": 48 + 64, "lowest": 48, "now": 64}
    asyncio.run(found.forget("a"))
    assert asyncio.run(found.report(1, 2, 0))["in_flight"]["judge"]["limit"] == 64


# --- starting again -----------------------------------------------------------------------------------------------


class Actor:
    """A handle of doors that may be lost before an exchange is done, or before its answer has arrived."""

    def __init__(self, make: Callable[[], Doors]) -> None:
        self.make = make
        self.doors = make()
        self.lose: list[str] = []
        """What happens to the next exchanges: "", "before" or "after"."""
        self.exchange = types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=self._exchange))

    def _exchange(self, *args: Any) -> Awaitable[Permit]:
        return self._exchanged(*args)

    async def _exchanged(self, *args: Any) -> Permit:
        what = self.lose.pop(0) if self.lose else ""
        permit = await self.doors.exchange(*args) if what != "before" else None
        if what:
            self.doors = self.make()
            raise ActorUnavailableError("killed", None)
        assert permit is not None
        return permit


def exchange(door: _RemoteDoor, settled: Sequence[Settled], wanted: int, holder: str = "w") -> Permit:
    return asyncio.run(door.exchange(settled, [ONE] * wanted, holder))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "RETRY_S", 0.0)


@pytest.mark.parametrize("lost", ["before", "after"])
@pytest.mark.parametrize("save_s", [0.0, 1e9])
def test_an_exchange_that_was_lost_is_had_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, save_s: float
) -> None:
    """Whether the state was saved before or after it, or never."""
    monkeypatch.setattr(crew, "SAVE_S", save_s)
    actor = Actor(lambda: doors(tmp_path, throttle={"max_in_flight": 8}))
    door = _RemoteDoor(actor, "generator")
    first = exchange(door, [], 5)
    actor.lose = [lost]
    second = exchange(door, [ended(first)] * 2, 9)
    assert (first.count, second.count) == (5, 5), "3 in flight still, and 8 are allowed"
    budget, throttle = actor.doors._budget, actor.doors._gate("generator", "w").throttle
    assert budget.spent.values == (2, 20, 8, 0) and budget.reserved.values == (8, 80, 80, 0)
    assert throttle.in_flight == 8
    exchange(door, [ended(second)] * 8, 0)
    assert budget.spent.values == (10, 100, 40, 0) and not any(budget.reserved.values) and throttle.in_flight == 0


def test_a_budget_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "SAVE_S", 0.0)
    caps = {"max_requests": 10}
    found = doors(tmp_path, budget=caps)
    permit = ask(found, 6)
    asyncio.run(found.exchange("generator", [ended(permit)] * 4, [], "w", Account()))
    again = doors(tmp_path, budget=caps)
    assert ask(again, 100, holder="other").count == 4, "those in flight count until their worker speaks"
    assert json.loads((tmp_path / BUDGET_FILE).read_text())["requests"] == 10
    assert ask(doors(tmp_path, "another session", budget=caps), 100).count == 10, "and is no part of what is handed in"


def test_a_worker_that_started_anew_is_not_taken_for_its_former_self(tmp_path: Path) -> None:
    found = doors(tmp_path, budget={"max_requests": 10})
    assert ask(found, 6).count == 6
    asyncio.run(found.forget("w"))
    again = doors(tmp_path, budget={"max_requests": 10})
    assert ask(again, 100).count == 4, "what the former one had in flight may have been billed"


def test_an_actor_that_stays_away_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "DOWN_S", 0.0)
    actor = Actor(lambda: doors(tmp_path))
    actor.lose = ["before"] * 1000
    with pytest.raises(SynthesisError, match=r"has not come back for 0 s .*run again"):
        exchange(_RemoteDoor(actor, "generator"), [], 1)


def test_what_is_wrong_with_a_budget_is_told_before_an_actor_starts(tmp_path: Path) -> None:
    config = job_config(tmp_path, "http://127.0.0.1:1", budget={"max_money": 1.0})
    with pytest.raises(ConfigError, match="no price for m"):
        start_doors(open_job(config, "sentences", {}), None)


def test_a_job_that_breaks_leaves_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no worker can be started")

    spec = open_job(job_config(tmp_path, "http://127.0.0.1:1"), "sentences", {})
    ledger = Ledger(spec.ledger, spec.job)
    ledger.plan(spec.requests(), shard_requests=4)
    monkeypatch.setattr(job, "start_doors", lambda *_: None)
    monkeypatch.setattr(job, "shard_outcomes", broken)
    with pytest.raises(RuntimeError, match="no worker"):
        _Driver(spec, ledger, lambda text: None).run()
    summary = spec.ledger.read_json("summary.json")
    assert summary["stopped"] == "RuntimeError" and summary["stats"]["planned"] == 8
