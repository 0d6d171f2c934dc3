"""Shards on a cluster: a pool of Ray Data actors that each hold a generator and a judge, and one door to all endpoints.

Everything of consequence is in the ledger's logs, so an actor that dies is simply replaced: its shards are opened again
and go on. Errors come back as values. A stop is a file beside the ledger, which also works across machines.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import pickle
import queue
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from nexus_ray.config.generators import BudgetConfig, LocalGenerator, ThrottleConfig
from nexus_ray.config.synthesis import SynthesisConfig
from nexus_ray.errors import NexusError, SynthesisError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.budget import Account, Budget
from nexus_ray.synthesis.generators.build import AnyGenerator, asks_gate, build_generator
from nexus_ray.synthesis.generators.gate import LocalGate, Permit, Settled, Tokens, account_after
from nexus_ray.synthesis.generators.metered import Metered
from nexus_ray.synthesis.generators.protocol import Generator, Line
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.setup import AnswerJudge, JobSpec
from nexus_ray.synthesis.shard_log import ShardLog
from nexus_ray.synthesis.throttle import Throttle, strictest
from nexus_ray.synthesis.worker import Asker, work_shards

STOP_FILE = ("control", "stop")
HOLD_FILE = ("control", "hold")
"""While it is there no worker opens a shard of a higher number than it says."""
BUDGET_FILE = "budget.json"
SAVE_S = 1.0
"""How old the saved budget may be while calls are made."""
RETRY_S = 0.2
"""When to ask an actor again that is not there."""
DOWN_S = 120.0
"""An actor that starts again has come back by then."""
UNTHROTTLED = ThrottleConfig(max_in_flight=4096)
"""For models of this cluster, which take what they have room for."""
MOST_SHARDS = 64
"""Of a worker, however small they are: each has a thread that waits for it."""
LOOK_S = 1.0
"""How often a worker looks for files of the driver."""
TICK_S = 1.0
"""How often the driver looks after the budget while nothing ends."""


class Doors:
    """The gates of a job's endpoints and its one budget; lives in an actor, or in the process of a local job.

    An endpoint, that is an address and a model, has one gate, whatever roles ask it; a model that a worker runs for
    itself, in its process or behind a server of its own, has one for each worker and role. All of them are this job's:
    another job at the same endpoint has its own, and only the server's refusals tell either of the other.

    It may die and start again while its workers go on. The budget is saved in the job's folder each second, and each
    worker tells, with the first exchange it has with the new one, what its calls have used and which are in flight.
    Until it has, what was saved of it counts; throttles begin at their first limit.
    """

    def __init__(
        self, roles: Mapping[str, AnyGenerator], budget: BudgetConfig, saved: Any, *, folder: Storage, session: str
    ) -> None:
        """`roles`: `generator` and, if there is one, `judge`. `saved`: what `state` of an earlier session gave, or
        None. `session`: a name that no other run of the job has; state saved under it is this object's own."""
        models = {config.model for config in roles.values() if asks_gate(config)}
        saved = _saved_by(folder, session) or saved
        self._roles = roles
        self._budget = Budget(budget, models=models, clock=time.monotonic, saved=saved)
        self._gates: dict[tuple[str, str], LocalGate] = {}
        self._heard: set[str] = set()
        """Names that have had an exchange with this object."""
        self._folder = folder
        self._session = session
        self._saving = asyncio.Lock()
        self._saved_at = time.monotonic()

    async def exchange(
        self, role: str, settled: Sequence[Settled], wanted: Sequence[Tokens], holder: str, account: Account
    ) -> Permit:
        """See `Gate`; `account`: what the holder knows from all exchanges that were answered before."""
        gate, name = self._gate(role, holder), _name(role, holder)
        if name not in self._heard:
            self._heard.add(name)
            gate.announce(account, name)
        permit = await gate.exchange(settled, wanted, name)
        if time.monotonic() - self._saved_at >= SAVE_S:
            await self._save()
        return permit

    async def forget(self, holder: str) -> None:
        """A worker has started anew: what its former self held is free. Safe when this returns, so that an account of
        the new one is never taken for that of the former."""
        for role in self._roles:
            name = _name(role, holder)
            self._gate(role, holder).forget(name)
            self._heard.discard(name)
            self._gates.pop((role, holder), None)
        await self._save()

    async def report(
        self, done: int, planned: int, accepted: int, *, borrowed: int = 0, target: int | None = None
    ) -> dict[str, Any]:
        """State of the budget (saved by now), forecast, cost of an accepted row, and limits of the throttles."""
        await self._save()
        return {
            "state": self._budget.state(),
            "forecast": self._budget.forecast(done, planned, borrowed=borrowed, accepted=accepted, target=target),
            "per_accepted": self._budget.per_accepted(accepted),
            "in_flight": {role: _in_flight(self._gates_of(role)) for role in self._roles},
        }

    def _gate(self, role: str, holder: str) -> LocalGate:
        config, endpoint = self._roles[role], _endpoint(self._roles[role])
        key = endpoint or (role, holder)
        if key not in self._gates:
            asking = [one for one in self._roles.values() if endpoint and _endpoint(one) == endpoint] or [config]
            limits = strictest([getattr(one, "throttle", UNTHROTTLED) for one in asking])
            throttle = Throttle(limits, clock=time.monotonic)
            self._gates[key] = LocalGate(throttle, model=config.model, budget=self._budget)
        return self._gates[key]

    def _gates_of(self, role: str) -> list[LocalGate]:
        endpoint = _endpoint(self._roles[role])
        return [gate for key, gate in self._gates.items() if key == endpoint or key[0] == role]

    async def _save(self) -> None:
        async with self._saving:
            self._saved_at = time.monotonic()
            state = {**self._budget.state(), "session": self._session}
            await asyncio.to_thread(self._folder.write_json, state, BUDGET_FILE)


