"""What a worker does with shards: ask what is pending, log what comes, judge it. Knows nothing of clusters.

One stream of calls runs through all shards: the next one is opened once the requests of those open have all been drawn,
so that no slot is empty while a shard ends. The generator has a thread of its own, and judging has `threads`.
Invariant: an answer is in the log before it is judged; what is logged as sent has left, and nothing else has.

A request that fails for now is asked again behind the others once an answer has come since (in the end, to `PROBE`),
for then the failure is its own; in an outage it waits for the next session, and the failure does not count. Otherwise
one such request would keep its shard open, and with it all rows behind, while the rest of the plan is paid for.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeGuard

from nexus_ray.errors import SynthesisError
from nexus_ray.synthesis.budget import BudgetExhausted
from nexus_ray.synthesis.generators.protocol import Generator, Line
from nexus_ray.synthesis.rows import Answer, Failure, Prompt, Request, Sampling
from nexus_ray.synthesis.setup import AnswerJudge
from nexus_ray.synthesis.shard_log import ShardLog
from nexus_ray.synthesis.validators.judge import RefusedQuestionError

ASK_TOKENS = 512
"""Tokens of a judging model's reply at most."""
PROBE = "Is snow white? Answer with one word."
"""What a model that works has an answer to, whether it judges or writes."""
PROBE_TOKENS = 16


def work_shards(
    open_next: Callable[[], ShardLog | None],
    line: Line,
    judge: AnswerJudge,
    *,
    threads: int = 1,
    stop: Callable[[], bool] = lambda: False,
    ended: Callable[[int], None] = lambda shard: None,
) -> None:
    """Bring shards as far as they go: to their end, or until `stop` says so, when what is in flight is awaited.

    `open_next` gives the next shard's log, not entered yet, or None while there is none. It is asked, in the line's
    thread too, whenever all requests are drawn: how many shards are open is up to it. `ended` is told, in any thread,
    the number of each shard whose log is closed.

    Raises what generator, judge and logs raise, with all logs closed and everything that arrived in them: nothing more
    is asked then, and what is in flight is awaited, for it is paid. `ended` hears nothing of the shards then open.
    """
    with _Work(open_next, judge, threads, stop, ended) as work:
        try:
            while work.has_more():
                for item in line.generate(work, work.sent):
                    work.take(item)
                if work.has_failed() and _answers(line):
                    work.count_failed(again=True)
        except BudgetExhausted:
            raise
        except SynthesisError:
            if work.has_failed() and _answers(line):
                work.count_failed(again=False)
            raise
        work.settle()


def _answers(line: Line) -> bool:
    """Whether the generator has an answer to `PROBE`, which has one."""
    request = Request(Prompt(PROBE, recipe="probe"), Sampling(max_tokens=PROBE_TOKENS, temperature=0.0), 0)
    with contextlib.suppress(SynthesisError):
        return any(isinstance(item, Answer) for item in line.generate([request]))
    return False


@dataclass(eq=False)
class _OpenShard:
    log: ShardLog
    stack: contextlib.ExitStack
    left: int
    """Requests that are still to be asked, in flight, or not judged."""


