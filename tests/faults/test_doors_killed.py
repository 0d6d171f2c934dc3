"""The actor that keeps budget and throttles is killed while a worker asks it: the worker goes on, and so do they."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from nexus_ray.session import job_demand, ray_session
from nexus_ray.synthesis.budget import Account
from nexus_ray.synthesis.crew import _RemoteDoor, start_doors
from nexus_ray.synthesis.generators.gate import Settled, Tokens
from nexus_ray.synthesis.setup import JobSpec, open_job
from nexus_ray.synthesis.throttle import Outcome
from tests.jobs import job_config

pytestmark = pytest.mark.ray
ONE = Tokens(10, 10)


@pytest.fixture
def spec(tmp_path: Path) -> Iterator[JobSpec]:
    config = job_config(tmp_path, "http://127.0.0.1:1", budget={"max_requests": 12})
    with ray_session(config, [job_demand(config.synthesis["sentences"])]):
        yield open_job(config, "sentences", {})


def test_a_killed_actor_starts_again_with_its_budget(spec: JobSpec) -> None:
    doors = start_doors(spec, None)
    door, other = _RemoteDoor(doors, "generator"), _RemoteDoor(doors, "generator")
    first = door.exchange_now([], [ONE] * 5, "w")
    assert first.count == 5 and other.exchange_now([], [ONE], "other").count == 1
    ray.get(doors.report.remote(0, 8, 0))  # saves
    process = ray.get(doors.__ray_call__.remote(_pid))
    ray.kill(doors, no_restart=False)
    done = [Settled(Outcome("ok", first.epoch), ONE, ONE)] * 5
    second = door.exchange_now(done, [ONE] * 9, "w")
    assert ray.get(doors.__ray_call__.remote(_pid)) != process, "it was not killed"
    assert second.count == 6, "12 less 5 that are done and the one of `other`"
    ray.kill(doors, no_restart=False)
    ray.get(doors.forget.remote("other"))
    asyncio.run(door.exchange([Settled(Outcome("ok", second.epoch), ONE, ONE)] * 6, [], "w"))
    report = ray.get(doors.report.remote(8, 8, 0))
    assert report["state"]["requests"] == 12 and report["in_flight"]["generator"]["now"] == 0
    assert door._account == Account(spent=door._account.spent) and door._account.spent.requests == 11


def _pid(_: object) -> int:
    import os

    return os.getpid()
