"""What happened to the requests of one shard of the plan: sent, answered, failed, judged.

Rows and the verdicts of stateless filters are stored when they are known, beside the answer rather than with it: an
answer must be safe before a validator runs (which may take seconds, or take the process down), and a validator's
verdict must not be made twice (a judge is paid for, a sandbox's time limit is no pure function). So the commit needs
neither parser nor filters, and its result is a function of the log alone. Another filter is another job, which
borrows the answers and judges anew.

Invariant: the state is a fold over the events; the first answer to a request counts, whatever else comes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any

from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.append_log import LogWriter, read_log
from nexus_ray.synthesis.rows import Answer, Failure, Request, Row, Verdict

ATTEMPTS = 3
"""Failures that may pass by themselves (each after all retries of the generator) before a request is given up."""
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Judged:
    """One row of an answer with what the stateless filters said of it."""

    item: int
    text: str
    verdict: Verdict


@dataclass
class ShardState:
    """The fold over a shard's events."""

    answers: dict[str, Answer] = field(default_factory=dict)
    rows: dict[str, tuple[Judged, ...]] = field(default_factory=dict)
    """Judged rows by request; an answer may have none."""
    failures: dict[str, list[Failure]] = field(default_factory=dict)
    """Those that count, by request."""
    in_flight: set[str] = field(default_factory=set)
    """Sent, and nothing came back yet."""
    borrowed: set[str] = field(default_factory=set)
    """Answers taken over from another job."""
    sent: int = 0
    resent: int = 0
    """Requests sent again because nothing had come back for them when their writer died."""

    def pending(self, ids: Iterable[str], attempts: int) -> list[str]:
        """Those of `ids` that are to be asked: not answered, not failed for good."""
        return [id for id in ids if id not in self.answers and not self.gave_up(id, attempts)]

    def gave_up(self, id: str, attempts: int) -> bool:
        """Whether a request without answer is not asked again."""
        failures = self.failures.get(id, [])
        return id not in self.answers and (
            len(failures) >= attempts or any(not failure.retriable for failure in failures)
        )

    def unjudged(self, ids: Iterable[str]) -> list[Answer]:
        """Answers whose rows were not judged yet."""
        return [self.answers[id] for id in ids if id in self.answers and id not in self.rows]

    def is_complete(self, ids: Sequence[str], attempts: int) -> bool:
        """Whether nothing is left to ask or to judge."""
        return not self.pending(ids, attempts) and not self.unjudged(ids)

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take one event of the log into account. Raises KeyError or TypeError for one of another format."""
        kind = event["event"]
        if kind == "sent":
            self.sent += len(event["ids"])
            self.resent += sum(id in self.in_flight for id in event["ids"])
            self.in_flight.update(event["ids"])
        elif kind == "answered":
            self._answered(Answer(**event["answer"]), bool(event.get("borrowed")))
        elif kind == "failed":
            failure = Failure(**event["failure"])
            if not failure.passing:
                self.failures.setdefault(failure.request_id, []).append(failure)
            self.in_flight.discard(failure.request_id)
        elif kind == "judged":
            answer = self.answers.get(event["id"])
            if answer is not None and event["of"] == _digest(answer.text):
                self.rows.setdefault(answer.request_id, tuple(_judged(row, answer) for row in event["rows"]))
        else:
            raise KeyError(kind)

    def _answered(self, answer: Answer, borrowed: bool) -> None:
        self.in_flight.discard(answer.request_id)
        if answer.request_id not in self.answers:
            self.answers[answer.request_id] = answer
            if borrowed:
                self.borrowed.add(answer.request_id)


def log_name(shard: int) -> str:
    return f"log/{shard:05d}"


def read_state(folder: Storage, shard: int) -> ShardState:
    """The state of a shard as its log tells it. Raises DataError if the log is damaged."""
    state = ShardState()
    for event in read_log(folder, log_name(shard)):
        try:
            state.apply(event)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{folder.path(log_name(shard))} holds an event that this version cannot read ({error}); use the "
                f"version that wrote it"
            ) from None
    return state


class ShardLog:
    """A shard opened by its one writer, as a context manager; everything in it is safe once the context is left.

    `requests` maps ids to requests in plan order.
    """

    def __init__(self, folder: Storage, shard: int, requests: Mapping[str, Request], *, attempts: int) -> None:
        self.shard = shard
        self.requests = requests
        self.state = ShardState()
        self._folder = folder
        self._attempts = attempts
        self._writer = LogWriter(folder, log_name(shard))

    def __enter__(self) -> ShardLog:
        self._writer.__enter__()
        try:
            self.state = read_state(self._folder, self.shard)
        except BaseException as error:
            self._writer.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def pending(self) -> dict[str, Request]:
        """What is to be asked, by id, in plan order. Those failed in a way that may pass are among it."""
        return {id: self.requests[id] for id in self.state.pending(self.requests, self._attempts)}

    def unjudged(self) -> list[Answer]:
        """Answers whose rows are still to be judged, in plan order."""
        return self.state.unjudged(self.requests)

    @property
    def is_complete(self) -> bool:
        """Whether the shard can be committed."""
        return self.state.is_complete(list(self.requests), self._attempts)

    def sent(self, ids: Iterable[str]) -> None:
        """Requests that go out now: call it just before, with as many as really leave at once.

        A later `sent` of one of them, with nothing come back in between, counts as resent: exactly so if the process
        died; a power cut may take the last group of lines along, and then these are not counted. Raises DataError for
        an id of another shard, and for one that is answered already: it must not be asked again.
        """
        known = [self._known(id) for id in ids]
        if answered := [id for id in known if id in self.state.answers]:
            raise DataError(f"request {answered[0]} of shard {self.shard} is answered already; ask only `pending()`")
        self._add({"event": "sent", "ids": known})
        if not self._folder.is_local:
            self._writer.flush()  # on a disk the system has it; a segment is only written by a flush

    def answered(self, answer: Answer, *, borrowed: bool = False) -> None:
        """An answer has come; `flush`, a full group or the end of the context make it safe."""
        self._known(answer.request_id)
        self._add({"event": "answered", "answer": asdict(answer), **({"borrowed": True} if borrowed else {})})

    def gave_up(self, id: str) -> bool:
        """Whether a request is not asked again, having failed for good or too often."""
        return self.state.gave_up(id, self._attempts)

    def failed(self, failure: Failure) -> None:
        """A request got no answer. Not for what the job itself called off (budget, interrupt): that stays pending."""
        self._known(failure.request_id)
        self._add({"event": "failed", "failure": asdict(failure)})

    def judged(self, request_id: str, rows: Sequence[tuple[Row, Verdict]]) -> None:
        """All rows of an answer, each with the verdict of the stateless filters. Rows differ in `item`."""
        answer = self.state.answers.get(self._known(request_id))
        if answer is None:
            raise DataError(f"request {request_id} of shard {self.shard} is judged before it is answered")
        items = [row.item for row, _ in rows]
        if len(set(items)) < len(items):
            raise DataError(f"rows of request {request_id} share an item: {items}; number them from 0")
        event = {"event": "judged", "id": request_id, "of": _digest(answer.text)}
        self._add({**event, "rows": [_row_event(row, verdict, answer) for row, verdict in rows]})

    def flush(self) -> None:
        """Everything so far is safe when this returns."""
        self._writer.flush()

    def _known(self, id: str) -> str:
        if id not in self.requests:
            raise DataError(f"request {id} is not in shard {self.shard}, which has {len(self.requests)} requests")
        return id

    def _add(self, event: dict[str, Any]) -> None:
        self._writer.write(event)
        self.state.apply(event)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _row_event(row: Row, verdict: Verdict, answer: Answer) -> dict[str, Any]:
    """A row that is the whole answer does not repeat its text."""
    text = {} if row.text == answer.text else {"text": row.text}
    found = {"reason": verdict.reason, "scores": plain_scores(verdict.scores)}
    return {"item": row.item, **text, "outcome": verdict.outcome, **found}


def _judged(event: Mapping[str, Any], answer: Answer) -> Judged:
    scores = {name: float(value) for name, value in event["scores"].items()}
    verdict = Verdict(event["outcome"], event["reason"], scores)
    return Judged(event["item"], event.get("text", answer.text), verdict)


def plain_scores(scores: Scores) -> dict[str, float | str]:
    """Scores as JSON holds them: plain numbers, and `nan`, `inf`, `-inf` by name."""
    plain = {name: float(value) for name, value in sorted(scores.items())}
    return {name: value if math.isfinite(value) else str(value) for name, value in plain.items()}


def merged(first: Verdict, second: Verdict) -> Verdict:
    """The graver of two verdicts (the first of equals), with the scores of both."""
    weight = {"pass": 0, "flag": 1, "reject": 2}
    graver = second if weight[second.outcome] > weight[first.outcome] else first
    return replace(graver, scores={**first.scores, **second.scores})