def _endpoint(config: AnyGenerator) -> tuple[str, str] | None:
    """Address and model of a server that all workers share; None if each has its own."""
    address = getattr(config, "base_url", None)
    return None if address is None else (address, config.model)


def _name(role: str, holder: str) -> str:
    """What gates and budget know a worker's role by: two roles at one gate compete for it like two workers."""
    return f"{role} of {holder}"


def _in_flight(gates: Sequence[LocalGate]) -> dict[str, int]:
    throttles = [gate.throttle for gate in gates]
    return {
        "limit": sum(throttle.limit for throttle in throttles),
        "lowest": min((throttle.lowest for throttle in throttles), default=0),
        "now": sum(throttle.in_flight for throttle in throttles),
    }


def _saved_by(folder: Storage, session: str) -> Any:
    """What this session has saved; None if it has just begun."""
    found = folder.read_json(BUDGET_FILE) if folder.exists(BUDGET_FILE) else {}
    return found if found.get("session") == session else None


class _RemoteDoor:
    """`Gate` of one role, in a worker.

    An exchange whose answer was lost with the actor is had again with the new one, which has not seen it: the account
    that goes along holds what was answered, and nothing else. So nothing counts twice, and no lease is lost.
    """

    def __init__(self, doors: Any, role: str) -> None:
        # Ray's own retry would send the account along as it was, and others of this role may have had answers since
        self._send = doors.exchange.options(max_task_retries=0).remote
        self._role = role
        self._account = Account()
        self._down_since: float | None = None

    async def exchange(self, settled: Sequence[Settled], wanted: Sequence[Tokens], holder: str) -> Permit:
        from ray.exceptions import RayActorError

        while True:
            try:
                permit = await self._send(self._role, list(settled), list(wanted), holder, self._account)
            except RayActorError as error:
                self._check(error)
                await asyncio.sleep(RETRY_S)
            else:
                return self._noted(permit, settled, wanted)

    def exchange_now(self, settled: Sequence[Settled], wanted: Sequence[Tokens], holder: str) -> Permit:
        """The same for ordinary code: it waits for the answer."""
        import ray
        from ray.exceptions import RayActorError

        while True:
            try:
                permit = ray.get(self._send(self._role, list(settled), list(wanted), holder, self._account))
            except RayActorError as error:
                self._check(error)
                time.sleep(RETRY_S)
            else:
                return self._noted(permit, settled, wanted)

    def _noted(self, permit: Permit, settled: Sequence[Settled], wanted: Sequence[Tokens]) -> Permit:
        self._account = account_after(self._account, settled, wanted[: permit.count])
        self._down_since = None
        return permit

    def _check(self, error: Exception) -> None:
        """Raise SynthesisError once the actor has not come back for `DOWN_S`."""
        now = time.monotonic()
        self._down_since = now if self._down_since is None else self._down_since
        if now - self._down_since > DOWN_S:
            raise SynthesisError(
                f"the actor that keeps the job's budget and throttles has not come back for {DOWN_S:g} s "
                f"({type(error).__name__}); everything answered is kept: run again to go on"
            ) from error


