"""What people decide on flagged rows: an append-only log beside the parts, folded into later parts by the commit.

Invariant: until a decision is folded the latest one on a row counts; once folded it stands, so that the manifest's
prefix stays valid. Who decided is kept in the row's provenance; when is kept in the log alone, part of no id or file.

A text that a person wrote is judged like any other before it counts: by the stateless filters, and by whether a kept
row or another edit says the very same. One that is refused keeps its row in the queue, with the new reason, until it is
decided otherwise or by `override`. Edits are compared with rows, never rows with edits: what a job accepts must not
depend on when a person found the time.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Literal, Protocol, get_args

from nexus_ray.corpora.parts import Manifest, PartRow, load_manifest, read_ids, read_rows
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.append_log import LogWriter, read_log
from nexus_ray.synthesis.filters.exact import digest
from nexus_ray.synthesis.rows import Request, Row, Verdict, content_id
from nexus_ray.synthesis.shard_log import plain_scores

NAME = "decisions"
REFUSALS_FILE = "refused-edits.json"
REJECTED = "review: rejected by a person"
REPEATED = Verdict("reject", "exact: as another edit")
Action = Literal["accept", "reject", "edit", "override", "undo"]
EDITS: tuple[Action, ...] = ("edit", "override")
"""They bring a text."""


@dataclass(frozen=True)
class Decision:
    """One line of `decisions.jsonl`."""

    row: str
    """Id of the flagged row."""
    action: Action
    """`override` is an edit that counts whatever the filters say; `undo` takes an earlier decision back and returns the
    row to the queue."""
    who: str
    when: str
    """UTC, ISO 8601."""
    text: str | None = None
    """The new text of an `edit` or `override`."""


@dataclass(frozen=True)
class Refusal:
    """An edit that the filters reject."""

    row: str
    """Id of the flagged row, which stays in the queue."""
    text: str
    reason: str
    scores: Mapping[str, float | str]


class EditJudge(Protocol):
    """Judges what people write."""

    def judge_edit(self, row: Row, flagged: str) -> tuple[Row, Verdict]:
        """The row as it would be kept (personal data masked) and the verdict on it; `flagged` is the text before."""
        ...


@dataclass(frozen=True)
class Folded:
    """What decisions came to; rows in plan order."""

    accepted: list[PartRow]
    rejected: list[PartRow]
    refusals: list[Refusal]


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
    return {row.provenance["review"]["row"] for row in _decided_before(folder, manifest)}


def refusals(folder: Storage) -> dict[str, Refusal]:
    """The edits that stand and are refused, by row. Raises DataError if their file is broken."""
    if not folder.exists(REFUSALS_FILE):
        return {}
    try:
        found = [Refusal(**item) for item in folder.read_json(REFUSALS_FILE)]
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{folder.path(REFUSALS_FILE)} cannot be used ({error}); delete it and the edits are judged again"
        ) from None
    decisions = standing(folder)
    return {one.row: one for one in found if (made := decisions.get(one.row)) and _is_refused(made, one)}


def waiting_edits(folder: Storage, manifest: Manifest) -> int:
    """Edits that stand and were not judged yet."""
    done, refused = folded(folder, manifest), refusals(folder)
    return sum(made.action in EDITS and id not in done and id not in refused for id, made in standing(folder).items())


def save_refusals(folder: Storage, found: list[Refusal]) -> None:
    if found or folder.exists(REFUSALS_FILE):
        folder.write_json([asdict(one) for one in found], REFUSALS_FILE)


def _is_refused(decision: Decision, refusal: Refusal | None) -> bool:
    return refusal is not None and decision.action == "edit" and decision.text == refusal.text


def decided_rows(
    folder: Storage,
    manifest: Manifest,
    decisions: Mapping[str, Decision],
    requests: Callable[[int], Mapping[str, Request]],
    judge: EditJudge | None,
) -> Folded:
    """The flagged rows that `decisions` name as they go into parts. `requests`: those of a shard, by id.

    Without a judge edits wait. An edit that is known to be refused is not judged again.
    """
    known = refusals(folder)
    before = _decided_before(folder, manifest)
    seen = {digest(row.text) for row in before if row.provenance["review"]["action"] in EDITS}
    result = Folded([], [], [])
    for part in manifest.files("review"):
        if decisions.keys().isdisjoint(read_ids(folder, part)):
            continue
        for row in read_rows(folder, part):
            decision = decisions.get(row.id)
            if decision is None:
                continue
            if decision.action not in EDITS:
                (result.rejected if decision.action == "reject" else result.accepted).append(_decided(row, decision))
            elif _is_refused(decision, known.get(row.id)):
                result.refusals.append(known[row.id])
            elif judge is not None:
                text, verdict = _judged(row, decision, requests, judge, seen)
                if verdict.outcome == "reject" and decision.action == "edit":
                    scores = plain_scores(verdict.scores)
                    result.refusals.append(Refusal(row.id, decision.text or "", verdict.reason, scores))
                else:
                    seen.add(digest(text))
                    result.accepted.append(_edited(row, decision, text, verdict))
    return result


def _decided_before(folder: Storage, manifest: Manifest) -> Iterator[PartRow]:
    for entry in manifest.entries:
        if entry.shard is None:
            for part in (entry.accepted, entry.rejected):
                yield from read_rows(folder, part)


def _judged(
    row: PartRow,
    decision: Decision,
    requests: Callable[[int], Mapping[str, Request]],
    judge: EditJudge,
    seen: set[bytes],
) -> tuple[str, Verdict]:
    """The new text as it would be kept, and the verdict on it. `seen`: digests of the edits before."""
    history = row.provenance
    prompt = requests(history["shard"])[history["request"]].prompt
    text = decision.text or ""
    written = Row(text, history["request"], history["item"], prompt, history["finish_reason"], row.domain)
    kept, verdict = judge.judge_edit(written, row.text)
    if verdict.outcome != "reject" and digest(kept.text) in seen:
        verdict = replace(REPEATED, scores=verdict.scores)
    return kept.text, verdict


def _decided(row: PartRow, decision: Decision) -> PartRow:
    provenance = {**row.provenance, "review": _review(row, decision)}
    return PartRow(row.id, row.text, row.domain, provenance, REJECTED if decision.action == "reject" else "")


def _edited(row: PartRow, decision: Decision, text: str, verdict: Verdict) -> PartRow:
    """It has an id and scores of its own; `provenance.review.row` leads back to the flagged one."""
    review = _review(row, decision)
    if verdict.outcome == "reject":
        review["overruled"] = verdict.reason
    provenance = {**row.provenance, "scores": plain_scores(verdict.scores), "review": review}
    return PartRow(content_id("edit", [row.id, text]), text, row.domain, provenance)


def _review(row: PartRow, decision: Decision) -> dict[str, Any]:
    return {"row": row.id, "action": decision.action, "who": decision.who, "flagged": row.reason}


def _refused(row: PartRow, refusal: Refusal) -> PartRow:
    provenance = {**row.provenance, "refused": {"text": refusal.text, "scores": refusal.scores}}
    return replace(row, reason=f"{refusal.reason} (in the new text; the row: {row.reason})", provenance=provenance)


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
        """Flagged rows that wait for a decision, in plan order, with reason, scores and history.

        One whose edit was refused says so in its reason; what was written is in `provenance["refused"]`.
        """
        manifest = self._refresh()
        decisions, refused = standing(self._folder), refusals(self._folder)
        for part in manifest.files("review"):
            for row in read_rows(self._folder, part):
                if row.id in self._folded:
                    continue
                if refusal := refused.get(row.id):
                    yield _refused(row, refusal)
                elif row.id not in decisions:
                    yield row

    def decide(self, row_id: str, action: Action, *, who: str, text: str | None = None) -> None:
        """Record a decision; it is safe when this returns. A later one on the same row replaces it.

        Raises DataError if the row is not flagged, its decision is folded already, or the text of an edit is missing.
        """
        if action not in get_args(Action):
            raise DataError(f"decision {action!r} on row {row_id} is none of {', '.join(get_args(Action))}")
        if (action in EDITS) != bool(text and text.strip()):
            raise DataError(f"decision {action!r} on row {row_id}: edit and override, and nothing else, bring a text")
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
