"""Parts of a ledger: Parquet files of accepted, rejected and flagged rows, and the manifest that makes them count.

Invariant: a part's name and bytes depend on its rows alone (for one version of pyarrow, which signs its files); a file
that the manifest does not list does not exist. The manifest only grows at its end, and the fingerprint of its first n
entries never changes: a training run may pin them and start while the rest is still being written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nexus_ray.corpora.documents import GROUP_BYTES
from nexus_ray.corpora.documents import SCHEMA as DOCUMENT_SCHEMA
from nexus_ray.corpora.manifest import MANIFEST_FILE, stable_hash
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage

FORMAT = 1
STATS_FILE = "stats.json"
Kind = Literal["accepted", "rejected", "review"]
KINDS: tuple[Kind, ...] = ("accepted", "rejected", "review")
JUDGED_SCHEMA = DOCUMENT_SCHEMA.append(pa.field("reason", pa.string()))
"""Rejected and flagged rows: a document (its scores are in the provenance) and why it is not accepted."""


@dataclass(frozen=True)
class PartFile:
    """One Parquet file."""

    file: str
    """Path inside the ledger's folder."""
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PartRow:
    """One row of a part."""

    id: str
    text: str
    domain: str
    provenance: Mapping[str, Any]
    reason: str = ""


# --- files -------------------------------------------------------------------------------------------------------


def write_table(folder: Storage, file: str, table: pa.Table) -> PartFile:
    """Write a table at once, in row groups of about `GROUP_BYTES`; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    group_rows = max(1, table.num_rows * GROUP_BYTES // max(GROUP_BYTES, table.nbytes))
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table, row_group_size=group_rows)
    data = sink.getvalue().to_pybytes()
    folder.write_bytes(data, file)
    return PartFile(file, table.num_rows, len(data), hashlib.sha256(data).hexdigest())


def write_part(folder: Storage, kind: Kind, name: str, rows: Sequence[PartRow]) -> PartFile | None:
    """Write `<kind>/<name>.parquet`; no file if there are no rows. Half surrogate pairs become `\\udc80`."""
    if not rows:
        return None
    schema = DOCUMENT_SCHEMA if kind == "accepted" else JUDGED_SCHEMA
    columns = {column: [getattr(row, column) for row in rows] for column in schema.names}
    columns["provenance"] = [json.dumps(row.provenance, sort_keys=True, ensure_ascii=False) for row in rows]
    plain = {name: [value.encode(errors="backslashreplace").decode() for value in columns[name]] for name in columns}
    return write_table(folder, f"{kind}/{name}.parquet", pa.table(plain, schema=schema))


def read_rows(folder: Storage, part: PartFile | None) -> Iterator[PartRow]:
    """Rows of a part, in order, one row group at a time in memory beside the file's bytes; none for None.

    Raises DataError if the file is missing or is not the one that was listed.
    """
    if part is None:
        return
    with _open_checked(folder, part) as parquet:
        for group in range(parquet.num_row_groups):
            for row in parquet.read_row_group(group, use_threads=False).to_pylist():
                yield PartRow(**{**row, "provenance": json.loads(row["provenance"])})


def read_columns(folder: Storage, part: PartFile, columns: Sequence[str]) -> pa.Table:
    """Some columns of a file whose digest fits. Raises DataError otherwise."""
    with _open_checked(folder, part) as parquet:
        return parquet.read(list(columns), use_threads=False)


def read_ids(folder: Storage, part: PartFile | None) -> list[str]:
    """Ids of a part's rows, reading nothing else. Raises DataError if the file cannot be read."""
    if part is None:
        return []
    try:
        with folder.filesystem.open_input_file(folder.path(part.file)) as source:
            ids: list[str] = pq.read_table(source, columns=["id"], use_threads=False).column("id").to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise _broken(folder, part, str(error)) from None
    return ids


def _open_checked(folder: Storage, part: PartFile) -> pq.ParquetFile:
    try:
        data = folder.read_bytes(part.file)
    except OSError as error:
        raise _broken(folder, part, error.strerror or str(error)) from None
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise _broken(folder, part, f"{len(data)} bytes whose SHA-256 is not the listed one")
    return pq.ParquetFile(pa.BufferReader(data))


def _broken(folder: Storage, part: PartFile, why: str) -> DataError:
    return DataError(
        f"{folder.path(part.file)} is listed with {part.rows} rows and cannot be used ({why}); restore the file, or "
        f"start under another name and borrow this ledger's answers"
    )


# --- the manifest ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What one commit added: the rows of a shard, or a batch of decisions on flagged rows."""

    name: str
    """`part-00012` (of that shard) or `decided-00003`."""
    shard: int | None
    """None for decisions."""
    accepted: PartFile | None
    rejected: PartFile | None
    review: PartFile | None
    counts: Mapping[str, int] = field(default_factory=dict)
    """Of a shard: requests, answered, failed, empty (answers without a row), prompt_tokens, completion_tokens."""
    rejected_by: Mapping[str, int] = field(default_factory=dict)
    """Rejected rows by filter: the reason up to its colon."""

    def part(self, kind: Kind) -> PartFile | None:
        part: PartFile | None = getattr(self, kind)
        return part

    def rows(self, kind: Kind) -> int:
        return part.rows if (part := self.part(kind)) else 0