class ShardWorker:
    """Ray Data's callable: a row with a shard's number in, a row with its outcome out.

    Several calls wait here, each for its shard, while one thread works on all of them in one stream of calls.
    """

    def __init__(self, spec: JobSpec, doors: Any) -> None:
        self._spec = spec
        self._ledger: Ledger | None = None
        self._doors = doors
        self._tools: tuple[Line, AnswerJudge] | None = None
        self._stop = _StopFile(spec.ledger)
        self._hold = _Hold(spec.ledger)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._waiting: dict[int, Future[None]] = {}
        self._lock = threading.Lock()
        self._open: dict[int, Future[None]] = {}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        ended: Future[None] = Future()
        with self._lock:
            self._waiting[int(row["shard"])] = ended
        self._thread.submit(self._work)
        outcome: NexusError | None = None
        try:
            ended.result()
        except NexusError as error:
            outcome = error
        return {"shard": row["shard"], "outcome": pickle.dumps(outcome)}

    def _work(self) -> None:
        """Work on the shards that wait, and on those that come meanwhile; there may be none left."""
        if not self._waiting:
            return
        error: BaseException | None = None
        try:
            while self._waiting and not self._stop():
                if min(list(self._waiting)) > self._hold():
                    time.sleep(LOOK_S)
                    continue
                line, judge = self._tools = self._tools or self._made()
                threads = self._spec.config.judge_threads
                work_shards(self._open_next, line, judge, threads=threads, stop=self._stop, ended=self._ended)
        except BaseException as caught:  # raised again by the calls that wait
            error = caught
            self._stop.asked = True  # what ended one shard would end the next, at the cost of its requests
        if self._stop.asked:
            self._give_up(error)

    def _open_next(self) -> ShardLog | None:
        with self._lock:
            shard = min(self._waiting, default=None)
            if shard is None or shard > self._hold():
                return None
            self._open[shard] = self._waiting.pop(shard)
        if self._ledger is None:
            self._ledger = Ledger(self._spec.ledger, self._spec.job, attempts=self._spec.config.attempts)
        return self._ledger.write(shard)

    def _ended(self, shard: int) -> None:
        self._open.pop(shard).set_result(None)

    def _give_up(self, error: BaseException | None) -> None:
        """Let go of the calls whose shards are open or wait."""
        with self._lock:
            calls = [*self._open.values(), *self._waiting.values()]
            self._open, self._waiting = {}, {}
        for ended in calls:
            ended.set_result(None) if error is None else ended.set_exception(error)

    def _made(self) -> tuple[Line, AnswerJudge]:
        import ray

        config = self._spec.config
        holder = ray.get_runtime_context().get_actor_id() or f"{os.uname().nodename}-{os.getpid()}"
        ray.get(self._doors.forget.remote(holder))
        stats = Ledger(self._spec.ledger, self._spec.job, attempts=config.attempts).stats()
        proven = stats.answered > stats.traffic.borrowed
        generator = self._generator(config.generator, "generator", holder, proven=proven)
        ask = None
        if config.judge is not None:
            ask = Asker(self._generator(config.judge, "judge", holder), alone=not asks_gate(config.judge))
        return Line(generator), AnswerJudge(self._spec, ask)

    def _generator(self, section: AnyGenerator, role: str, holder: str, *, proven: bool = False) -> Generator:
        config = self._spec.config
        gate = _RemoteDoor(self._doors, role)
        gpu = bool(config.worker_gpus)
        built = build_generator(
            section,
            storage=self._spec.storage,
            gate=gate,
            holder=holder,
            threads=config.cpus_per_worker,
            gpu=gpu,
            proven=proven,
        )
        if asks_gate(section):
            return built
        return Metered(built, lambda settled, wanted: gate.exchange_now(settled, wanted, holder))


class _StopFile:
    """Whether the job was asked to stop; looks at most once in `LOOK_S`."""

    def __init__(self, ledger: Storage) -> None:
        self._ledger = ledger
        self.asked = False
        self._next = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self.asked and now >= self._next:
            self.asked, self._next = self._ledger.exists(*STOP_FILE), now + LOOK_S
        return self.asked


class _Hold:
    """The highest number of a shard that may be opened; looks at most once in `LOOK_S`."""

    def __init__(self, ledger: Storage) -> None:
        self._ledger = ledger
        self._highest = math.inf
        self._next = 0.0

    def __call__(self) -> float:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LOOK_S
            try:
                self._highest = int(self._ledger.read_text(*HOLD_FILE)) if self._ledger.exists(*HOLD_FILE) else math.inf
            except FileNotFoundError:  # just deleted
                self._highest = math.inf
        return self._highest


def start_doors(spec: JobSpec, saved: Any) -> Any:
    """The actor that all workers ask. It takes no CPU of its own, stays on this machine, whose end would be the job's,
    and starts again if it dies. `saved`: what earlier sessions used, or None.

    Raises ConfigError and DataError as `Budget` does.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    config = spec.config
    given = {"generator": config.generator, "judge": config.judge}
    roles = {role: one for role, one in given.items() if one is not None}
    made = partial(Doors, roles, config.budget, saved, folder=spec.ledger, session=secrets.token_hex(8))
    made()  # what is wrong with it is told here, not by the death of an actor
    actor = ray.remote(
        num_cpus=0,
        max_concurrency=1000,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    )(Doors)
    return actor.remote(*made.args, **made.keywords)


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
                # what is prefetched would be held back until the next shard has ended
                for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                    for shard, outcome in zip(batch["shard"], batch["outcome"], strict=True):
                        arrived.put((int(shard), pickle.loads(outcome)))
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
