"""From logs to parts, in plan order: the only place where rows become documents.

Invariant: the parts are a function of plan, logs, decisions and settings; neither the order in which answers came nor a
crash leaves a trace in them. A part counts once the manifest lists it; until then it is written over or deleted.

Filters that remember (duplicates, novelty) judge here, row by row in plan order, what the stateless ones let pass. They
remember accepted rows and flagged ones: a person takes any time to decide, and what is accepted later must not depend
on that.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Protocol

from nexus_ray.corpora.parts import (
    Entry,
    Kind,
    Manifest,
    PartRow,
    count_reasons,
    load_manifest,
    read_rows,
    save_manifest,
    sweep,
    write_part,
)
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.counts import Traffic, committed_traffic, save_stats
from nexus_ray.synthesis.decisions import decided_rows, folded, save_refusals, standing
from nexus_ray.synthesis.plan import Job, Plan, load_plan, read_requests
from nexus_ray.synthesis.rows import Answer, Request, Row, Verdict
from nexus_ray.synthesis.shard_log import Judged, ShardState, merged, plain_scores, read_state

KIND_OF: Mapping[str, Kind] = {"pass": "accepted", "reject": "rejected", "flag": "review"}
NOT_TEXT = Verdict("reject", "encoding: half a surrogate pair")
LOCK_S = 5.0


class Memory(Protocol):
    """Filters whose verdict depends on the rows before."""

    def group(self, rows: Sequence[Row]) -> None:
        """The rows of one prompt that no stateless filter rejected, shown before any of them is judged."""

    def judge(self, row: Row) -> Verdict:
        """What they say of a row; changes nothing."""

    def remember(self, row: Row) -> None:
        """The row is accepted or flagged, and later ones are compared with it."""

    def judge_edit(self, row: Row, flagged: str) -> tuple[Row, Verdict]:
        """What stateless filters and exact duplicates say of a text that a person wrote; changes nothing."""


class Committer:
    """The one process that commits, as a context manager.

    Entering takes the lock, deletes what a crash left and shows `memory` all rows kept so far, in plan order. After an
    error nothing more can be committed with this object, since its memory may be ahead of the manifest.
    """

    def __init__(self, folder: Storage, job: Job, *, attempts: int, memory: Memory | None) -> None:
        self._folder = folder
        self._job = job
        self._attempts = attempts
        self._memory = memory
        self._stack = contextlib.ExitStack()
        self._plan: Plan | None = None
        self._is_open = False
        self.manifest = Manifest(job.fingerprint)
        self._traffic = Traffic()

    def __enter__(self) -> Committer:
        self._stack.enter_context(self._folder.lock("locks/commit", LOCK_S))
        try:
            self.manifest = load_manifest(self._folder, self._job.fingerprint)
            self._plan = load_plan(self._folder)
            sweep(self._folder, self.manifest)
            self._traffic = committed_traffic(self._folder, self._plan, self.manifest, self._attempts)
            if self._memory is not None and self._plan is not None:
                for row in kept_rows(self._folder, self._plan, self.manifest):
                    self._memory.remember(row)
        except BaseException:
            self._stack.close()
            raise
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        self._stack.close()

    def commit(self, *, target: int | None = None) -> list[Entry]:
        """Commit the shards that are complete, up to the first that is not, or to the one that reaches `target`.

        Those behind it stay out, complete or not: which shards are committed must not depend on which ended first.
        """
        entries: list[Entry] = []
        while not self.reached(target) and (entry := self.commit_next()) is not None:
            entries.append(entry)
        return entries

    def reached(self, target: int | None) -> bool:
        """Whether so many rows are accepted; never without a target."""
        return target is not None and self.manifest.rows("accepted") >= target

    def commit_next(self) -> Entry | None:
        """Commit the next shard of the plan; None if it is not complete yet, or if there is none."""
        with self._whole_or_closed():
            number = self.manifest.shards
            plan = self._plan_of_shard(number)
            if plan is None:
                return None
            requests = read_requests(self._folder, plan.shards[number])
            state = read_state(self._folder, number)
            if not state.is_complete(list(requests), self._attempts):
                return None
            self._traffic += Traffic.of(list(requests), state, self._attempts)
            return self._add(self._entry(number, requests, state))

    def fold_decisions(self) -> Entry | None:
        """Put the rows that people have decided on since the last time into parts of their own; None if none were.

        Edits are judged first, and wait if there is no memory to judge them: see `decisions`.
        """
        with self._whole_or_closed():
            done = folded(self._folder, self.manifest)
            new = {id: decision for id, decision in standing(self._folder).items() if id not in done}
            found = decided_rows(self._folder, self.manifest, new, self._requests, self._memory)
            save_refusals(self._folder, found.refusals)
            accepted, rejected = found.accepted, found.rejected
            if not accepted and not rejected:
                return None
            number = len(self.manifest.entries) - self.manifest.shards
            name = f"decided-{number:05d}"
            entry = Entry(
                name=name,
                shard=None,
                accepted=write_part(self._folder, "accepted", name, accepted),
                rejected=write_part(self._folder, "rejected", name, rejected),
                review=None,
                counts={"decided": len(accepted) + len(rejected)},
                rejected_by=count_reasons(rejected),
            )
            return self._add(entry)

    @contextlib.contextmanager
    def _whole_or_closed(self) -> Iterator[None]:
        if not self._is_open:
            raise DataError(
                f"the committer of {self._folder.uri} is closed, after an error or at its end; open a new one"
            )
        try:
            yield
        except BaseException:
            self._is_open = False
            raise

    def _requests(self, shard: int) -> dict[str, Request]:
        plan = self._plan_of_shard(shard)
        if plan is None:
            raise DataError(f"{self._folder.uri} has rows of shard {shard} and no plan of it; restore plan.json")
        return read_requests(self._folder, plan.shards[shard])

    def _plan_of_shard(self, number: int) -> Plan | None:
        """The plan if it has that shard; read again if it had not, since plans grow."""
        if self._plan is None or number >= len(self._plan.shards):
            self._plan = load_plan(self._folder)
        return self._plan if self._plan is not None and number < len(self._plan.shards) else None

    def _entry(self, number: int, requests: Mapping[str, Request], state: ShardState) -> Entry:
        parts: dict[Kind, list[PartRow]] = {"accepted": [], "rejected": [], "review": []}
        previous = None
        for id, request in requests.items():
            if request.prompt != previous and self._memory is not None:
                self._memory.group(self._group(request, requests, state))
            previous = request.prompt
            if id not in state.answers:
                continue
            history = _history(self._job, number, id, request, state.answers[id])
            for row, first in _rows(self._job.domain, request, state.answers[id], state.rows[id]):
                verdict = self._verdict(row, first)
                reason = verdict.reason if verdict.outcome != "pass" else ""
                provenance = {**history, "item": row.item, "scores": plain_scores(verdict.scores)}
                parts[KIND_OF[verdict.outcome]].append(PartRow(row.id, row.text, row.domain, provenance, reason))
        name = f"part-{number:05d}"
        files = {kind: write_part(self._folder, kind, name, rows) for kind, rows in parts.items()}
        return Entry(
            name=name,
            shard=number,
            accepted=files["accepted"],
            rejected=files["rejected"],
            review=files["review"],
            counts=_counts(requests, state),
            rejected_by=count_reasons(parts["rejected"]),
        )

    def _group(self, request: Request, requests: Mapping[str, Request], state: ShardState) -> list[Row]:
        """Rows of the answers to the prompt of `request`, the first of them in the shard."""
        asked = itertools.dropwhile(lambda item: item[1] is not request, requests.items())
        same = itertools.takewhile(lambda item: item[1].prompt == request.prompt, asked)
        return [
            row
            for id, one in same
            if id in state.answers
            for row, first in _rows(self._job.domain, one, state.answers[id], state.rows[id])
            if first.outcome != "reject" and _is_text(row.text)
        ]

    def _verdict(self, row: Row, first: Verdict) -> Verdict:
        if not _is_text(row.text):
            return merged(first, NOT_TEXT)
        if first.outcome == "reject" or self._memory is None:
            return first
        verdict = merged(first, self._memory.judge(row))
        if verdict.outcome != "reject":
            self._memory.remember(row)
        return verdict

    def _add(self, entry: Entry) -> Entry:
        grown = self.manifest.extended(entry)
        save_manifest(self._folder, grown)
        self.manifest = grown
        save_stats(self._folder, self._plan, grown, self._traffic)
        return entry


def kept_rows(folder: Storage, plan: Plan, manifest: Manifest) -> Iterator[Row]:
    """Accepted and flagged rows of the committed shards in plan order: what filters remember. One shard in memory."""
    for entry in manifest.entries:
        if entry.shard is None:
            continue
        requests = read_requests(folder, plan.shards[entry.shard])
        order = {id: place for place, id in enumerate(requests)}
        found = [row for part in (entry.accepted, entry.review) for row in read_rows(folder, part)]
        found.sort(key=lambda row: (order[row.provenance["request"]], row.provenance["item"]))
        for row in found:
            history = row.provenance
            prompt = requests[history["request"]].prompt
            yield Row(row.text, history["request"], history["item"], prompt, history["finish_reason"], row.domain)


def _rows(domain: str, request: Request, answer: Answer, judged: Iterable[Judged]) -> Iterator[tuple[Row, Verdict]]:
    """The rows of an answer by item, whatever order they were judged in."""
    for one in sorted(judged, key=lambda one: one.item):
        row = Row(one.text, answer.request_id, one.item, request.prompt, answer.finish_reason, domain)
        yield row, one.verdict


def _history(job: Job, shard: int, id: str, request: Request, answer: Answer) -> dict[str, Any]:
    """The provenance that all rows of an answer share."""
    prompt = request.prompt
    return {
        "parents": list(prompt.parents),
        "recipe": prompt.recipe,
        "parameters": dict(prompt.parameters),
        "prompt": prompt.id,
        "generator": job.revision,
        "model": answer.model,
        "sampling": asdict(request.sampling),
        "index": request.index,
        "request": id,
        "finish_reason": answer.finish_reason,
        "job": job.fingerprint,
        "shard": shard,
    }


def _counts(requests: Mapping[str, Request], state: ShardState) -> dict[str, int]:
    answers = [state.answers[id] for id in requests if id in state.answers]
    return {
        "requests": len(requests),
        "answered": len(answers),
        "failed": len(requests) - len(answers),
        "empty": sum(not state.rows[answer.request_id] for answer in answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "completion_tokens": sum(answer.completion_tokens for answer in answers),
    }


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
