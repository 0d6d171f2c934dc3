"""Teachers on the network: answers per second of a job's worker, throttle, logs and all, over the bare official client.

Both ask the same loopback server, a process of its own, with as many calls in flight; they take turns, and each of our
segments is compared with the mean of its two neighbours. Ours is the path of a job: shards of a ledger on disk are
opened, asked, logged, judged and closed. The server answers after a fixed time or, as real ones do, after one that
varies (lognormal, the same times for each segment). `of ideal` is the rate over `in flight / mean latency`, which no
client can exceed. Processor time per call tells the same on a machine that is not idle, where rates say more of its
other guests.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import openai
import yaml

from nexus_ray.config.generators import OpenAIGenerator
from nexus_ray.synthesis.crew import shards_at_once
from nexus_ray.synthesis.generators.protocol import Line
from nexus_ray.synthesis.generators.remote import remote_teacher
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.setup import AnswerJudge, JobSpec, open_job
from nexus_ray.synthesis.shard_log import ShardLog
from nexus_ray.synthesis.worker import work_shards
from tests.benchmarks.figures import Bar, Outcome, paired_ratio
from tests.fault_server import FaultServer
from tests.jobs import job_config

SETTINGS: dict[str, Any] = {
    "latencies": [[0.2, 0.0], [1.0, 0.0], [0.5, 0.5]],
    "in_flight": 64,
    "shards": 4,
    "shard_requests": 256,
    "rounds": 3,
}
"""`latencies`: mean in seconds, and standard deviation of its logarithm."""
QUICK: dict[str, Any] = {
    "latencies": [[0.05, 0.0], [0.05, 0.5]],
    "in_flight": 8,
    "shards": 2,
    "shard_requests": 16,
    "rounds": 1,
}
BARS = {(0.2, 0.0): ("bare", 0.95), (1.0, 0.0): ("ideal", 0.95), (0.5, 0.5): ("bare", 0.9)}
"""What our rate is held against, and how much of it there must be."""
PROMPT = "Write a short story about a child who finds a map. " * 4


def run(
    folder: Path, *, latencies: list[list[float]], in_flight: int, shards: int, shard_requests: int, rounds: int
) -> Outcome:
    outcome = Outcome(
        f"teachers: answers/s of a worker at {in_flight} in flight, over the bare official client",
        (
            "latency, s",
            "bare",
            "ours",
            "ours/bare",
            "least",
            "bare of ideal",
            "ours of ideal",
            "bare, CPU ms",
            "ours, CPU ms",
        ),
    )
    calls = shards * shard_requests
    for mean_s, sigma in latencies:
        name = f"{mean_s:g}, sigma {sigma:g}" if sigma else f"{mean_s:g}"
        with server(mean_s, sigma, calls) as url:
            jobs = _Jobs(folder / name, url, in_flight, calls, shard_requests)
            bare_segments, our_segments = asyncio.run(contest(url, jobs, in_flight, calls, rounds))
        bare, ours = [each.rate for each in bare_segments], [each.rate for each in our_segments]
        shares = paired_ratio(ours, bare)
        ideal = in_flight / mean_s
        cells = (median(bare), median(ours), median(shares), min(shares), median(bare) / ideal, median(ours) / ideal)
        work = [median(each.cpu_ms for each in some) for some in (bare_segments, our_segments)]
        outcome.rows.append((name, *cells, *work))
        outcome.samples[name] = {
            "bare": [asdict(each) for each in bare_segments],
            "ours": [asdict(each) for each in our_segments],
        }
        if (mean_s, sigma) in BARS:
            other, limit = BARS[mean_s, sigma]
            value = median(shares) if other == "bare" else median(ours) / ideal
            outcome.bars.append(Bar(f"answers/s over {other} at {name} s", value, limit))
    return outcome


# --- the server ---------------------------------------------------------------------------------------------------


class VaryingServer(FaultServer):
    """A fault server without faults; its latencies repeat after `calls` calls, so that segments are alike."""

    def __init__(self, mean_s: float, sigma: float, calls: int) -> None:
        draw = random.Random(0)
        self._latencies_s = itertools.cycle([draw.lognormvariate(-sigma * sigma / 2, sigma) for _ in range(calls)])
        self._mean_s = mean_s
        super().__init__()
        self.keep_calls = False

    @property
    def delay_s(self) -> float:  # type: ignore[override]
        """Asked once a call."""
        return self._mean_s * next(self._latencies_s)

    @delay_s.setter
    def delay_s(self, value: float) -> None:
        """It varies."""


async def _serve(settings: dict[str, Any]) -> None:
    varying = VaryingServer(**settings)
    await varying.start()
    print(varying.port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


@contextmanager
def server(mean_s: float, sigma: float, calls: int) -> Iterator[str]:
    """URL of a `VaryingServer` in a process of its own."""
    settings = json.dumps({"mean_s": mean_s, "sigma": sigma, "calls": calls})
    command = [sys.executable, "-m", "tests.benchmarks.teachers", settings]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.stdin.close()
            process.wait(timeout=30)


# --- the contest --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """Some calls of one contestant."""

    rate: float
    """Answers per second on the clock."""
    cpu_ms: float
    """Processor time of this process per answer."""


async def timed(work: Awaitable[None], calls: int) -> Stretch:
    began, used = time.perf_counter(), time.process_time()
    await work
    return Stretch(calls / (time.perf_counter() - began), (time.process_time() - used) / calls * 1000)


async def contest(
    url: str, jobs: _Jobs, in_flight: int, calls: int, rounds: int
) -> tuple[list[Stretch], list[Stretch]]:
    """The bare client `rounds` + 1 times, and ours between them. Connections are warm, plans are made."""
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    with Line(remote_teacher(jobs.generator)) as line:
        await by_client(client, in_flight, calls // 4)
        await asyncio.to_thread(jobs.planned("warm", calls // 4).work, line)
        bare, ours = [await timed(by_client(client, in_flight, calls), calls)], []
        for number in range(rounds):
            job = jobs.planned(f"job{number}", calls)
            ours.append(await timed(asyncio.to_thread(job.work, line), calls))
            bare.append(await timed(by_client(client, in_flight, calls), calls))
            assert all(map(job.ledger.is_complete, job.ledger.open_shards()))
    await client.close()
    return bare, ours


async def by_client(client: openai.AsyncOpenAI, in_flight: int, calls: int) -> None:
    """`in_flight` coroutines that share `calls` calls."""
    numbers = iter(range(calls))
    texts: list[str | None] = []

    async def worker() -> None:
        for number in numbers:
            reply = await client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": f"{PROMPT}{number}"}],
                max_tokens=512,
                temperature=0.8,
                top_p=0.95,
            )
            texts.append(reply.choices[0].message.content)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    assert len(texts) == calls and all(texts)


class _Jobs:
    """Makes jobs of the same calls, each with a ledger of its own."""

    def __init__(self, folder: Path, url: str, in_flight: int, calls: int, shard_requests: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._url = url
        self._shard_requests = shard_requests
        self.generator = OpenAIGenerator.model_validate(
            {"kind": "openai", "model": "m", "base_url": url, "throttle": {"max_in_flight": in_flight}}
        )
        recipe = {
            "name": "stories",
            "messages": [{"role": "user", "content": f"{PROMPT}{{{{ number }}}}"}],
            "parameters": {"number": {"values": [str(number) for number in range(calls)]}},
            "order": "product",
        }
        (folder / "stories.yaml").write_text(yaml.safe_dump(recipe))

    def planned(self, name: str, calls: int) -> _Job:
        config = job_config(
            self._folder,
            self._url,
            name=name,
            generator=self.generator.model_dump(),
            recipe=str(self._folder / "stories.yaml"),
            prompts=calls,
            num_candidates=1,
            filters={"length": {"min_words": 1}, "language": None, "repetition": None},
            shard_requests=self._shard_requests,
        )
        spec = open_job(config, "sentences", {})
        ledger = Ledger(spec.ledger, spec.job)
        ledger.plan(spec.requests(), shard_requests=self._shard_requests)
        return _Job(spec, ledger, AnswerJudge(spec))


@dataclass(frozen=True)
class _Job:
    spec: JobSpec
    ledger: Ledger
    judge: AnswerJudge

    def work(self, line: Line) -> None:
        """All shards, as a worker is given them: the next one as one ends."""
        shards = iter(self.ledger.open_shards())
        threads = self.spec.config.judge_threads
        room = threading.Semaphore(shards_at_once(self.spec.config))

        def open_next() -> ShardLog | None:
            if not room.acquire(blocking=False):
                return None
            return next(map(self.ledger.write, shards), None)

        work_shards(open_next, line, self.judge, threads=threads, ended=lambda shard: room.release())


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.argv[1])))
