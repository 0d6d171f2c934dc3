"""`nexus-ray review`: a ledger's queue on the review page, and its decisions back in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from nexus_ray.errors import ConfigError, NexusError
from nexus_ray.report.decisions import Action
from nexus_ray.report.review import serve_review
from nexus_ray.storage import Storage
from nexus_ray.synthesis.decisions import waiting_edits
from nexus_ray.synthesis.ledger import Ledger

Say = Callable[[str], None]


class LedgerQueue:
    """`ReviewQueue` of the rows that wait; prompts are read from the plan when a row is shown."""

    def __init__(self, ledger: Ledger, rows: list[Any]) -> None:
        self._ledger = ledger
        self._rows = rows
        self._shard: tuple[int, Mapping[str, Any]] = (-1, {})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int, /) -> Mapping[str, Any]:
        row = self._rows[place]
        history = row.provenance
        if self._shard[0] != history["shard"]:
            self._shard = history["shard"], self._ledger.requests(history["shard"])
        prompt = self._shard[1][history["request"]].prompt
        content = prompt.content if isinstance(prompt.content, str) else [asdict(turn) for turn in prompt.content]
        return {
            "id": row.id,
            "text": row.text,
            "reason": row.reason,
            "scores": history["scores"],
            "prompt": content,
            "parameters": dict(prompt.parameters),
            "generator": history["generator"],
            "source": prompt.source,
            "parents": list(prompt.parents),
            "refused": history["refused"]["text"] if "refused" in history else None,
        }


def review_ledger(uri: str, *, who: str, port: int = 0, say: Say, until: Callable[[], bool] | None = None) -> int:
    """Serve the queue of the ledger at `uri` until every row is decided, or Ctrl-C; returns how many were.

    `until`: asked twice a second, for tests. Raises DataError if there is no ledger, ConfigError if the port is taken.
    """
    ledger = Ledger.load(Storage(uri))
    with ledger.review() as review:
        rows = list(review.queue())
        if not rows:
            say(f"no row of {uri} waits for a decision")
            return 0

        def decide(row_id: str, action: Action, text: str | None) -> None:
            review.decide(row_id, action, who=who, text=text)

        try:
            server = serve_review(LedgerQueue(ledger, rows), decide, port=port)
        except OSError as error:
            raise ConfigError(
                f"--port {port} cannot be used ({error.strerror}); leave it out to take a free one"
            ) from None
        with server:
            say(f"{len(rows)} rows wait; open {server.url} (Ctrl-C ends; decisions are kept as they are made)")
            try:
                while not server.wait(0.5) and not (until is not None and until()):
                    pass
            except KeyboardInterrupt:
                say("")
            decided = server.decided
    say(f"{decided} of {len(rows)} rows decided by {who}")
    try:
        with ledger.committer() as committer:
            committer.fold_decisions()
    except NexusError:
        say("the job that runs now takes them up when it ends")
        return decided
    if edits := waiting_edits(ledger.folder, ledger.manifest()):
        say(f"{edits} new texts wait for the filters; `nexus-ray synthesize` judges them and takes them up")
    return decided
