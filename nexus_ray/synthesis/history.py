"""From a row back to all that made it: its prompt and answer, and the documents that the prompt was made from.

A parent document is looked up where its domain's documents lie, beside the runs; one that was itself written by a job
leads on into the ledger of that job.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nexus_ray.corpora.documents import DocumentManifest, load_documents, load_index
from nexus_ray.corpora.documents import read_rows as read_documents
from nexus_ray.corpora.manifest import MANIFEST_FILE
from nexus_ray.corpora.parts import KINDS, Entry, Kind, Manifest, PartRow, load_manifest, read_ids, read_rows
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.decisions import Decision, standing
from nexus_ray.synthesis.plan import Plan, load_plan, read_requests
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
    documents: tuple[ParentDocument, ...]
    """Those parents that are documents of a domain and are still there."""


@dataclass(frozen=True)
class ParentDocument:
    """A document, and where its text comes from."""

    id: str
    domain: str
    folder: str
    """Where the domain's documents lie."""
    source: str
    """For people."""
    license: str | None
    attribution: str | None
    provenance: Mapping[str, Any]
    """Of a file: which one, and the place in it. Of a row that a job wrote: `ledger` and `row`."""
    row: Lineage | None
    """Of a document that a job wrote, as far as its ledger is still there."""


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
        documents=_parent_documents(folder, plan, request.prompt.parents),
    )


def _parent_documents(folder: Storage, plan: Plan, parents: tuple[str, ...]) -> tuple[ParentDocument, ...]:
    domain = plan.job.recipe.get("documents") if isinstance(plan.job.recipe, Mapping) else None
    if domain is None:
        return ()
    place = Storage(folder.uri.rsplit("/", 3)[0])  # <storage>/<run>/synthesis/<domain>
    found = (next(find_documents(place, id, domain=domain), None) for id in parents)
    return tuple(one for one in found if one is not None)


def find_documents(storage: Storage, id: str, *, domain: str | None = None) -> Iterator[ParentDocument]:
    """The document of that id in each of the built domains of a storage that holds it, or in `domain` alone.

    One domain built from several states of its source may come several times. Reads the ids of all that it looks at.
    """
    root = storage.child("_shared", "documents")
    for name in root.list():
        if not root.exists(name, MANIFEST_FILE) or (domain is not None and not name.startswith(f"{domain}-")):
            continue
        manifest = load_documents(root.child(name))
        if domain in (None, manifest.domain) and (found := _document(manifest, id)) is not None:
            yield found


def _document(manifest: DocumentManifest, id: str) -> ParentDocument | None:
    index = load_index(manifest)
    places = np.flatnonzero(index.ids == np.uint64(int(id, 16)))
    if not len(places):
        return None
    file, row = manifest.files[int(index.files[places[0]])].file, int(index.rows[places[0]])
    [document] = [one for batch in read_documents(manifest.folder, file, row, row + 1) for one in batch.to_pylist()]
    provenance = json.loads(document["provenance"])
    return ParentDocument(
        id=id,
        domain=manifest.domain,
        folder=manifest.root,
        source=manifest.label,
        license=manifest.license,
        attribution=manifest.attribution,
        provenance=provenance,
        row=_earlier_row(provenance),
    )


def _earlier_row(provenance: Mapping[str, Any]) -> Lineage | None:
    """The row of a ledger that a document is; None if it is none, or the ledger is gone."""
    if provenance.get("source") != "synthesis":
        return None
    folder = Storage(provenance["ledger"])
    plan = load_plan(folder)
    if plan is None:
        return None
    return find_lineage(folder, plan, load_manifest(folder, plan.job.fingerprint), provenance["row"])


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
