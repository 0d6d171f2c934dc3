"""`nexus-ray lineage`: from a synthetic row back to all that made it, from a document to where its text comes from, and
from a trained stage to what it read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from nexus_ray.config import RunConfig, parse_config
from nexus_ray.config.source import parse_yaml
from nexus_ray.corpora.documents import iter_documents
from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.corpora.prepare import PreparedDomain, find_prepared
from nexus_ray.errors import DataError
from nexus_ray.models.local import if_converted
from nexus_ray.storage import Storage
from nexus_ray.stream.plan import Plan, parse_plan
from nexus_ray.synthesis.history import Lineage, ParentDocument, find_documents
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.plan import PLAN_FILE

_ROW_ID = re.compile(r"[0-9a-f]{32}")
_DOCUMENT_ID = re.compile(r"[0-9a-f]{16}")
_BLOCK_ROWS = 65_536
Say = Callable[[str], None]


def show_lineage(target: str, what: str, *, out: Path | None, say: Say) -> None:
    """Print the lineage of a row or document (its id) or of a stage (its name) of a run or ledger; `out` takes all as
    JSON lines.

    Raises DataError if there is no such row, document or stage.
    """
    folder = Storage(target)
    if _ROW_ID.fullmatch(what) or _DOCUMENT_ID.fullmatch(what):
        found = [row_lineage(folder, what)] if _ROW_ID.fullmatch(what) else document_lineage(folder, what)
        for one in found:
            say(json.dumps(one, indent=2, ensure_ascii=False))
        lines: Iterator[dict[str, Any]] = iter(found)
    else:
        documents = list(stage_documents(folder, what))
        for domain in dict.fromkeys(line["domain"] for line in documents):
            mine = [line for line in documents if line["domain"] == domain]
            say(f"{domain}: {len(mine):,} documents in {sum(line['rows'] for line in mine):,} readings of rows")
        if out is None:
            say("--out FILE writes them all, with where each comes from")
        lines = iter(documents)
    if out is not None:
        out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        say(f"written to {out}")


# --- rows --------------------------------------------------------------------------------------------------------


def row_lineage(folder: Storage, row_id: str) -> dict[str, Any]:
    """Everything behind a row of a ledger, or of any ledger of a run."""
    ledgers = [folder] if folder.exists(PLAN_FILE) else [folder.child("synthesis", n) for n in folder.list("synthesis")]
    for place in ledgers:
        if not place.exists(PLAN_FILE):
            continue
        try:
            return {"ledger": place.uri, **_plain(Ledger.load(place).lineage(row_id))}
        except DataError as error:
            if len(ledgers) == 1:
                raise error
    raise DataError(f"row {row_id} is in no ledger of {folder.uri}; give the id of a row, and the folder of its run")


def _plain(found: Lineage) -> dict[str, Any]:
    prompt = found.request.prompt
    content = prompt.content if isinstance(prompt.content, str) else [asdict(turn) for turn in prompt.content]
    history = found.row.provenance
    return {
        "row": found.row.id,
        "outcome": found.kind,
        "reason": found.row.reason,
        "file": found.file,
        "text": found.row.text,
        "scores": history["scores"],
        "generator": history["generator"],
        "model": history["model"],
        "sampling": history["sampling"],
        "recipe": prompt.recipe,
        "parameters": dict(prompt.parameters),
        "prompt": content,
        "candidate": found.request.index,
        "request": found.answer.request_id,
        "answer": found.answer.text,
        "finish_reason": found.answer.finish_reason,
        "decision": asdict(found.decision) if found.decision else None,
        "flagged": found.flagged.text if found.flagged else None,
        "parents": list(prompt.parents),
        "parent_rows": [_plain(parent) for parent in found.parents],
        "parent_documents": [_plain_document(parent) for parent in found.documents],
    }


# --- documents ---------------------------------------------------------------------------------------------------


def document_lineage(folder: Storage, document_id: str) -> list[dict[str, Any]]:
    """Where a document comes from, once for each domain that holds it; of those built beside a run or ledger."""
    place = Storage(folder.uri.rsplit("/", 3 if folder.exists(PLAN_FILE) else 1)[0])
    found = {one.domain: _plain_document(one) for one in find_documents(place, document_id)}
    if not found:
        raise DataError(
            f"document {document_id} is in no domain that was built in {place.uri}; give an id of `parents`, and the "
            f"folder of the run in its storage"
        )
    return list(found.values())


def _plain_document(found: ParentDocument) -> dict[str, Any]:
    return {
        "document": found.id,
        "domain": found.domain,
        "source": found.source,
        "license": found.license,
        "attribution": found.attribution,
        "documents": found.folder,
        "provenance": dict(found.provenance),
        "row": _plain(found.row) if found.row is not None else None,
    }


# --- stages ------------------------------------------------------------------------------------------------------


def stage_documents(folder: Storage, stage: str) -> Iterator[dict[str, Any]]:
    """Every document that a stage read: domain, id, how many readings of rows held some of it, and its provenance."""
    config = _config_of(folder)
    names = [one.name for one in config.stages]
    if stage not in names:
        raise DataError(
            f"{stage!r} is neither a stage of {folder.uri} ({', '.join(names)}) nor an id: a row's has 32 hex digits, "
            f"a document's 16"
        )
    prepared = find_prepared(if_converted(config))
    if prepared is None:
        raise DataError(f"the prepared corpora of {folder.uri} are gone; run `nexus-ray prepare` on its config.yaml")
    plan = parse_plan(
        folder.read_text("plan.jsonl").splitlines(),
        seed=config.seed,
        seq_len=config.training.seq_len,
        shuffle_window_rows=config.data.shuffle_window_rows,
    )
    for name, rows in _rows_read(plan, names.index(stage)).items():
        counts = document_counts(prepared.domains[name].train, config.training.seq_len, rows)
        yield from _with_provenance(prepared.domains[name], counts)


def _config_of(folder: Storage) -> RunConfig:
    if not (folder.exists("config.yaml") and folder.exists("plan.jsonl")):
        raise DataError(f"{folder.uri} holds no run that was trained; name the folder of a run, or its config")
    return parse_config(parse_yaml(folder.read_text("config.yaml"), where=folder.path("config.yaml")))


def _rows_read(plan: Plan, stage_index: int) -> dict[str, dict[int, int]]:
    """By domain: how often each of its rows was read in the stage's last attempt."""
    attempts = [segment.attempt for segment in plan.segments if segment.stage_index == stage_index]
    if not attempts:
        raise DataError("that stage has not been planned yet; it has read nothing")
    start, stop = plan.stage_rows(stage_index, max(attempts))
    found: dict[str, dict[int, int]] = {}
    for low in range(start, stop, _BLOCK_ROWS):
        block = plan.sequences(low, min(low + _BLOCK_ROWS, stop))
        for number, name in enumerate(block.domains):
            rows, times = np.unique(block.row[block.domain == number], return_counts=True)
            mine = found.setdefault(name, {}) if rows.size else {}
            for row, count in zip(rows.tolist(), times.tolist(), strict=True):
                mine[row] = mine.get(row, 0) + count
    return found


