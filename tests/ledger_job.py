"""A small synthesis job whose teacher is a function of (prompt, index); a storage whose writes stop at any point."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path

from pyarrow.fs import LocalFileSystem

from nexus_ray.storage import Storage
from nexus_ray.synthesis.append_log import read_log
from nexus_ray.synthesis.commit import Committer
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.plan import Job, load_plan
from nexus_ray.synthesis.rows import PASS, Answer, Failure, Prompt, Request, Row, Sampling, Verdict
from nexus_ray.synthesis.shard_log import ShardLog, log_name, read_state

JOB = Job("stories", "teacher-1", recipe={"template": 1}, filters={"parity": 7})
CHILDREN = 10
SHARD_REQUESTS = 2
DETERMINED = ("plan", "accepted", "rejected", "review", "plan.json", "manifest.json")
"""What must not depend on order or crashes. Logs, decisions' times and `stats.json` (how often sent) may."""


def requests(prompts: int, candidates: int = 2) -> list[Request]:
    asked = [Prompt(f"Write about {n}.", recipe="r", parameters={"n": str(n)}, parents=("d",)) for n in range(prompts)]
    return [Request(prompt, Sampling(), index) for prompt in asked for index in range(candidates)]


def number(*parts: object) -> int:
    return int(hashlib.sha256(repr(parts).encode()).hexdigest(), 16)


def reply(id: str, request: Request) -> Answer | Failure:
    """Ten lines, some of them shared by several answers; one answer to every fourth prompt has only bad ones, and every
    fourth prompt gets none: one of its requests is refused, the other times out each time."""
    kind = int(request.prompt.parameters["n"]) % 4
    if kind == 3:
        return Failure(id, "http 400", retriable=False) if request.index else Failure(id, "timeout", retriable=True)
    word = "bad" if kind == 1 and request.index == 0 else "line"
    lines = [f"{word} {number(request.prompt.content, request.index, item) % 30}" for item in range(CHILDREN)]
    return Answer(id, "\n".join(lines), "stop", 7, 10 * CHILDREN, "teacher")


def judged(answer: Answer, request: Request) -> list[tuple[Row, Verdict]]:
    texts = answer.text.split("\n")
    rows = [Row(text, answer.request_id, item, request.prompt, "stop", "stories") for item, text in enumerate(texts)]
    return [(row, stateless(row.text)) for row in rows]


def stateless(text: str) -> Verdict:
    value = number(text)
    if text.startswith("bad") or value % 7 == 0:
        return Verdict("reject", f"parity: {value % 7}", {"parity.rest": value % 7})
    return Verdict("flag", "taste: odd", {"taste.rest": 1.0}) if value % 3 == 0 else PASS


class Duplicates:
    """A filter that remembers."""

    def __init__(self) -> None:
        self.texts: set[str] = set()

    def group(self, rows: Sequence[Row]) -> None:
        """It compares row with row."""

    def judge(self, row: Row) -> Verdict:
        return Verdict("reject", "duplicate: exact", {"duplicate.share": 1.0}) if row.text in self.texts else PASS

    def remember(self, row: Row) -> None:
        assert row.text not in self.texts, "kept twice"
        self.texts.add(row.text)

    def judge_edit(self, row: Row, flagged: str) -> tuple[Row, Verdict]:
        """What people write is right."""
        return row, PASS


Asked = Callable[[str], None]


def work(log: ShardLog, rng: random.Random, asked: Asked) -> None:
    """Finish a shard: groups of up to three go out, answers come in any order, rows are judged then or later."""
    while not log.is_complete:
        group = rng.sample(list(log.pending()), min(len(log.pending()), rng.randint(0, 3)))
        if group:
            log.sent(group)
        for id in rng.sample(group, len(group)):
            asked(id)
            got = reply(id, log.requests[id])
            log.answered(got) if isinstance(got, Answer) else log.failed(got)
        for answer in rng.sample(log.unjudged(), rng.randint(0, len(log.unjudged()))):
            log.judged(answer.request_id, judged(answer, log.requests[answer.request_id]))


def decide_all(ledger: Ledger) -> None:
    with ledger.review() as review:
        for row in list(review.queue()):
            action, text = (("accept", None), ("reject", None), ("edit", f"{row.text}!"))[number(row.id) % 3]
            review.decide(row.id, action, who="a", text=text)


def phase(ledger: Ledger, prompts: int, rng: random.Random, asked: Asked, target: int | None = None) -> None:
    ledger.plan(requests(prompts), shard_requests=SHARD_REQUESTS)
    with ledger.committer(Duplicates()) as committer:
        committer.commit(target=target)
        shards = list(ledger.open_shards())
        for shard in rng.sample(shards, len(shards)):
            if committer.reached(target):
                break
            with ledger.write(shard) as log:
                work(log, rng, asked)
            committer.commit(target=target)
        finish(ledger, committer)


def finish(ledger: Ledger, committer: Committer) -> None:
    decide_all(ledger)
    committer.fold_decisions()


