"""The worker that Ray Data calls, without Ray: several shards at once, an outcome for each, errors as values."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config.generators import OpenAIGenerator
from nexus_ray.errors import NexusError, SynthesisError
from nexus_ray.synthesis.crew import MOST_SHARDS, STOP_FILE, ShardWorker, shards_at_once
from nexus_ray.synthesis.generators.protocol import Line
from nexus_ray.synthesis.generators.remote import remote_teacher
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.setup import AnswerJudge, JobSpec, open_job
from tests.fault_server import FaultServer, Rule
from tests.jobs import job_config


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(items=10, delay_s=0.05) as found:
        yield found


class Alone(ShardWorker):
    """A worker without actors to ask."""

    made = 0
    error: NexusError | None = None
    judge: type[AnswerJudge] = AnswerJudge

    def _made(self) -> tuple[Line, AnswerJudge]:
        self.made += 1
        if self.error is not None:
            raise self.error
        generator = self._spec.config.generator
        assert isinstance(generator, OpenAIGenerator)
        return Line(remote_teacher(generator)), self.judge(self._spec)


def planned(tmp_path: Path, server: FaultServer, **settings: Any) -> tuple[JobSpec, Ledger]:
    spec = open_job(job_config(tmp_path, server.url, **settings), "sentences", {})
    ledger = Ledger(spec.ledger, spec.job)
    ledger.plan(spec.requests(), shard_requests=spec.config.shard_requests)
    return spec, ledger


def outcomes(worker: ShardWorker, shards: range, *, at_once: int = 4) -> dict[int, NexusError | None]:
    with ThreadPoolExecutor(at_once) as calls:
        rows = list(calls.map(worker, [{"shard": shard} for shard in shards]))
    return {row["shard"]: pickle.loads(row["outcome"]) for row in rows}


def test_calls_share_one_stream_and_each_gets_its_own_outcome(tmp_path: Path, server: FaultServer) -> None:
    spec, ledger = planned(tmp_path, server, prompts=24, shard_requests=4)
    worker = Alone(spec, None)
    assert outcomes(worker, range(6)) == dict.fromkeys(range(6))
    assert outcomes(worker, range(6, 12)) == dict.fromkeys(range(6, 12))
    assert worker.made == 1 and all(map(ledger.is_complete, range(12)))
    assert len(server.calls) == 48 and max(call.in_flight for call in server.calls) > 8
    assert outcomes(worker, range(12)) == dict.fromkeys(range(12)) and len(server.calls) == 48


def test_an_error_is_the_outcome_of_all_open_shards_and_the_last_that_is_asked(
    tmp_path: Path, server: FaultServer
) -> None:
    spec, ledger = planned(tmp_path, server, prompts=40, shard_requests=4)
    server.rules = [Rule("400", first=8)]
    found = outcomes(Alone(spec, None), range(20))
    errors = [error for error in found.values() if error is not None]
    assert errors and all(isinstance(error, SynthesisError) and "400" in str(error) for error in errors)
    stats = ledger.stats()
    assert stats.traffic.sent == stats.answered + stats.failed == len(server.calls) < 80


def test_what_cannot_be_made_is_an_outcome_too(tmp_path: Path, server: FaultServer) -> None:
    spec, _ = planned(tmp_path, server, prompts=8, shard_requests=4)
    worker = Alone(spec, None)
    worker.error = SynthesisError("the server does not start")
    found = outcomes(worker, range(4))
    assert any("does not start" in str(error) for error in found.values()) and worker.made == 1
    assert not server.calls


def test_what_is_no_error_of_ours_is_raised_in_the_calls(tmp_path: Path, server: FaultServer) -> None:
    spec, _ = planned(tmp_path, server, prompts=2, shard_requests=4)

    class Broken(AnswerJudge):
        def rows(self, *_: Any) -> Any:
            raise RuntimeError("broken filter")

    worker = Alone(spec, None)
    worker.judge = Broken
    with pytest.raises(RuntimeError, match="broken filter"):
        worker({"shard": 0})


def test_a_stop_lets_go_of_shards_that_wait(tmp_path: Path, server: FaultServer) -> None:
    spec, _ = planned(tmp_path, server, prompts=8, shard_requests=4)
    spec.ledger.write_text("interrupted\n", *STOP_FILE)
    assert outcomes(Alone(spec, None), range(4)) == dict.fromkeys(range(4)) and not server.calls


@pytest.mark.parametrize(
    ("in_flight", "shard_requests", "shards"), [(64, 256, 4), (512, 256, 5), (64, 4, 19), (4096, 1, MOST_SHARDS)]
)
def test_a_worker_is_given_enough_shards_to_stay_busy(
    tmp_path: Path, in_flight: int, shard_requests: int, shards: int
) -> None:
    generator = {"kind": "openai", "model": "m", "throttle": {"max_in_flight": in_flight}}
    config = job_config(tmp_path, "http://127.0.0.1:1", generator=generator, shard_requests=shard_requests)
    assert shards_at_once(config.synthesis["sentences"]) == shards