def document_counts(manifest: TokenManifest, seq_len: int, rows: Mapping[int, int]) -> dict[str, int]:
    """By document: in how many readings of rows some of it stood. `rows`: how often each row was read."""
    counts: dict[str, int] = {}
    first = 0
    for shard in manifest.shards:
        last = first + shard.rows(seq_len)
        mine = [(row - first, times) for row, times in rows.items() if first <= row < last]
        first = last
        if not mine:
            continue
        with manifest.folder.filesystem.open_input_file(manifest.folder.path(shard.table)) as source:
            table = pq.read_table(source, columns=["id", "offset", "tokens"])
        offsets, ids = table.column("offset").to_numpy(), table.column("id").to_pylist()
        ends = offsets + table.column("tokens").to_numpy()
        for row, times in mine:
            low = int(np.searchsorted(ends, row * seq_len, side="right"))
            high = int(np.searchsorted(offsets, row * seq_len + seq_len + 1, side="left"))
            for document in ids[low:high]:
                counts[document] = counts.get(document, 0) + times
    return counts


def _with_provenance(domain: PreparedDomain, counts: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    assert domain.manifest is not None
    for row in iter_documents(domain.manifest):
        if row["id"] in counts:
            provenance = json.loads(row["provenance"])
            yield {"domain": domain.name, "document": row["id"], "rows": counts[row["id"]], "provenance": provenance}