def run_job(
    folder: Storage, seed: int, asked: Asked, prompts: Sequence[int] = (2, 4), target: int | None = None
) -> Ledger:
    """The whole job or what is left of it: some prompts, people's decisions, all prompts, more decisions; each time
    until `target` rows are accepted."""
    rng = random.Random(seed)
    ledger = Ledger(folder, JOB)
    names = {entry.name for entry in ledger.manifest().entries}
    for round, count in enumerate(prompts):
        if f"decided-{round:05d}" not in names:
            phase(ledger, count, rng, asked, target)
    return ledger


def run_recorded(
    folder: str, record: str, seed: int, prompts: Sequence[int], pause_s: float, target: int | None
) -> None:
    """`run_job`; each question is on record before the teacher thinks about it, for `pause_s` on average."""
    descriptor = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    rng = random.Random(seed)

    def ask(id: str) -> None:
        os.write(descriptor, f"{id}\n".encode())
        time.sleep(rng.uniform(0, 2 * pause_s))

    run_job(Storage(folder), seed, ask, prompts, target)


def determined(folder: Path) -> dict[str, bytes]:
    """Content of all files that are a function of the job alone."""
    files = [file for name in DETERMINED for file in [folder / name, *(folder / name).rglob("*")] if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def logged(folder: Storage) -> tuple[set[str], set[str]]:
    """Ids of all answers in the logs, and of all requests in flight."""
    plan = load_plan(folder)
    states = [read_state(folder, shard) for shard in range(len(plan.shards))] if plan else []
    return {id for state in states for id in state.answers}, {id for state in states for id in state.in_flight}


def sends(folder: Storage) -> Counter[str]:
    """How often each request was sent, counted from the lines of the logs."""
    plan = load_plan(folder)
    events = [event for n in range(len(plan.shards) if plan else 0) for event in read_log(folder, log_name(n))]
    return Counter(id for event in events if event["event"] == "sent" for id in event["ids"])


class Resends:
    """How many requests a process sent that had been in flight when it began. One that is still waiting for its turn
    at the next crash was not sent again, and is not counted twice."""

    def __init__(self, folder: Storage) -> None:
        self._folder = folder
        self._sent = sends(folder)
        _, self._in_flight = logged(folder)

    def count(self) -> int:
        sent = sends(self._folder)
        return sum(sent[id] > self._sent[id] for id in self._in_flight)


# --- crashes -----------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process died here."""


class Fuse:
    """Blows at the k-th change of the storage; from then on nothing is written any more."""

    def __init__(self, at: int | None = None, *, torn: bool = False, power: bool = False) -> None:
        self.left = at
        self.torn = torn
        """The change at which it blows is half done."""
        self.power = power
        """Power goes too: appended bytes that were not synced are lost."""
        self.count = 0
        self.synced: dict[str, int] = {}
        self.appended: set[str] = set()

    @property
    def blown(self) -> bool:
        return self.left is not None and self.left < 0

    def step(self, half: Callable[[], object]) -> None:
        if self.blown:
            raise Crash
        self.count += 1
        if self.left is not None:
            self.left -= 1
        if self.blown:
            if self.torn:
                half()
            if self.power:
                for path in self.appended:
                    os.truncate(path, self.synced.get(path, 0))
            raise Crash

    def sync(self, descriptor: int) -> None:
        """In the place of `os.fsync`: what is remembered survives a power cut."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self.step(lambda: None)
        self.synced[path] = os.fstat(descriptor).st_size


class FusedFile(FileIO):
    """An append-only file on a fuse."""

    fuse: Fuse

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.fuse.step(lambda: super(FusedFile, self).write(data[: len(data) // 2]))
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self.fuse.step(lambda: None)
        return super().truncate(size)


class FusedStorage(Storage):
    """A local folder, or one that takes the code path of object stores (`remote:///folder`), on the fuse `FUSE`."""

    FUSE = Fuse()

    def _open(self):
        return LocalFileSystem(), self.uri.removeprefix("remote://")

    def write_bytes(self, data: bytes, *parts: str) -> None:
        target = Path(self.path(*parts))
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.parent / f".{target.name}.1-00.tmp"
        self.FUSE.step(lambda: beside.write_bytes(data[: len(data) // 2]) if self.is_local else None)
        if self.is_local:
            beside.write_bytes(data)
            beside.replace(target)
        else:
            target.write_bytes(data)

    def open_append(self, *parts: str) -> FileIO:
        path = self.path(*parts)
        super().open_append(*parts).close()
        self.FUSE.appended.add(path)
        self.FUSE.synced.setdefault(path, os.path.getsize(path))
        file = FusedFile(path, "ab")
        file.fuse = self.FUSE
        return file

    def delete(self, *parts: str) -> None:
        self.FUSE.step(lambda: None)
        super().delete(*parts)

    @contextlib.contextmanager
    def lock(self, name: str, timeout_s: float = 3600.0) -> Iterator[None]:
        """Of a dead process, and so free, in an object store too."""
        if self.is_local:
            with super().lock(name, timeout_s):
                yield
        else:
            yield
