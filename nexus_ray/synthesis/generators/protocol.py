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
        """Answers and failures in order of arrival. Raises SynthesisError if the job cannot go on.

        An iterator that has ended may have more when it is asked again, and a generator with calls in flight may ask.
        """
        ...

    async def aclose(self) -> None:
        """Give connections back; must be awaited in the event loop that used them."""
        ...


class Line:
    """A generator for ordinary code, also inside a running event loop (a notebook); close it, or use it in a `with`.

    An event loop in a thread of its own keeps calls in flight while the caller works on an answer. Loop and connections
    last from one `generate` to the next: making them anew costs a handshake for every call in flight.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="generate", daemon=True)
        self._thread.start()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, requests: Iterable[Request], on_sent: OnSent | None = None) -> Iterator[Answer | Failure]:
        """`generator.generate`. Requests are drawn in the loop's thread. Closing the iterator abandons calls in flight.

        Raises what the generator raises, after everything that arrived before.
        """
        arrived: queue.SimpleQueue[Answer | Failure | asyncio.Task[None]] = queue.SimpleQueue()
        started: list[asyncio.Task[None]] = []

        def start() -> None:
            started.append(self._loop.create_task(_drain(self._generator, requests, on_sent, arrived)))
            started[0].add_done_callback(arrived.put)

        self._loop.call_soon_threadsafe(start)
        item: Answer | Failure | asyncio.Task[None] | None = None
        try:
            while not isinstance(item := arrived.get(), asyncio.Task):
                yield item
            item.result()
        finally:
            if not isinstance(item, asyncio.Task):
                self._loop.call_soon_threadsafe(lambda: started[0].cancel())
                while not isinstance(item := arrived.get(), asyncio.Task):
                    pass
                if not item.cancelled():
                    item.exception()  # seen, and of no interest: the caller has gone

    def close(self) -> None:
        """Give connections back and end the thread."""
        try:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        try:
            await self._generator.aclose()
        finally:
            await self._loop.shutdown_asyncgens()


def generate(
    generator: Generator, requests: Iterable[Request], on_sent: OnSent | None = None
) -> Iterator[Answer | Failure]:
    """`Line.generate` on a line of its own."""
    with Line(generator) as line:
        yield from line.generate(requests, on_sent)


async def _drain(
    generator: Generator,
    requests: Iterable[Request],
    on_sent: OnSent | None,
    arrived: queue.SimpleQueue[Answer | Failure | asyncio.Task[None]],
) -> None:
    async for item in generator.generate(requests, on_sent):
        arrived.put(item)
