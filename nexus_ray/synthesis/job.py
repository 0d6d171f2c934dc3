"""`nexus-ray synthesize`: plan, hand out shards, commit in order, stop where a cap, a target or a person says so.

The driver is the one process that commits. Killed anywhere and started again, it ends with the same accepted rows.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from nexus_ray.config.tree import RunConfig
from nexus_ray.corpora.prepare import prepare_documents
from nexus_ray.errors import DataError, Interrupted, NexusError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.budget import BudgetExhausted, price_units
from nexus_ray.synthesis.commit import Committer
from nexus_ray.synthesis.counts import Stats
from nexus_ray.synthesis.crew import BUDGET_FILE, HOLD_FILE, STOP_FILE, shard_outcomes, start_doors
from nexus_ray.synthesis.diversity import measure_diversity
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.setup import JobSpec, PlanOrder, needed_domains, open_job
from nexus_ray.synthesis.shard_log import ShardState, read_state
from nexus_ray.synthesis.validators.calibration import calibrations

Say = Callable[[str], None]
SUMMARY_FILE = "summary.json"
UNANSWERED = "requests without an answer hold back the rows behind them; the same command asks them again"
SAY_S = 15.0
"""Seconds between lines while nothing ends."""
REPORT_S = 60.0
"""Wait for the budget's figures; they come late while its actor starts again."""


@dataclass(frozen=True)
class JobOutcome:
    """What a job came to."""

    ledger: Ledger
    stats: Stats
    cost: dict[str, float] | None
    """Requests, tokens, money and seconds per accepted row; None while there is none."""
    diversity: list[dict[str, Any]]
    """Rows of the table: accepted text beside as much of the anchor; empty without an anchor, or with too little."""
    overlap: list[dict[str, Any]]
    """How much of what must stay unseen the accepted rows hold, by held-out domain and benchmark."""
    stopped: str
    """Why it ended before its plan did; empty if it did not."""


def synthesize(config: RunConfig, domain: str, *, progress: Say = lambda text: None) -> JobOutcome:
    """Run, or go on with, the job `synthesis.<domain>` of a resolved config. The caller has started Ray.

    Raises ConfigError for settings that cannot be used, SynthesisError where the teacher cannot go on (all that
    arrived is kept), Interrupted after Ctrl-C.
    """
    documents = prepare_documents(config, needed_domains(config, domain), progress=progress)
    spec = open_job(config, domain, documents, progress=progress)
    ledger = Ledger(spec.ledger, spec.job, attempts=spec.config.attempts)
    with spec.ledger.lock("locks/driver", 1.0):
        spec.ledger.delete(*STOP_FILE)
        spec.ledger.delete(*HOLD_FILE)
        plan = ledger.plan(spec.requests(), shard_requests=spec.config.shard_requests)
        progress(f"{domain}: {plan.requests:,} requests in {len(plan.shards)} shards; ledger {spec.ledger.uri}")
        for folder in spec.config.borrow:
            borrowed = ledger.borrow(Ledger.load(Storage(folder)))
            progress(f"{domain}: {borrowed:,} answers taken over from {folder}")
        return _Driver(spec, ledger, progress).run()


