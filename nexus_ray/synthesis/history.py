"""From a row back to all that made it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from nexus_ray.corpora.parts import KINDS, Entry, Kind, Manifest, PartRow, read_ids, read_rows
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.decisions import Decision, standing
from nexus_ray.synthesis.plan import Plan, read_requests
from nexus_ray.synthesis.rows import Answer, Request
from nexus_ray.synthesis.shard_log import read_state


@dataclass(frozen=True)
class Lineage:
    """A row and what stands behind it."""

    row: PartRow
    """Its provenance names recipe, parameters, generator revision, sampling, scores and parents."""
    kind: Kind
    file: str
    """The part it is in."""
    request: Request
    """With the whole prompt."""
    answer: Answer
    decision: Decision | None
    """What a person decided, if it was flagged."""
    flagged: PartRow | None
    """The row as it was flagged, for one that people decided on."""
    parents: tuple[Lineage, ...]
    """Of those parents that are rows of the same ledger; the ids of all are in `request.prompt.parents`."""


def find_lineage(folder: Storage, plan: Plan, manifest: Manifest, row_id: str) -> Lineage:
    """The lineage of a row, of its latest part. Reads the id columns of all parts. Raises DataError if none has it."""
    found = _find(folder, manifest, {row_id})
    if row_id not in found:
        raise DataError(
            f"row {row_id} is in no part of {folder.uri}; give the id of an accepted, rejected or flagged row of it"
        )
    return _lineage(folder, plan, manifest, found[row_id])


def _lineage(folder: Storage, plan: Plan, manifest: Manifest, place: tuple[Entry, Kind, PartRow]) -> Lineage:
    entry, kind, row = place
    part = entry.part(kind)
    shard, request_id = row.provenance["shard"], row.provenance["request"]
    answer = read_state(folder, shard).answers.get(request_id)
    if part is None or answer is None:
        raise DataError(f"the log of shard {shard} in {folder.uri} lacks the answer of row {row.id}; restore the log")
    request = read_requests(folder, plan.shards[shard])[request_id]
    flagged_id = row.provenance["review"]["row"] if "review" in row.provenance else None
    flagged = _find(folder, manifest, {flagged_id}, kinds=("review",)) if flagged_id else {}
    parents = _find(folder, manifest, set(request.prompt.parents)) if request.prompt.parents else {}
    return Lineage(
        row=row,
        kind=kind,
        file=part.file,
        request=request,
        answer=answer,
        decision=standing(folder).get(flagged_id or row.id),
        flagged=flagged[flagged_id][2] if flagged_id in flagged else None,
        parents=tuple(_lineage(folder, plan, manifest, parents[id]) for id in request.prompt.parents if id in parents),
    )


def _find(
    folder: Storage, manifest: Manifest, wanted: Collection[str], *, kinds: tuple[Kind, ...] = KINDS
) -> dict[str, tuple[Entry, Kind, PartRow]]:
    """Where rows are, the latest place of each: a decided row comes again in a later part."""
    missing = set(wanted)
    found: dict[str, tuple[Entry, Kind, PartRow]] = {}
    for entry in reversed(manifest.entries):
        for kind in kinds:
            part = entry.part(kind)
            if part is None or not missing or missing.isdisjoint(read_ids(folder, part)):
                continue
            for row in read_rows(folder, part):
                if row.id in missing:
                    found[row.id] = entry, kind, row
            missing -= found.keys()
    return found
