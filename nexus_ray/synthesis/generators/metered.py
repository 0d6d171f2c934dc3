"""A model of this cluster under the job's budget: each request is paid for at the gate before it leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from nexus_ray.synthesis.budget import exhausted
from nexus_ray.synthesis.generators.dispatch import prompt_bound
from nexus_ray.synthesis.generators.gate import Permit, Settled, Tokens
from nexus_ray.synthesis.generators.protocol import Generator, OnSent
from nexus_ray.synthesis.rows import Answer, Failure, Request
from nexus_ray.synthesis.throttle import Outcome

Exchange = Callable[[list[Settled], list[Tokens]], Permit]
"""`Gate.exchange` for one holder, waiting for the reply: the model waits for nobody else meanwhile."""


class Metered:
    """`Generator` around one that draws requests as it has room and whose answers cost nothing but time."""

    def __init__(self, inner: Generator, exchange: Exchange) -> None:
        self._inner = inner
        self.exchange = exchange

    @property
    def revision(self) -> str:
        return self._inner.revision

    async def generate(
        self, requests: Iterable[Request], on_sent: OnSent | None = None
    ) -> AsyncIterator[Answer | Failure]:
        """Answers in order of arrival. Raises BudgetExhausted once all that was permitted has been answered."""
        drawn = _Drawn(self, iter(requests))
        while not drawn.ended:
            async for item in self._inner.generate(drawn, on_sent):
                drawn.settle(item)
                yield item
            drawn.report()
        if drawn.exhausted:
            raise exhausted(drawn.exhausted)

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Drawn:
    """The requests that the gate lets through; iterating again goes on after the last one."""

    def __init__(self, meter: Metered, source: Iterator[Request]) -> None:
        self._meter = meter
        self._source = source
        self._next: Request | None = None
        self._open: dict[str, tuple[Tokens, int]] = {}
        self._settled: list[Settled] = []
        self.ended = False
        self.exhausted = ""

    def __iter__(self) -> Iterator[Request]:
        while True:
            if self._next is None:
                self._next = next(self._source, None)
            if self._next is None:
                self.ended = True
                return
            bound = prompt_bound(self._next)
            settled, self._settled = self._settled, []
            permit = self._meter.exchange(settled, [bound])
            if not permit.count:
                self.exhausted = permit.exhausted
                self.ended = bool(permit.exhausted)
                return  # what is under way holds the rest of the budget: it comes to an end first
            request, self._next = self._next, None
            self._open[request.id(self._meter.revision)] = bound, permit.epoch
            yield request

    def settle(self, item: Answer | Failure) -> None:
        bound, epoch = self._open.pop(item.request_id)
        used = Tokens(item.prompt_tokens, item.completion_tokens) if isinstance(item, Answer) else Tokens()
        self._settled.append(Settled(Outcome("ok", epoch), bound, used))

    def report(self) -> None:
        """Tell the gate of what has ended."""
        if self._settled:
            settled, self._settled = self._settled, []
            self._meter.exchange(settled, [])
