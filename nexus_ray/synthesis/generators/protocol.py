"""What the engine asks of whatever writes text, and how code without an event loop uses it.

Invariant of every generator: each request comes back at most once, as an answer or as a failure; a generator that
ends without an error has given one for each. One that must stop raises, after what it had received: the rest was
not answered and may be asked again.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Protocol

from nexus_ray.synthesis.rows import Answer, Failure, Request

OnSent = Callable[[list[str]], None]
"""Told the ids of requests just before they leave for the first time; in the generator's thread."""


class Generator(Protocol):
    """Something that answers requests."""

    @property
    def revision(self) -> str:
        """What decides the distribution of its answers, as a short text; a part of every request's id."""
        ...

    def generate(self, requests: Iterable[Request], on_sent: OnSent | None = None) -> AsyncIterator[Answer | Failure]:
        """Answers and failures in order of arrival. Raises SynthesisError if the job cannot go on."""
        ...

    async def aclose(self) -> None:
        """Give connections back; must be awaited in the event loop that used them."""
        ...


def generate(
    generator: Generator, requests: Iterable[Request], on_sent: OnSent | None = None
) -> Iterator[Answer | Failure]:
    """`generator.generate` for ordinary code, also inside a running event loop (a notebook).

    An event loop in a thread of its own keeps calls in flight while the caller works on an answer. Closing the
    iterator abandons them. Raises what the generator raises, after everything that arrived before.
    """
    arrived: queue.SimpleQueue[Answer | Failure | BaseException | None] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(_drain(generator, requests, on_sent, arrived))

    def work() -> None:
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            arrived.put(None)
        except BaseException as error:  # raised again below, in the caller's thread
            arrived.put(error)
        else:
            arrived.put(None)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    thread = threading.Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        while (item := arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        if not loop.is_closed():
            _cancel(loop, task)
        thread.join()


def _cancel(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    try:
        loop.call_soon_threadsafe(task.cancel)
    except RuntimeError:
        return  # the loop has closed since


async def _drain(
    generator: Generator,
    requests: Iterable[Request],
    on_sent: OnSent | None,
    arrived: queue.SimpleQueue[Answer | Failure | BaseException | None],
) -> None:
    try:
        async for item in generator.generate(requests, on_sent):
            arrived.put(item)
    finally:
        await generator.aclose()
