"""The letter box between a study's driver and the processes of its trials: questions are kept until they are answered.

The driver alone decides and writes; so a study whose driver dies is never written to by what it left behind.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from nexus_ray.study.turns import Ended, Message, Told, Wanted
from nexus_ray.train.watch import Answer, Evaluated


@dataclass(frozen=True)
class Loaded:
    """A process has loaded what trials need; it is answered when one can begin there."""

    place: int
    """Which of the study's places it is started for, from 0 on; started anew, it asks again."""


Letter = Message | Loaded


class Box:
    """An asynchronous Ray actor, known by its name; it ends with the driver."""

    def __init__(self) -> None:
        self._letters: asyncio.Queue[tuple[int, Letter]] = asyncio.Queue()
        self._open: dict[int, asyncio.Future[Any]] = {}
        self._count = 0

    async def ask(self, message: Letter) -> Any:
        """Put in a message, and wait for its answer."""
        self._count += 1
        number = self._count
        self._open[number] = asyncio.get_running_loop().create_future()
        await self._letters.put((number, message))
        return await self._open[number]

    async def take(self) -> tuple[int, Letter]:
        """The next message, once there is one."""
        return await self._letters.get()

    async def answer(self, number: int, value: Any) -> None:
        waiting = self._open.pop(number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(value)


@dataclass(frozen=True)
class Line:
    """A trial's line to the box, from any process of its cluster; a `Watcher`."""

    box: str
    """Name of the actor."""
    trial: str = ""
    """Its id; empty in a process that is still to get one."""

    def __call__(self, evaluated: Evaluated) -> Answer:
        answer: Answer = self._ask(Told(self.trial, evaluated))
        return answer

    def loaded(self, place: int) -> None:
        """Wait until a trial can begin in a place."""
        self._ask(Loaded(place))

    def config(self) -> Any:
        """The config to run."""
        return self._ask(Wanted(self.trial))

    def end(self, message: Ended) -> None:
        self._ask(message)

    def _ask(self, message: Letter) -> Any:
        import ray

        return ray.get(ray.get_actor(self.box).ask.remote(message))