@dataclass(frozen=True)
class Manifest:
    """All entries in order."""

    job: str
    """Fingerprint of the job, the start of the chain."""
    entries: tuple[Entry, ...] = ()
    fingerprint: str = ""
    """Hash of job and entries, and so of all rows."""

    def __post_init__(self) -> None:
        if not self.entries:
            object.__setattr__(self, "fingerprint", self.job)

    @property
    def shards(self) -> int:
        """Shards committed: those of the plan's beginning."""
        return sum(entry.shard is not None for entry in self.entries)

    def extended(self, entry: Entry) -> Manifest:
        """A new manifest with one more entry."""
        fingerprint = stable_hash([self.fingerprint, asdict(entry)])
        return replace(self, entries=(*self.entries, entry), fingerprint=fingerprint)

    def prefix(self, entries: int, fingerprint: str | None = None) -> Manifest:
        """The manifest as it was with so many entries; what a run pins is that number and the prefix's fingerprint.

        Raises DataError if there are fewer, or if the fingerprint is not the one that was pinned.
        """
        if not 0 <= entries <= len(self.entries):
            raise DataError(
                f"the synthesis manifest has {len(self.entries)} entries and {entries} were asked for; it was made "
                f"anew: restore the ledger, or start the run that pinned it under another name"
            )
        prefix = Manifest(self.job)
        for entry in self.entries[:entries]:
            prefix = prefix.extended(entry)
        if fingerprint not in (None, prefix.fingerprint):
            raise DataError(
                f"the first {entries} entries of the synthesis manifest have fingerprint {prefix.fingerprint}, pinned "
                f"was {fingerprint}; restore the ledger, or start the run that pinned it under another name"
            )
        return prefix

    def rows(self, kind: Kind) -> int:
        return sum(entry.rows(kind) for entry in self.entries)

    def files(self, kind: Kind) -> list[PartFile]:
        """The parts of a kind, in order."""
        return [part for entry in self.entries if (part := entry.part(kind)) is not None]


def save_manifest(folder: Storage, manifest: Manifest) -> None:
    """Put the manifest in place at once: only now do its newest parts count."""
    entries = ",\n".join(json.dumps(asdict(entry), ensure_ascii=False) for entry in manifest.entries)
    head = {"format": FORMAT, "job": manifest.job, "fingerprint": manifest.fingerprint}
    rows = {kind: manifest.rows(kind) for kind in KINDS}
    text = json.dumps({**head, "rows": rows}, indent=1)
    folder.write_text(f'{text[:-2]},\n "entries": [\n{entries}\n]}}\n', MANIFEST_FILE)


def load_manifest(folder: Storage, job: str | None = None) -> Manifest:
    """The manifest of a ledger's folder, of whatever job if none is named; an empty one if nothing is committed.

    Raises DataError if it is broken.
    """
    if not folder.exists(MANIFEST_FILE):
        return Manifest(job or "")
    try:
        data = folder.read_json(MANIFEST_FILE)
        job = data["job"] if job is None else job
        if data["format"] != FORMAT or data["job"] != job:
            raise ValueError(f"format {data['format']} of job {data['job']}, expected {FORMAT} of {job}")
        manifest = Manifest(str(job))
        for entry in data["entries"]:
            parts = {kind: PartFile(**entry[kind]) if entry[kind] else None for kind in KINDS}
            manifest = manifest.extended(Entry(**{**entry, **parts}))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder.path(MANIFEST_FILE)} cannot be used ({error}); restore it, or delete it and the parts are "
            f"written again from the logs"
        ) from None
    if manifest.fingerprint != data["fingerprint"]:
        raise DataError(
            f"{folder.path(MANIFEST_FILE)} does not fit its fingerprint: it was changed; restore it, or delete it and "
            f"the parts are written again from the logs"
        )
    return manifest


def sweep(folder: Storage, manifest: Manifest) -> None:
    """Delete what a crash left: parts that the manifest does not list, files that were never put in place.

    Only for the process that commits.
    """
    listed = {part.file for kind in KINDS for part in manifest.files(kind)}
    delete_unlisted(folder, KINDS, listed)
    for name in folder.list():
        if name.startswith((f".{MANIFEST_FILE}.", f".{STATS_FILE}.")) and name.endswith(".tmp"):
            folder.delete(name)


def delete_unlisted(folder: Storage, parents: Iterable[str], listed: Collection[str]) -> None:
    """Delete all files in the folders `parents` whose path is not in `listed`."""
    for parent in parents:
        for name in folder.list(parent):
            if f"{parent}/{name}" not in listed:
                folder.delete(parent, name)


def count_reasons(rows: Iterable[PartRow]) -> dict[str, int]:
    """Rows by the filter that their reason names."""
    counts: dict[str, int] = {}
    for row in rows:
        name = row.reason.partition(":")[0]
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
