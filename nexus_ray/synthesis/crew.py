"""Shards on a cluster: a pool of Ray Data actors that each hold a generator and a judge, and one door to all endpoints.

Everything of consequence is in the ledger's logs, so an actor that dies is simply replaced: its shards are opened again
and go on. Errors come back as values. A stop is a file beside the ledger, which also works across machines.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nexus_ray.config.generators import BudgetConfig, LocalGenerator, ThrottleConfig
from nexus_ray.config.synthesis import SynthesisConfig
from nexus_ray.errors import NexusError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.budget import Budget
from nexus_ray.synthesis.generators.build import AnyGenerator, asks_gate, build_generator
from nexus_ray.synthesis.generators.gate import LocalGate, Permit, Settled, Tokens
from nexus_ray.synthesis.generators.metered import Metered
from nexus_ray.synthesis.generators.protocol import Generator, Line
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.setup import AnswerJudge, JobSpec
from nexus_ray.synthesis.shard_log import ShardLog
from nexus_ray.synthesis.throttle import Throttle
from nexus_ray.synthesis.worker import Asker, work_shards

STOP_FILE = ("control", "stop")
UNTHROTTLED = ThrottleConfig(max_in_flight=4096)
"""For models of this cluster, which take what they have room for."""
MOST_SHARDS = 64
"""Of a worker, however small they are: each has a thread that waits for it."""
TICK_S = 1.0
"""How often the driver looks after the budget while nothing ends."""


class Doors:
    """The gates of a job's endpoints and its one budget; lives in an actor, or in the process of a local job."""

    def __init__(self, roles: Mapping[str, AnyGenerator], budget: BudgetConfig, saved: Any) -> None:
        """`roles`: `generator` and, if there is one, `judge`. `saved`: what `state` gave earlier, or None."""
        models = {config.model for config in roles.values() if asks_gate(config)}
        self._budget = Budget(budget, models=models, clock=time.monotonic, saved=saved)
        throttles = {role: getattr(config, "throttle", UNTHROTTLED) for role, config in roles.items()}
        self._gates = {
            role: LocalGate(Throttle(throttles[role], clock=time.monotonic), model=config.model, budget=self._budget)
            for role, config in roles.items()
        }

    async def exchange(self, role: str, settled: Sequence[Settled], wanted: Sequence[Tokens], holder: str) -> Permit:
        return await self._gates[role].exchange(settled, wanted, holder)

    async def forget(self, holder: str) -> None:
        """A worker has started anew: what its former self held is free."""
        for gate in self._gates.values():
            gate.throttle.forget(holder)
        self._budget.forget(holder)

    async def report(self, done: int, planned: int, accepted: int) -> dict[str, Any]:
        """State of the budget (to be saved), forecast, cost of an accepted row, and limits of the throttles."""
        forecast = self._budget.forecast(done, planned)
        return {
            "state": self._budget.state(),
            "forecast": forecast,
            "per_accepted": self._budget.per_accepted(accepted),
            "in_flight": {
                role: {"limit": gate.throttle.limit, "lowest": gate.throttle.lowest, "now": gate.throttle.in_flight}
                for role, gate in self._gates.items()
            },
        }


class _RemoteDoor:
    """`Gate` of one role, in a worker."""

    def __init__(self, doors: Any, role: str) -> None:
        self._doors = doors
        self._role = role

    async def exchange(self, settled: Sequence[Settled], wanted: Sequence[Tokens], holder: str) -> Permit:
        permit: Permit = await self._doors.exchange.remote(self._role, list(settled), list(wanted), holder)
        return permit


