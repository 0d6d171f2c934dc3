"""What a worker does with a shard: ask what is pending, log what comes, judge it. Knows nothing of clusters.

Calls stay in flight while answers are judged: the generator has a thread of its own, and judging has `judge_threads`.
Invariant: an answer is in the log before it is judged; what is logged as sent has left, and nothing else has.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

from nexus_ray.errors import SynthesisError
from nexus_ray.synthesis.generators.protocol import Generator, generate
from nexus_ray.synthesis.rows import Answer, Failure, Prompt, Request, Sampling
from nexus_ray.synthesis.setup import AnswerJudge
from nexus_ray.synthesis.shard_log import ShardLog
from nexus_ray.synthesis.validators.judge import RefusedQuestionError

ASK_TOKENS = 512
"""Tokens of a judging model's reply at most."""


def work_shard(
    log: ShardLog,
    generator: Generator,
    judge: AnswerJudge,
    *,
    threads: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Bring a shard as far as it goes: to its end, or until `stop` says so, when what is in flight is awaited.

    Raises what the generator raises, with everything that had arrived in the log.
    """
    lock = threading.Lock()

    def sent(ids: list[str]) -> None:
        with lock:
            log.sent(ids)

    def judged(answer: Answer) -> None:
        rows = judge.rows(log.requests[answer.request_id], answer)
        with lock:
            log.judged(answer.request_id, rows)

    with _Judging(judged, threads) as judging:
        for answer in log.unjudged():
            judging.take(answer)
        with lock:
            pending = log.pending()
        for item in generate(generator, _until(stop, pending), sent):
            with lock:
                log.failed(item) if isinstance(item, Failure) else log.answered(item)
            if isinstance(item, Answer):
                judging.take(item)


def _until(stop: Callable[[], bool], requests: Mapping[str, Request]) -> Iterator[Request]:
    for request in requests.values():
        if stop():
            return
        yield request


class _Judging:
    """Judges answers in some threads, at most twice as many waiting; the first error is raised at the next `take`."""

    def __init__(self, judge: Callable[[Answer], None], threads: int) -> None:
        self._judge = judge
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="judge")
        self._room = threading.Semaphore(3 * threads)
        self._errors: list[BaseException] = []

    def __enter__(self) -> _Judging:
        return self

    def take(self, answer: Answer) -> None:
        self._room.acquire()
        self._raise()
        self._pool.submit(self._judge, answer).add_done_callback(self._done)

    def _done(self, future: Future[None]) -> None:
        self._room.release()
        if (error := future.exception()) is not None:
            self._errors.append(error)

    def _raise(self) -> None:
        if self._errors:
            raise self._errors[0]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self._raise()


class Asker:
    """`ask(prompt) -> reply` over a generator, for the judging model; several threads may ask at once.

    No reply is no verdict: after an outage the answer stays in the log, not judged, until the job is started again.
    """

    def __init__(self, generator: Generator, *, alone: bool) -> None:
        """`alone`: the generator answers one call at a time (a local model)."""
        self._generator = generator
        self._turn = threading.Lock() if alone else None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="judge-calls", daemon=True).start()

    def __call__(self, prompt: str) -> str:
        """Raises RefusedQuestionError if this question will never be answered, SynthesisError if it may be later."""
        request = Request(Prompt(prompt, recipe="judge"), Sampling(max_tokens=ASK_TOKENS, temperature=0.0), 0)
        with self._turn or nullcontext():
            return asyncio.run_coroutine_threadsafe(self._ask(request), self._loop).result()

    async def _ask(self, request: Request) -> str:
        async for item in self._generator.generate([request]):
            if isinstance(item, Answer):
                return item.text
            if not item.retriable:
                raise RefusedQuestionError(f"the judging model refuses the question: {item.reason}")
            raise SynthesisError(
                f"the judging model gave no reply ({item.reason}); what was answered is kept, and is judged when the "
                f"job is started again"
            )
        raise SynthesisError("the judging model gave neither a reply nor a failure; this is a fault of its generator")

    def close(self) -> None:
        """Give connections back."""
        asyncio.run_coroutine_threadsafe(self._generator.aclose(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
