"""Keeps as many calls in flight as the gate permits, and calls again where it helps.

Invariant: every request comes out of `dispatch` once, as an answer or a failure, or not at all if it ends with an
error; no call is sent without a permit, and each permit is settled.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import itertools
import math
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from nexus_ray.config.generators import RemoteGenerator
from nexus_ray.errors import SynthesisError
from nexus_ray.synthesis.budget import exhausted
from nexus_ray.synthesis.generators.gate import Gate, Permit, Settled, Tokens
from nexus_ray.synthesis.generators.health import Health
from nexus_ray.synthesis.generators.protocol import OnSent
from nexus_ray.synthesis.generators.reply import Reply, timed_out
from nexus_ray.synthesis.rows import Answer, Failure, Message, Request
from nexus_ray.synthesis.throttle import Outcome

MAX_DELAY_S = 30.0
TURN_TOKENS = 32
"""More than a server's template adds to one turn, and to the whole."""


class Endpoint(Protocol):
    """One server, through its client."""

    async def ask(self, request: Request, request_id: str) -> Reply:
        """One call. Whatever server and network do comes back as a `Reply`; nothing of it is raised."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


@dataclass(eq=False)
class _Job:
    request: Request = field(repr=False)
    id: str
    bound: Tokens
    retries: int = 0
    refusals: int = 0
    left: bool = False
    """Whether it was ever sent."""


@dataclass(frozen=True)
class Site:
    """Where and how calls are made."""

    endpoint: Endpoint
    config: RemoteGenerator
    gate: Gate
    health: Health
    revision: str
    holder: str = ""
    """Name under which the gate knows this worker."""


async def dispatch(
    site: Site, requests: Iterable[Request], on_sent: OnSent | None = None
) -> AsyncIterator[Answer | Failure]:
    """Answers and failures in order of arrival.

    Requests are drawn as they are needed; at most `max_in_flight` results wait to be taken. Raises SynthesisError
    (BudgetExhausted where a cap was reached) after all calls in flight have come back, and at once where the first
    call shows that address, key or model are wrong.
    """
    out: asyncio.Queue[Answer | Failure | None] = asyncio.Queue(site.config.throttle.max_in_flight)
    task = asyncio.create_task(_Run(site, iter(requests), out, on_sent).work())
    try:
        while (item := await out.get()) is not None:
            yield item
        await task  # raises what ended it
    finally:
        task.cancel()
        await asyncio.wait([task])


class _Run:
    """One call of `dispatch`."""

    def __init__(
        self,
        site: Site,
        source: Iterator[Request],
        out: asyncio.Queue[Answer | Failure | None],
        on_sent: OnSent | None,
    ) -> None:
        self._site = site
        self._config = site.config
        self._stats = site.health.stats
        self._source = source
        self._out = out
        self._on_sent = on_sent
        self._ready: deque[_Job] = deque()
        self._delayed: list[tuple[float, int, _Job]] = []
        self._order = itertools.count()
        self._tasks: dict[asyncio.Task[Reply], tuple[_Job, int]] = {}
        self._ended: deque[asyncio.Task[Reply]] = deque()
        self._settled: list[Settled] = []
        self._wake = asyncio.Event()
        self._stop: SynthesisError | None = None

    async def work(self) -> None:
        """All turns, then the mark that nothing follows."""
        try:
            await self._turns()
        except Exception:
            await self._out.put(None)
            raise
        await self._out.put(None)

    async def _turns(self) -> None:
        try:
            while True:
                self._draw()
                wait_s = await self._send()
                if not self._tasks and (self._stop or not (self._ready or self._delayed)):
                    break
                await self._sleep(wait_s)
                while self._ended:
                    await self._take(self._ended.popleft())
        finally:
            await self._abandon()
        if self._stop:
            raise self._stop

    def _draw(self) -> None:
        """Fill up the jobs that are ready: retries that are due first, then new requests, no more than there is room
        for: what is drawn is sent, even if the caller stops."""
        now = asyncio.get_running_loop().time()
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.appendleft(heapq.heappop(self._delayed)[2])
        while len(self._ready) + len(self._tasks) < self._config.throttle.max_in_flight and not self._stop:
            request = next(self._source, None)
            if request is None:
                return
            self._ready.append(_Job(request, request.id(self._site.revision), prompt_bound(request)))

    async def _send(self) -> float:
        """Settle what has ended, start what is permitted; seconds after which to try again."""
        room = 0 if self._stop else self._config.throttle.max_in_flight - len(self._tasks)
        wanted = [job.bound for job in itertools.islice(self._ready, room)]
        if not wanted and not self._settled:
            return math.inf
        settled, self._settled = self._settled, []
        permit = await self._site.gate.exchange(settled, wanted, self._site.holder)
        leaving = [self._ready.popleft() for _ in range(permit.count)]
        new = [job for job in leaving if not job.left]
        if new and self._on_sent is not None:
            self._on_sent([job.id for job in new])
        for job in leaving:
            self._start(job, permit)
        if wanted and permit.exhausted:
            self._stop = self._stop or exhausted(permit.exhausted)
        health = self._site.health
        self._stop = self._stop or health.refused_for(permit.refused_for_s) or health.pause(permit.wait_s)
        return permit.wait_s if permit.count < len(wanted) else math.inf

    def _start(self, job: _Job, permit: Permit) -> None:
        job.left = True
        task = asyncio.create_task(self._call(job, permit.seconds_left))
        self._tasks[task] = (job, permit.epoch)
        task.add_done_callback(self._note)
        self._stats.sent += 1
        self._stats.peak_in_flight = max(self._stats.peak_in_flight, len(self._tasks))

    def _note(self, task: asyncio.Task[Reply]) -> None:
        self._ended.append(task)
        self._wake.set()

    async def _call(self, job: _Job, seconds_left: float) -> Reply:
        limit = self._config.timeout_s
        try:
            async with asyncio.timeout(min(limit, seconds_left)):
                return await self._site.endpoint.ask(job.request, job.id)
        except TimeoutError:
            return timed_out(limit) if limit <= seconds_left else Reply("cut", "error", used=None)

    async def _sleep(self, wait_s: float) -> None:
        """Until a call ends, a retry is due, or `wait_s` have passed."""
        loop = asyncio.get_running_loop()
        if self._delayed and not self._stop:
            wait_s = min(wait_s, self._delayed[0][0] - loop.time())
        if self._ended:
            return
        self._wake.clear()
        timer = loop.call_later(max(0.0, wait_s), self._wake.set) if wait_s < math.inf else None
        try:
            await self._wake.wait()
        finally:
            if timer:
                timer.cancel()

    async def _take(self, task: asyncio.Task[Reply]) -> None:
        """Judge what came back, and pass it on or line it up again."""
        job, epoch = self._tasks.pop(task)
        reply = task.result()
        self._settled.append(Settled(Outcome(reply.load, epoch, reply.retry_after_s), job.bound, reply.used))
        if error := self._site.health.first_refusal(reply, alone=not self._tasks):
            raise error
        self._stop = self._stop or self._site.health.last_word(reply)
        if reply.answer is not None:
            self._site.health.ended(job.id)
            await self._out.put(reply.answer)
        elif reply.next == "fail":
            await self._fail(job, reply.reason, reply)
        elif reply.next == "cut":
            self._ready.appendleft(job)
        elif reply.next == "again" and not self._stop:
            await self._again(job, reply)

    async def _again(self, job: _Job, reply: Reply) -> None:
        busy = reply.load == "busy"
        job.refusals, job.retries = job.refusals + busy, job.retries + (not busy)
        if job.refusals > self._config.max_refusals or job.retries > self._config.max_retries:
            await self._fail(job, f"{reply.reason}, after {job.refusals + job.retries} calls", reply)
            return
        self._stats.retries[reply.reason] += 1
        if busy:
            self._ready.append(job)  # the throttle makes it wait
            return
        delay_s = max(_delay_s(self._config.retry_delay_s, job), reply.retry_after_s or 0.0)
        at = asyncio.get_running_loop().time() + delay_s
        heapq.heappush(self._delayed, (at, next(self._order), job))

    async def _fail(self, job: _Job, reason: str, reply: Reply) -> None:
        error = self._site.health.ended(job.id, reason)
        self._stop = self._stop or error
        await self._out.put(Failure(job.id, reason, retriable=reply.later, passing=not reply.left))

    async def _abandon(self) -> None:
        """Cancel what is still in flight, and settle everything."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for job, epoch in self._tasks.values():
            self._settled.append(Settled(Outcome("error", epoch), job.bound, None))
        if self._settled:
            await self._site.gate.exchange(self._settled, [], self._site.holder)


def prompt_bound(request: Request) -> Tokens:
    """The most tokens a call can use: a byte-level vocabulary never has more tokens than the text has UTF-8 bytes."""
    content = request.prompt.content
    turns = (Message("user", content),) if isinstance(content, str) else content
    prompt = sum(len(turn.content.encode()) + TURN_TOKENS for turn in turns) + TURN_TOKENS
    return Tokens(prompt, request.sampling.max_tokens)


def _delay_s(first_s: float, job: _Job) -> float:
    """Wait before a retry: doubling, less up to half of it, drawn from the request's id so that a run repeats."""
    drawn = hashlib.blake2b(f"{job.id} {job.retries}".encode(), digest_size=4).digest()
    return min(first_s * 2.0 ** (job.retries - 1), MAX_DELAY_S) * (1 - int.from_bytes(drawn, "big") / 2**33)