class _Driver:
    def __init__(self, spec: JobSpec, ledger: Ledger, say: Say) -> None:
        self.spec, self.ledger, self.say = spec, ledger, say
        self.stopped = ""
        self.error: NexusError | None = None
        self.costs: dict[str, Any] = {}
        self._said = 0.0
        self._warned = False
        self._ended: dict[int, int] = {}  # shards not committed yet: rows of each that their filters passed
        self._held: int | None = None  # no shard of a higher number is opened

    def run(self) -> JobOutcome:
        try:
            with self.ledger.committer(PlanOrder(self.spec)) as committer, _asked_to_stop(self._stop):
                committer.commit(target=self.spec.config.target)
                committer.fold_decisions()
                if not committer.reached(self.spec.config.target):
                    self._work(committer)
                committer.fold_decisions()
        except Exception as error:
            self.stopped = self.stopped or (str(error) if isinstance(error, NexusError) else type(error).__name__)
            self._outcome()  # what was done until then is in the summary, whatever ended it
            raise
        outcome = self._outcome()
        if self.error is not None and not isinstance(self.error, BudgetExhausted):
            raise self.error
        if self.stopped == "interrupted":
            raise Interrupted(
                f"{self.spec.domain}: interrupted; {outcome.stats.accepted:,} rows are accepted, and the same command "
                f"goes on"
            )
        return outcome

    def _work(self, committer: Committer) -> None:
        shards = list(self.ledger.open_shards())
        if not shards:
            return
        doors = start_doors(self.spec, self._saved_budget())
        for item in shard_outcomes(self.spec, shards, doors):
            if item is not None and item[1] is not None:
                self.error = self.error or item[1]
                self._stop(str(self.error))
            committer.commit(target=self.spec.config.target)
            if item is not None and self.spec.config.target is not None:
                self._ended[item[0]] = _passed(read_state(self.spec.ledger, item[0]))
            self._hold_back(committer)
            self._look_after(doors, committer)
            if not self.stopped and committer.reached(self.spec.config.target):
                self._stop("target")
        self.spec.ledger.delete(*HOLD_FILE)
        self._look_after(doors, committer, last=True)
        if not self.stopped and len(self.ledger.open_shards()):
            self.stopped = UNANSWERED

    def _hold_back(self, committer: Committer) -> None:
        """Have no shard opened behind those that ended before their turn with rows enough for the target: what holds
        them back is a call that takes its time, and what is asked meanwhile would be paid for nothing."""
        target, first = self.spec.config.target, committer.manifest.shards
        if target is None or self.stopped or committer.reached(target):
            return
        self._ended = {shard: rows for shard, rows in self._ended.items() if shard >= first}
        rows, last = committer.manifest.rows("accepted"), None
        for shard in sorted(self._ended):
            rows += self._ended[shard]
            if rows >= target:
                last = shard
                break
        if last is not None and first in self._ended:  # ended and not complete: nothing more is committed today
            self._stop(UNANSWERED)
        elif last is None and self._held is not None:
            self.spec.ledger.delete(*HOLD_FILE)
        elif last is not None and last != self._held:
            self.spec.ledger.write_text(f"{last}\n", *HOLD_FILE)
        self._held = last

    def _stop(self, why: str) -> None:
        if not self.stopped:
            self.stopped = why
            self.spec.ledger.write_text(f"{why}\n", *STOP_FILE)

    # --- budget and figures ------------------------------------------------------------------------------------------

    def _saved_budget(self) -> dict[str, Any] | None:
        """What earlier sessions used: as saved, but no less than the logs tell. Whose calls they were is of no matter
        any more: their workers are gone."""
        folder = self.spec.ledger
        saved = folder.read_json(BUDGET_FILE) if folder.exists(BUDGET_FILE) else None
        stats = self.ledger.stats()
        borrowed = stats.traffic
        least = {
            "requests": borrowed.sent,
            "prompt_tokens": stats.prompt_tokens - borrowed.borrowed_prompt_tokens,
            "completion_tokens": stats.completion_tokens - borrowed.borrowed_completion_tokens,
        }
        price = self.spec.config.budget.prices.get(self.spec.config.generator.model)
        tokens = least["prompt_tokens"], least["completion_tokens"]
        least["units"] = price_units(price, *tokens) if price is not None else 0
        if saved is None:
            return {**least, "seconds": 0.0} if least["requests"] else None
        used = {name: max(value, saved.get(name, 0)) for name, value in least.items()}
        return {**used, "seconds": saved.get("seconds")}

    def _look_after(self, doors: Any, committer: Committer, *, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._said < SAY_S:
            return
        self._said = now
        import ray

        stats = self.ledger.stats()
        done = stats.answered + stats.failed
        report = doors.report.remote(
            done, stats.planned, stats.accepted, borrowed=stats.traffic.borrowed, target=self.spec.config.target
        )
        try:
            self.costs = ray.get(report, timeout=REPORT_S)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            self.say(f"{self.spec.domain}: no figures of the budget for now ({type(error).__name__})")
            return
        self.say(_line(self.spec.domain, stats, self.costs))
        forecast = self.costs["forecast"]
        if forecast is not None and forecast.exceeded and not self._warned:
            self._warned = True
            caps = ", ".join(f"budget.{name} after {share:.0%} of the job" for name, share in forecast.exceeded.items())
            self.say(
                f"warning: at this rate the job needs {forecast.requests:,} requests, {forecast.tokens:,} tokens, "
                f"{forecast.money:.2f} of money and {forecast.seconds:,.0f} s, and stops at {caps}"
            )

    def _outcome(self) -> JobOutcome:
        stats = self.ledger.stats()
        diversity = self._diversity()
        overlap = self.spec.overlap((row.id, row.text) for row in self.ledger.rows())
        cost = self.costs.get("per_accepted")
        forecast = self.costs.get("forecast")
        summary = {
            "stopped": self.stopped,
            "manifest": self.ledger.manifest().fingerprint,
            "stats": stats.to_json(),
            "per_accepted": cost,
            "forecast": asdict(forecast) if forecast is not None else None,
            "in_flight": self.costs.get("in_flight"),
            "diversity": diversity,
            "overlap": overlap,
            "judges": calibrations(self.spec.ledger),
        }
        self.spec.ledger.write_json(summary, SUMMARY_FILE)
        return JobOutcome(self.ledger, stats, cost, diversity, overlap, self.stopped)

    def _diversity(self) -> list[dict[str, Any]]:
        anchor = self.spec.config.anchor
        if anchor is None:
            return []
        real = (text for _, text in self.spec.corpora[anchor].texts("train"))
        try:
            return measure_diversity((row.text for row in self.ledger.rows()), real, seed=0).table()
        except DataError as error:
            self.say(f"no diversity table: {error}")
            return []


def _passed(state: ShardState) -> int:
    """Rows of a shard that may be accepted when its turn comes."""
    return sum(row.verdict.outcome == "pass" for rows in state.rows.values() for row in rows)


@contextmanager
def _asked_to_stop(stop: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets calls in flight come back; the second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def once(number: int, frame: Any) -> None:
        for known, handler in before.items():
            signal.signal(known, handler)
        stop("interrupted")

    for number in before:
        signal.signal(number, once)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _line(domain: str, stats: Stats, costs: dict[str, Any]) -> str:
    done = stats.answered + stats.failed
    state = costs["state"]
    rate = stats.completion_tokens / state["seconds"] if state["seconds"] else 0.0
    parts = [
        f"{domain}: {done:,} of {stats.planned:,} answered",
        f"{stats.accepted:,} rows accepted",
        f"{stats.rejected:,} rejected",
    ]
    parts += [f"{stats.flagged:,} flagged"] if stats.flagged else []
    parts += [f"{stats.failed:,} failed"] if stats.failed else []
    parts += [f"{stats.uncommitted:,} waiting"] if stats.uncommitted else []
    return ", ".join([*parts, f"{rate:,.0f} tokens/s"])