class _Work(Iterator[Request]):
    """The open shards, and the requests to be asked as an iterator that may end and go on; one lock for all threads.

    The first error is kept: from then on no request is drawn and no answer judged, and the context's end raises it.
    """

    def __init__(
        self,
        open_next: Callable[[], ShardLog | None],
        judge: AnswerJudge,
        threads: int,
        stop: Callable[[], bool],
        ended: Callable[[int], None],
    ) -> None:
        self._open_next = open_next
        self._judge = judge
        self._stop = stop
        self._ended = ended
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="judge")
        self._lock = threading.Lock()
        self._shards: list[_OpenShard] = []
        self._shard_of: dict[str, _OpenShard] = {}
        self._to_ask: deque[Request] = deque()
        self._failed: list[Failure] = []  # no answer has come since
        self._error: BaseException | None = None

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        with contextlib.ExitStack() as stack:
            for shard in self._shards:
                stack.enter_context(shard.stack)
        if kind is None and self._error is not None:
            raise self._error
        if kind is None:
            for shard in self._shards:
                self._ended(shard.log.shard)

    # --- requests, in the line's thread ------------------------------------------------------------------------------

    def __next__(self) -> Request:
        if not self.has_more():
            raise StopIteration
        return self._to_ask.popleft()

    def has_more(self) -> bool:
        """Whether there is something to ask; opens shards until there is."""
        while self._error is None and not self._stop():
            if self._to_ask:
                return True
            if not self._open():
                return False
        return False

    def sent(self, ids: list[str]) -> None:
        """`OnSent` of the generator."""
        with self._lock:
            groups: defaultdict[_OpenShard, list[str]] = defaultdict(list)
            for id in ids:
                groups[self._shard_of[id]].append(id)
            for shard, some in groups.items():
                shard.log.sent(some)

    def _open(self) -> bool:
        with self._kept(), self._lock:
            log = self._open_next()
            if log is None:
                return False
            stack = contextlib.ExitStack()
            stack.enter_context(log)
            pending, unjudged = log.pending(), log.unjudged()
            shard = _OpenShard(log, stack, len(pending) + len(unjudged))
            self._shards.append(shard)
            self._shard_of.update(dict.fromkeys([*pending, *(answer.request_id for answer in unjudged)], shard))
            self._to_ask.extend(pending.values())
            self._close_if_done(shard)
            for answer in unjudged:
                self._pool.submit(self._judged, answer)
            return True
        return False

    # --- what comes ---------------------------------------------------------------------------------------------------

    def take(self, item: Answer | Failure) -> None:
        """Log what has come; an answer goes on to be judged."""
        with self._kept():
            with self._lock:
                log = self._shard_of[item.request_id].log
                if isinstance(item, Failure):
                    if item.retriable:
                        log.failed(replace(item, passing=True))
                        self._failed.append(item)
                    else:
                        log.failed(item)
                        self._done(item.request_id)
                    return
                log.answered(item)
                self._count_failed(again=True)
            self._pool.submit(self._judged, item)

    def has_failed(self) -> bool:
        """Whether requests have failed since the last answer, and nothing else keeps the work from going on."""
        return bool(self._failed) and self._error is None and not self._stop()

    def count_failed(self, *, again: bool) -> None:
        """The generator answers: what has failed since it last did is the requests' own. Ask those again, if `again`,
        that are not given up."""
        with self._kept(), self._lock:
            self._count_failed(again=again)

    def settle(self) -> None:
        """Nothing more is asked: what failed since the last answer waits for another session."""
        with self._kept(), self._lock:
            failed, self._failed = self._failed, []
            for failure in failed:
                self._done(failure.request_id)

    def _count_failed(self, *, again: bool) -> None:
        failed, self._failed = self._failed, []
        for failure in failed:
            id = failure.request_id
            log = self._shard_of[id].log
            if not failure.passing:
                log.failed(failure)
            if again and not log.gave_up(id):
                self._to_ask.append(log.requests[id])
            else:
                self._done(id)

    def _judged(self, answer: Answer) -> None:
        with self._kept():
            if self._error is None:
                log = self._shard_of[answer.request_id].log
                rows = self._judge.rows(log.requests[answer.request_id], answer)
                with self._lock:
                    log.judged(answer.request_id, rows)
                    self._done(answer.request_id)

    def _done(self, id: str) -> None:
        shard = self._shard_of.pop(id)
        shard.left -= 1
        self._close_if_done(shard)

    def _close_if_done(self, shard: _OpenShard) -> None:
        if not shard.left:
            shard.stack.close()
            self._shards.remove(shard)
            self._ended(shard.log.shard)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Keeps the block's error for the end: raised at once, it would cut off the calls in flight."""
        try:
            yield
        except BaseException as error:
            self._error = self._error or error


class Asker:
    """`ask(prompt) -> reply` over a generator, for the judging model; several threads may ask at once.

    No reply is no verdict: after an outage the answer stays in the log, not judged, until the job is started again. But
    where the model answers `PROBE` and is silent once more, it is the question that it has no reply to.
    """

    def __init__(self, generator: Generator, *, alone: bool) -> None:
        """`alone`: the generator answers one call at a time (a local model)."""
        self._generator = generator
        self._turn = threading.Lock() if alone else None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="judge-calls", daemon=True).start()

    def __call__(self, prompt: str) -> str:
        """Raises RefusedQuestionError if this question will never be answered, SynthesisError if it may be later."""
        with self._turn or nullcontext():
            return asyncio.run_coroutine_threadsafe(self._reply(prompt), self._loop).result()

    async def _reply(self, prompt: str) -> str:
        item = await self._ask(prompt)
        if _its_own(item) and isinstance(await self._ask(PROBE), Answer):
            item = await self._ask(prompt)
            if _its_own(item):
                raise RefusedQuestionError(f"the judging model answers others, but not the question: {item.reason}")
        if isinstance(item, Answer):
            return item.text
        if not item.retriable:
            raise RefusedQuestionError(f"the judging model refuses the question: {item.reason}")
        raise SynthesisError(
            f"the judging model gave no reply ({item.reason}); what was answered is kept, and is judged when the job "
            f"is started again"
        )

    async def _ask(self, prompt: str) -> Answer | Failure:
        request = Request(Prompt(prompt, recipe="judge"), Sampling(max_tokens=ASK_TOKENS, temperature=0.0), 0)
        async for item in self._generator.generate([request]):
            return item
        raise SynthesisError("the judging model gave neither a reply nor a failure; this is a fault of its generator")

    def close(self) -> None:
        """Give connections back."""
        asyncio.run_coroutine_threadsafe(self._generator.aclose(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)


def _its_own(item: Answer | Failure) -> TypeGuard[Failure]:
    """Whether a failure may pass and may yet be the question's own."""
    return isinstance(item, Failure) and item.retriable and not item.passing
