"""What people decide on flagged rows: an append-only log beside the parts, folded into later parts by the commit.

Invariant: until a decision is folded the latest one on a row counts; once folded it stands, so that the manifest's
prefix stays valid. Who decided is kept in the row's provenance; when is kept in the log alone, part of no id or file.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Literal, get_args

from nexus_ray.corpora.parts import Manifest, PartRow, load_manifest, read_ids, read_rows
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.append_log import LogWriter, read_log
from nexus_ray.synthesis.rows import content_id

NAME = "decisions"
REJECTED = "review: rejected by a person"
Action = Literal["accept", "reject", "edit", "undo"]


@dataclass(frozen=True)
class Decision:
    """One line of `decisions.jsonl`."""

    row: str
    """Id of the flagged row."""
    action: Action
    """`undo` takes an earlier decision back and returns the row to the queue."""
    who: str
    when: str
    """UTC, ISO 8601."""
    text: str | None = None
    """The new text of an `edit`."""


def standing(folder: Storage) -> dict[str, Decision]:
    """The latest decision on each row, by row; folded ones are among them."""
    decisions: dict[str, Decision] = {}
    for line in read_log(folder, NAME):
        decision = Decision(**line)
        if decision.action == "undo":
            decisions.pop(decision.row, None)
        else:
            decisions[decision.row] = decision
    return decisions


def folded(folder: Storage, manifest: Manifest) -> set[str]:
    """Ids of the flagged rows whose decision is part of the manifest."""
    parts = [part for entry in manifest.entries if entry.shard is None for part in (entry.accepted, entry.rejected)]
    return {row.provenance["review"]["row"] for part in parts for row in read_rows(folder, part)}


def decided_rows(
    folder: Storage, manifest: Manifest, decisions: dict[str, Decision]
) -> tuple[list[PartRow], list[PartRow]]:
    """The flagged rows that `decisions` name as they go into parts: accepted ones and rejected ones, in plan order."""
    accepted: list[PartRow] = []
    rejected: list[PartRow] = []
    for part in manifest.files("review"):
        if decisions.keys().isdisjoint(read_ids(folder, part)):
            continue
        for row in read_rows(folder, part):
            if decision := decisions.get(row.id):
                (rejected if decision.action == "reject" else accepted).append(_decided(row, decision))
    return accepted, rejected


def _decided(row: PartRow, decision: Decision) -> PartRow:
    """An edited row has an id of its own; `provenance.review.row` leads back to the flagged one."""
    review = {"row": row.id, "action": decision.action, "who": decision.who, "flagged": row.reason}
    provenance = {**row.provenance, "review": review}
    if decision.action == "edit":
        text = decision.text or ""
        return PartRow(content_id("edit", [row.id, text]), text, row.domain, provenance)
    return PartRow(row.id, row.text, row.domain, provenance, REJECTED if decision.action == "reject" else "")


class Review:
    """The queue of flagged rows and the one writer of decisions, as a context manager; works while a job runs."""

    def __init__(self, folder: Storage, job: str) -> None:
        self._folder = folder
        self._job = job
        self._writer = LogWriter(folder, NAME)
        self._flagged: set[str] = set()
        self._folded: set[str] = set()
        self._entries = 0

    def __enter__(self) -> Review:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def queue(self) -> Iterator[PartRow]:
        """Flagged rows that wait for a decision, in plan order, with reason, scores and history."""
        manifest = self._refresh()
        decisions = standing(self._folder)
        for part in manifest.files("review"):
            for row in read_rows(self._folder, part):
                if row.id not in decisions and row.id not in self._folded:
                    yield row

    def decide(self, row_id: str, action: Action, *, who: str, text: str | None = None) -> None:
        """Record a decision; it is safe when this returns. A later one on the same row replaces it.

        Raises DataError if the row is not flagged, its decision is folded already, or the text of an edit is missing.
        """
        if action not in get_args(Action):
            raise DataError(f"decision {action!r} on row {row_id} is none of {', '.join(get_args(Action))}")
        if (action == "edit") != bool(text and text.strip()):
            raise DataError(f"decision {action!r} on row {row_id}: an edit, and nothing else, brings a text")
        if text is not None and text != text.encode(errors="replace").decode():
            raise DataError(f"the new text of row {row_id} holds half a surrogate pair, which is no text")
        self._refresh()
        if row_id not in self._flagged:
            raise DataError(f"row {row_id} is not flagged in {self._folder.uri}; decide on rows of the queue")
        if row_id in self._folded:
            raise DataError(f"the decision on row {row_id} is part of the manifest already and stands")
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = asdict(Decision(row_id, action, who, when, text))
        self._writer.write({name: value for name, value in line.items() if value is not None})
        self._writer.flush()

    def _refresh(self) -> Manifest:
        """Read ids of entries that came since the last call."""
        manifest = load_manifest(self._folder, self._job)
        for entry in manifest.entries[self._entries :]:
            self._flagged.update(read_ids(self._folder, entry.review))
        if any(entry.shard is None for entry in manifest.entries[self._entries :]):
            self._folded = folded(self._folder, manifest)
        self._entries = len(manifest.entries)
        return manifest