class ShardWorker:
    """Ray Data's callable: a row with a shard's number in, a row with its outcome out.

    Several calls wait here, each for its shard, while one thread works on all of them in one stream of calls.
    """

    def __init__(self, spec: JobSpec, doors: Any) -> None:
        self._spec = spec
        self._doors = doors
        self._tools: tuple[Line, AnswerJudge] | None = None
        self._stop = _StopFile(spec.ledger)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._waiting: queue.SimpleQueue[tuple[int, Future[None]]] = queue.SimpleQueue()
        self._open: dict[int, Future[None]] = {}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        ended: Future[None] = Future()
        self._waiting.put((int(row["shard"]), ended))
        self._thread.submit(self._work)
        outcome: NexusError | None = None
        try:
            ended.result()
        except NexusError as error:
            outcome = error
        return {"shard": row["shard"], "outcome": pickle.dumps(outcome)}

    def _work(self) -> None:
        """Work on the shards that wait, and on those that come meanwhile; there may be none left."""
        if self._waiting.empty():
            return
        error: BaseException | None = None
        try:
            if not self._stop():
                line, judge = self._tools = self._tools or self._made()
                threads = self._spec.config.judge_threads
                work_shards(self._open_next, line, judge, threads=threads, stop=self._stop, ended=self._ended)
        except BaseException as caught:  # raised again by the calls that wait
            error = caught
            self._stop.asked = True  # what ended one shard would end the next, at the cost of its requests
        if self._stop.asked:
            self._give_up(error)

    def _open_next(self) -> ShardLog | None:
        try:
            shard, ended = self._waiting.get_nowait()
        except queue.Empty:
            return None
        self._open[shard] = ended
        ledger = Ledger(self._spec.ledger, self._spec.job, attempts=self._spec.config.attempts)
        return ledger.write(shard)

    def _ended(self, shard: int) -> None:
        self._open.pop(shard).set_result(None)

    def _give_up(self, error: BaseException | None) -> None:
        """Let go of the calls whose shards are open or wait."""
        calls, self._open = list(self._open.values()), {}
        while not self._waiting.empty():
            calls.append(self._waiting.get()[1])
        for ended in calls:
            ended.set_result(None) if error is None else ended.set_exception(error)

    def _made(self) -> tuple[Line, AnswerJudge]:
        import ray

        config = self._spec.config
        holder = ray.get_runtime_context().get_actor_id() or f"{os.uname().nodename}-{os.getpid()}"
        ray.get(self._doors.forget.remote(holder))
        generator = self._generator(config.generator, "generator", holder)
        ask = None
        if config.judge is not None:
            ask = Asker(self._generator(config.judge, "judge", holder), alone=not asks_gate(config.judge))
        return Line(generator), AnswerJudge(self._spec, ask)

    def _generator(self, section: AnyGenerator, role: str, holder: str) -> Generator:
        import ray

        config, doors = self._spec.config, self._doors
        gate = _RemoteDoor(doors, role)
        gpu = bool(config.worker_gpus)
        built = build_generator(
            section,
            storage=self._spec.storage,
            gate=gate,
            holder=holder,
            threads=config.cpus_per_worker,
            gpu=gpu,
        )
        if asks_gate(section):
            return built
        return Metered(built, lambda settled, wanted: ray.get(doors.exchange.remote(role, settled, wanted, holder)))


class _StopFile:
    """Whether the job was asked to stop; looks at most once a second."""

    def __init__(self, ledger: Storage) -> None:
        self._ledger = ledger
        self.asked = False
        self._next = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self.asked and now >= self._next:
            self.asked, self._next = self._ledger.exists(*STOP_FILE), now + 1.0
        return self.asked


def start_doors(spec: JobSpec, saved: Any) -> Any:
    """The actor that all workers ask; it takes no CPU of its own and starts again if it dies."""
    import ray

    config = spec.config
    roles = {"generator": config.generator, "judge": config.judge}
    actor = ray.remote(num_cpus=0, max_concurrency=1000)(Doors)
    return actor.remote({role: one for role, one in roles.items() if one is not None}, config.budget, saved)


def shards_at_once(config: SynthesisConfig) -> int:
    """Shards that a worker is given: those that calls in flight may belong to, one that a slow answer keeps open, and
    the next one. More are opened only when their turn comes."""
    generator = config.generator
    in_flight = 2 * generator.batch_size if isinstance(generator, LocalGenerator) else generator.throttle.max_in_flight
    return min(MOST_SHARDS, math.ceil(in_flight / config.shard_requests) + 3)


def shard_outcomes(spec: JobSpec, shards: Sequence[int], doors: Any) -> Iterator[tuple[int, NexusError | None] | None]:
    """Outcome of each shard as it ends, in any order; None every `TICK_S` in between.

    Raises what Ray raises when no worker can be started.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    config = spec.config
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            with ray.data.DataContext.current(context):
                rows = [{"shard": shard} for shard in shards]
                dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                    ShardWorker,
                    fn_constructor_args=(spec, doors),
                    compute=ray.data.ActorPoolStrategy(
                        size=min(config.workers, len(rows)),
                        max_tasks_in_flight_per_actor=shards_at_once(config),
                        max_concurrent_calls_per_actor=shards_at_once(config),
                        enable_true_multi_threading=True,
                    ),
                    num_cpus=config.cpus_per_worker,
                    num_gpus=config.worker_gpus or None,
                )
                for row in dataset.iter_rows():
                    arrived.put((int(row["shard"]), pickle.loads(row["outcome"])))
        except BaseException as error:  # raised again in the driver's thread
            arrived.put(error)
        else:
            arrived.put(None)

    threading.Thread(target=work, name="shards", daemon=True).start()
    while True:
        try:
            item = arrived.get(timeout=TICK_S)
        except queue.Empty:
            yield None
            continue
        if item is None:
            return
        if isinstance(item, BaseException):
            raise item
        yield item
