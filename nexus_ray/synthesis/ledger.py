"""The only record of a synthesis job: `<storage>/<run>/synthesis/<domain>/`.

    plan.json, plan/      every request in order, cut into shards          (plan.py)
    log/                  what happened to each request                    (shard_log.py)
    accepted/ rejected/ review/ manifest.json
                          rows in plan order, and the list that counts     (commit.py, parts.py)
    decisions.jsonl       what people decided on flagged rows              (decisions.py)
    judge.json            how good the judging model is on its golden set  (validators/calibration.py)
    stats.json            the figures                                      (counts.py)

A worker takes a shard, asks what `pending` says and logs what comes; one process commits. Killed anywhere, at any
time, the same calls go on: an answer that reached the log is never asked for again, whatever became of its rows, what
was in flight is sent again and counted, and the parts come out byte for byte the same.

A `Ledger` holds no state of its own but settings, and the plan as it last read it: it may be pickled to workers, and be
made anew at any time.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nexus_ray.corpora.parts import Kind, Manifest, PartRow, load_manifest, read_rows
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.commit import Committer, Memory
from nexus_ray.synthesis.counts import Stats, job_stats
from nexus_ray.synthesis.decisions import Review
from nexus_ray.synthesis.history import Lineage, find_lineage
from nexus_ray.synthesis.plan import (
    PLAN_FILE,
    SHARD_REQUESTS,
    Job,
    Plan,
    RequestIndex,
    check_job,
    extend_plan,
    load_plan,
    read_requests,
)
from nexus_ray.synthesis.rows import Request
from nexus_ray.synthesis.shard_log import ATTEMPTS, ShardLog, read_state


class Ledger:
    """A job's ledger in its folder. Raises ConfigError if the folder belongs to a job with other settings."""

    def __init__(self, folder: Storage, job: Job, *, attempts: int = ATTEMPTS) -> None:
        """`attempts`: failures that may pass by themselves before a request is given up; the same in all processes."""
        self.folder = folder
        self.job = job
        self.attempts = attempts
        self._read: tuple[tuple[int, int], Plan] | None = None
        """The plan, and size and time of the file that it was read from: a plan of many shards takes long to parse."""
        if (plan := self._plan()) is not None:
            check_job(folder, plan.job, job)

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: whoever gets it reads the plan itself."""
        return {**self.__dict__, "_read": None}

    @classmethod
    def load(cls, folder: Storage) -> Ledger:
        """The ledger that a folder holds, whatever its job: to read it, or to borrow from it. Raises DataError."""
        plan = load_plan(folder)
        if plan is None:
            raise DataError(f"{folder.uri} holds no synthesis ledger (no plan.json); run `nexus-ray synthesize` first")
        return cls(folder, plan.job)

    # --- the plan and its shards -----------------------------------------------------------------------------------

    def plan(self, requests: Iterable[Request], *, shard_requests: int = SHARD_REQUESTS) -> Plan:
        """Plan the requests of the whole job, in order; those planned before are compared, new ones appended.

        Raises ConfigError if a request planned before is another now, or is missing.
        """
        return extend_plan(self.folder, self.job, requests, shard_requests=shard_requests)

    def open_shards(self) -> range:
        """Shards that are not committed yet, in order."""
        plan = self._plan()
        return range(self.manifest().shards, len(plan.shards) if plan is not None else 0)

    def requests(self, shard: int) -> dict[str, Request]:
        """The requests of a shard by id, in plan order. Raises DataError if this machine sees no such shard."""
        plan = self._plan()
        shards = plan.shards if plan is not None else ()
        if shard >= len(shards):
            raise DataError(
                f"this machine ({socket.gethostname()}) does not see shard {shard} of the plan in {self.folder.uri}, "
                f"but {len(shards)} shards; set storage to a folder that all machines of the cluster see, or to s3://"
            )
        return read_requests(self.folder, shards[shard])

    def write(self, shard: int) -> ShardLog:
        """The log of a shard, for its one writer: `with ledger.write(3) as log: ...`; DataError if it is held."""
        return ShardLog(self.folder, shard, self.requests(shard), attempts=self.attempts)

    def is_complete(self, shard: int) -> bool:
        """Whether nothing of a shard is left to ask or to judge."""
        return read_state(self.folder, shard).is_complete(list(self.requests(shard)), self.attempts)

    def borrow(self, other: Ledger, *, shards: Sequence[int] | None = None) -> int:
        """Take over answers to the same requests (same id, so same generator revision) from another job's log.

        For open shards, or those named; returns how many. Their rows are judged by this job. Answers of one shard of
        each ledger are in memory at a time.
        """
        plan = other._plan()
        if plan is None:
            return 0
        index, borrowed = RequestIndex(other.folder, plan), 0
        for shard in self.open_shards() if shards is None else shards:
            with self.write(shard) as log:
                for source in index.find(list(log.pending())):
                    answers = read_state(other.folder, source).answers
                    found = [answers[id] for id in log.pending() if id in answers]
                    for answer in found:
                        log.answered(answer, borrowed=True)
                    borrowed += len(found)
        return borrowed

    def _plan(self) -> Plan | None:
        """The plan; read again if its file is another than before, since plans grow."""
        info = self.folder.filesystem.get_file_info(self.folder.path(PLAN_FILE))
        if not info.is_file:
            return None
        stamp = info.size, info.mtime_ns
        if self._read is None or self._read[0] != stamp:
            plan = load_plan(self.folder)
            self._read = (stamp, plan) if plan is not None else None
        return self._read[1] if self._read is not None else None

    # --- what came of it -------------------------------------------------------------------------------------------

    def committer(self, memory: Memory | None = None) -> Committer:
        """The one process that commits: `with ledger.committer(memory) as committer: committer.commit()`."""
        return Committer(self.folder, self.job, attempts=self.attempts, memory=memory)

    def manifest(self) -> Manifest:
        """What is committed. A run that reads from it pins `len(entries)` and the fingerprint."""
        return load_manifest(self.folder, self.job.fingerprint)

    def rows(self, kind: Kind = "accepted", manifest: Manifest | None = None) -> Iterator[PartRow]:
        """Rows of a kind in the order of the manifest (or of a prefix of it), one part in memory at a time."""
        for part in (manifest or self.manifest()).files(kind):
            yield from read_rows(self.folder, part)

    def review(self) -> Review:
        """The queue of flagged rows: `with ledger.review() as review: ...`."""
        return Review(self.folder, self.job.fingerprint)

    def stats(self) -> Stats:
        """The figures of the job so far, with those of shards under way."""
        return job_stats(self.folder, self._plan(), self.manifest(), self.attempts)

    def lineage(self, row_id: str) -> Lineage:
        """Everything behind a row of the manifest: text, verdict, prompt, answer, parents. Raises DataError if none."""
        plan = self._plan() or Plan(self.job, SHARD_REQUESTS)
        return find_lineage(self.folder, plan, self.manifest(), row_id)
