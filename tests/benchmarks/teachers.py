"""Teachers on the network: answers per second with throttle, request ids and retries, over the bare official client.

Both ask the same loopback server, a process of its own that answers after a fixed time, with as many calls in flight;
they take turns, and each of our segments is compared with the mean of its two neighbours. `of ideal` is the rate over
`in flight / latency`, which no client can exceed. Processor time per call tells the same on a machine that is not
idle, where rates say more of its other guests.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import openai

from nexus_ray.config.generators import OpenAIGenerator
from nexus_ray.synthesis.generators.remote import RemoteTeacher, remote_teacher
from nexus_ray.synthesis.rows import Answer, Prompt, Request, Sampling
from tests.benchmarks.figures import Bar, Outcome, paired_ratio

SETTINGS: dict[str, Any] = {
    "latencies_s": [0.2, 1.0],
    "in_flight": 64,
    "turns_of_calls": 25,
    "rounds": 3,
}
QUICK: dict[str, Any] = {"latencies_s": [0.05], "in_flight": 8, "turns_of_calls": 2, "rounds": 1}
BARE_LATENCY_S, BARE_LIMIT = 0.2, 0.95
IDEAL_LATENCY_S, IDEAL_LIMIT = 1.0, 0.95
PROMPT = "Write a short story about a child who finds a map. " * 4


def run(folder: Path, *, latencies_s: list[float], in_flight: int, turns_of_calls: int, rounds: int) -> Outcome:
    outcome = Outcome(
        f"teachers: answers/s at {in_flight} in flight, over the bare official client",
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
    for latency_s in latencies_s:
        calls = in_flight * turns_of_calls
        with server(latency_s) as url:
            bare_segments, our_segments = asyncio.run(contest(url, in_flight, calls, rounds))
        bare, ours = [each.rate for each in bare_segments], [each.rate for each in our_segments]
        shares = paired_ratio(ours, bare)
        ideal = in_flight / latency_s
        cells = (median(bare), median(ours), median(shares), min(shares), median(bare) / ideal, median(ours) / ideal)
        work = [median(each.cpu_ms for each in some) for some in (bare_segments, our_segments)]
        outcome.rows.append((f"{latency_s:g}", *cells, *work))
        outcome.samples[f"{latency_s:g}"] = {
            "bare": [asdict(each) for each in bare_segments],
            "ours": [asdict(each) for each in our_segments],
        }
        if latency_s == BARE_LATENCY_S:
            outcome.bars.append(Bar(f"answers/s over the bare client at {latency_s:g} s", median(shares), BARE_LIMIT))
        if latency_s == IDEAL_LATENCY_S:
            outcome.bars.append(Bar(f"answers/s over ideal at {latency_s:g} s", median(ours) / ideal, IDEAL_LIMIT))
    return outcome


@contextmanager
def server(latency_s: float) -> Iterator[str]:
    """URL of a fault server without faults, in a process of its own."""
    command = [sys.executable, "-m", "tests.fault_server", json.dumps({"delay_s": latency_s})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.stdin.close()
            process.wait(timeout=30)


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


async def contest(url: str, in_flight: int, calls: int, rounds: int) -> tuple[list[Stretch], list[Stretch]]:
    """The bare client `rounds` + 1 times, and ours between them. Connections are warm."""
    config = OpenAIGenerator.model_validate(
        {"kind": "openai", "model": "m", "base_url": url, "throttle": {"max_in_flight": in_flight}}
    )
    teacher = remote_teacher(config)
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    await by_client(client, in_flight, 2 * in_flight)
    await by_teacher(teacher, 2 * in_flight)
    bare, ours = [await timed(by_client(client, in_flight, calls), calls)], []
    for _ in range(rounds):
        ours.append(await timed(by_teacher(teacher, calls), calls))
        bare.append(await timed(by_client(client, in_flight, calls), calls))
    await client.close()
    await teacher.aclose()
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


async def by_teacher(teacher: RemoteTeacher, calls: int) -> None:
    """The same calls through a generator."""
    asked = (Request(Prompt(f"{PROMPT}{number}"), Sampling(), 0) for number in range(calls))
    found = [item async for item in teacher.generate(asked)]
    assert len(found) == calls and all(isinstance(item, Answer) for item in found)
