"""What a job has done so far in figures: from the manifest what is committed, from logs what went over the wire.

Invariant: only what does not depend on crashes or timing is in the manifest. How often something was sent is in the
logs alone; `stats.json` remembers the sum over committed shards, and is made again from the logs where it lags behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nexus_ray.corpora.parts import STATS_FILE, Manifest
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.plan import Plan, read_requests
from nexus_ray.synthesis.shard_log import ShardState, log_name, read_state


@dataclass(frozen=True)
class Traffic:
    """Requests and answers of some shards, as their logs tell it."""

    sent: int = 0
    """Requests that went out, each time counted."""
    resent: int = 0
    """Those among them that had been in flight when a writer died."""
    borrowed: int = 0
    """Answers taken over from another job: not paid by this one."""
    borrowed_prompt_tokens: int = 0
    borrowed_completion_tokens: int = 0
    failed_by: Mapping[str, int] = field(default_factory=dict)
    """Requests given up, by the reason of their last failure."""

    def __add__(self, other: Traffic) -> Traffic:
        numbers = {
            item.name: getattr(self, item.name) + getattr(other, item.name)
            for item in fields(self)
            if item.name != "failed_by"
        }
        return Traffic(**numbers, failed_by=_summed(self.failed_by, other.failed_by))

    @classmethod
    def of(cls, ids: Sequence[str], state: ShardState, attempts: int) -> Traffic:
        """What the log of one shard says."""
        borrowed = [state.answers[id] for id in sorted(state.borrowed)]
        return cls(
            sent=state.sent,
            resent=state.resent,
            borrowed=len(borrowed),
            borrowed_prompt_tokens=sum(answer.prompt_tokens for answer in borrowed),
            borrowed_completion_tokens=sum(answer.completion_tokens for answer in borrowed),
            failed_by=_summed(Counter(state.failures[id][-1].reason for id in ids if state.gave_up(id, attempts))),
        )


@dataclass(frozen=True)
class Stats:
    """The funnel of a job."""

    planned: int
    """Requests."""
    answered: int
    failed: int
    """Requests given up."""
    traffic: Traffic
    empty: int
    """Answers without a row."""
    accepted: int
    """Rows, those accepted by people among them."""
    rejected: int
    rejected_by: Mapping[str, int]
    """Rows by filter."""
    flagged: int
    """Rows sent to people, decided or not."""
    decided: int
    """Flagged rows whose decision is part of the manifest."""
    uncommitted: int
    """Judged rows of shards that are not committed yet."""
    prompt_tokens: int
    """Of all answers, whatever became of their rows; the borrowed ones are among them."""
    completion_tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def committed_stats(plan: Plan | None, manifest: Manifest, traffic: Traffic) -> Stats:
    """The figures of the committed shards."""
    total = _summed(*(entry.counts for entry in manifest.entries))
    numbers = ("answered", "failed", "empty", "decided", "prompt_tokens", "completion_tokens")
    return Stats(
        planned=plan.requests if plan else 0,
        traffic=traffic,
        accepted=manifest.rows("accepted"),
        rejected=manifest.rows("rejected"),
        rejected_by=_summed(*(entry.rejected_by for entry in manifest.entries)),
        flagged=manifest.rows("review"),
        uncommitted=0,
        **{name: total.get(name, 0) for name in numbers},
    )


def job_stats(folder: Storage, plan: Plan | None, manifest: Manifest, attempts: int) -> Stats:
    """All figures, with those of shards under way. Reads the logs of these, one at a time."""
    stats = committed_stats(plan, manifest, committed_traffic(folder, plan, manifest, attempts))
    data = {item.name: getattr(stats, item.name) for item in fields(stats)}
    begun = {f"log/{name.removesuffix('.jsonl')}" for name in folder.list("log")}
    for number in range(manifest.shards, len(plan.shards) if plan else 0):
        if plan is None or log_name(number) not in begun:
            continue
        ids = list(read_requests(folder, plan.shards[number]))
        state = read_state(folder, number)
        data["answered"] += len(state.answers)
        data["failed"] += sum(state.gave_up(id, attempts) for id in ids)
        data["uncommitted"] += sum(len(rows) for rows in state.rows.values())
        data["prompt_tokens"] += sum(answer.prompt_tokens for answer in state.answers.values())
        data["completion_tokens"] += sum(answer.completion_tokens for answer in state.answers.values())
        data["traffic"] += Traffic.of(ids, state, attempts)
    return Stats(**data)


def committed_traffic(folder: Storage, plan: Plan | None, manifest: Manifest, attempts: int) -> Traffic:
    """The traffic of the committed shards: as remembered, and from the logs of those committed since."""
    shards, traffic = _remembered(folder)
    if shards > manifest.shards:
        shards, traffic = 0, Traffic()
    for number in range(shards, manifest.shards):
        if plan is None:
            raise DataError(f"{folder.uri} has a manifest and no plan; restore plan.json")
        ids = list(read_requests(folder, plan.shards[number]))
        traffic += Traffic.of(ids, read_state(folder, number), attempts)
    return traffic


def save_stats(folder: Storage, plan: Plan | None, manifest: Manifest, traffic: Traffic) -> None:
    """Write `stats.json`: the figures of the committed shards, for people and for the next start."""
    figures = committed_stats(plan, manifest, traffic).to_json()
    folder.write_json({"shards": manifest.shards, **figures}, STATS_FILE)


def _remembered(folder: Storage) -> tuple[int, Traffic]:
    if not folder.exists(STATS_FILE):
        return 0, Traffic()
    try:
        data = folder.read_json(STATS_FILE)
        return int(data["shards"]), Traffic(**data["traffic"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder.path(STATS_FILE)} cannot be used ({error}); delete it and it is made again from the logs"
        ) from None


def _summed(*counts: Mapping[str, int]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return dict(sorted(total.items()))
