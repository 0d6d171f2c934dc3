"""Documents of a domain as Parquet (`id, text, domain, provenance`), in source order, each text once.

Invariant: files are only ever added, in batches; the manifest, written last, lists them. An index beside them holds
id and size of every document, so that splits and shards are planned without reading text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nexus_ray.config.tree import exact_fraction
from nexus_ray.corpora.manifest import MANIFEST_FILE, stable_hash
from nexus_ray.corpora.sources import RawDocument
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage

FORMAT = 1
FILE_BYTES = 64 * 2**20
"""Text of one documents file, about."""
GROUP_BYTES = 4 * 2**20
"""Text of one row group, about: what a reader holds at once."""
SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "text", "domain", "provenance")])
COUNTS = ("documents_in", "empty_dropped", "exact_duplicates", "documents")


def document_id(text: str) -> str:
    """First 16 hex digits of the SHA-256 of the UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def held_out_threshold(fraction: float) -> int:
    """Documents whose id, read as a 64-bit number, is below this are held out: the split depends on the text alone."""
    return int(exact_fraction(fraction) * 2**64)


@dataclass(frozen=True)
class DocumentFile:
    """One Parquet file of documents."""

    file: str
    documents: int
    text_bytes: int
    """UTF-8 bytes of the texts."""
    bytes: int
    """Size of the file."""


@dataclass(frozen=True)
class DocumentBatch:
    """What one build or append added."""

    files: tuple[DocumentFile, ...]
    index: str
    """File with id, size and file number of each document."""
    ids_sha256: str
    """Digest of the ids in order, and so of the content."""
    items: Mapping[str, str] = field(default_factory=dict)
    """The source's items and their stamps; empty for documents that came from elsewhere."""
    stats: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DocumentManifest:
    """All batches of one domain's documents."""

    domain: str
    root: str
    """URI of the folder."""
    settings: str
    """Hash of the source's settings."""
    label: str
    license: str | None
    attribution: str | None
    batches: tuple[DocumentBatch, ...]

    @property
    def folder(self) -> Storage:
        return Storage(self.root)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content; that of a prefix of the batches never changes."""
        value = ""
        for batch in self.batches:
            value = stable_hash([value, batch.ids_sha256])
        return value

    @property
    def files(self) -> list[DocumentFile]:
        return [file for batch in self.batches for file in batch.files]

    @property
    def stats(self) -> dict[str, int]:
        """`documents_in` of the source, `empty_dropped`, `exact_duplicates` and the `documents` that remain."""
        return {name: sum(batch.stats.get(name, 0) for batch in self.batches) for name in COUNTS}

    def prefix(self, batches: int) -> DocumentManifest:
        return replace(self, batches=self.batches[:batches])

    def save(self) -> None:
        data = {"format": FORMAT, "fingerprint": self.fingerprint, "documents": self.stats["documents"], **asdict(self)}
        data.pop("root")
        self.folder.write_json(data, MANIFEST_FILE)


def load_documents(folder: Storage) -> DocumentManifest:
    """The manifest of a documents folder. Raises DataError if it is missing, torn or of another version."""
    try:
        data = folder.read_json(MANIFEST_FILE)
        if data.pop("format") != FORMAT:
            raise ValueError("another format")
        fingerprint = data.pop("fingerprint")
        data.pop("documents")
        files = [[DocumentFile(**file) for file in batch.pop("files")] for batch in data["batches"]]
        pairs = zip(files, data.pop("batches"), strict=True)
        batches = tuple(DocumentBatch(files=tuple(some), **batch) for some, batch in pairs)
        manifest = DocumentManifest(root=folder.uri, batches=batches, **data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder.path(MANIFEST_FILE)} cannot be used ({error}); delete {folder.uri} and it is built again"
        ) from None
    if manifest.fingerprint != fingerprint:
        raise DataError(f"{folder.path(MANIFEST_FILE)} does not fit its fingerprint; delete {folder.uri}")
    return manifest


class DocumentWriter:
    """Writes documents to `<prefix>-00000.parquet`, ..., leaving out empty ones and repeated texts; all else is kept.

    Output depends on the documents alone. `seen` holds ids that earlier batches already have.
    """

    def __init__(self, folder: Storage, prefix: str, domain: str, *, seen: Iterable[int] = ()) -> None:
        self.folder = folder
        self.prefix = prefix
        self.domain = domain
        self.files: list[DocumentFile] = []
        self.ids: list[int] = []
        self.sizes: list[int] = []
        self.stats = dict.fromkeys(COUNTS, 0)
        self._seen = set(seen)
        self._rows: list[tuple[str, str, str, str]] = []
        self._group_bytes = 0
        self._open: tuple[pa.BufferOutputStream, pq.ParquetWriter] | None = None
        self._file_first = 0

    def add(self, document: RawDocument) -> None:
        """Raises DataError if the text cannot be written as UTF-8."""
        self.stats["documents_in"] += 1
        if not document.text.strip():
            self.stats["empty_dropped"] += 1
            return
        try:
            data = document.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"domain {self.domain}: {dict(document.provenance)} holds half a surrogate pair at character "
                f"{error.start}, which is no text; mend the source"
            ) from None
        digest = hashlib.sha256(data).hexdigest()[:16]
        number = int(digest, 16)
        if number in self._seen:
            self.stats["exact_duplicates"] += 1
            return
        self._seen.add(number)
        self.ids.append(number)
        self.sizes.append(len(data))
        self.stats["documents"] += 1
        trace = json.dumps(dict(document.provenance), sort_keys=True, ensure_ascii=False)
        self._rows.append((digest, document.text, self.domain, trace))
        self._group_bytes += len(data)
        if self._group_bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._finish_file()

    def _flush(self) -> None:
        if self._rows:
            if self._open is None:
                sink = pa.BufferOutputStream()
                self._open = sink, _parquet_writer(sink)
            columns = [pa.array(column, pa.string()) for column in zip(*self._rows, strict=True)]
            self._open[1].write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
        self._rows, self._group_bytes = [], 0
        if sum(self.sizes[self._file_first :]) >= FILE_BYTES:
            self._finish_file()

    def _finish_file(self) -> None:
        if self._open is None:
            return
        sink, writer = self._open
        writer.close()
        data = sink.getvalue().to_pybytes()
        name = f"{self.prefix}-{len(self.files):05d}.parquet"
        self.folder.write_bytes(data, name)
        sizes = self.sizes[self._file_first :]
        self.files.append(DocumentFile(name, len(sizes), sum(sizes), len(data)))
        self._open, self._file_first = None, len(self.sizes)


def _parquet_writer(sink: pa.BufferOutputStream) -> pq.ParquetWriter:
    return pq.ParquetWriter(sink, SCHEMA, compression="zstd", use_dictionary=["domain"], write_page_checksum=True)


def rewrite_without(folder: Storage, file: DocumentFile, drop: NDArray[np.bool_]) -> DocumentFile | None:
    """A copy of the file, under a new name, without the rows marked in `drop`; None if nothing is left of it."""
    if drop.all():
        return None
    sink = pa.BufferOutputStream()
    text_bytes, row = 0, 0
    with _open_parquet(folder, file.file) as parquet, _parquet_writer(sink) as writer:
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group)
            kept = table.filter(pa.array(~drop[row : row + table.num_rows]))
            row += table.num_rows
            text_bytes += sum(len(text.encode()) for text in kept.column("text").to_pylist())
            writer.write_table(kept)
    data = sink.getvalue().to_pybytes()
    name = file.file.replace(".parquet", "-unique.parquet")
    folder.write_bytes(data, name)
    return DocumentFile(name, int((~drop).sum()), text_bytes, len(data))


# --- the index ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DocumentIndex:
    """One entry per document, in order."""

    ids: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    """UTF-8 bytes of the text."""
    files: NDArray[np.int32]
    """Number of the file in `DocumentManifest.files`."""
    rows: NDArray[np.int64]
    """Row inside that file."""

    def held_out(self, fraction: float) -> NDArray[np.bool_]:
        """Mask of the documents that are never trained on."""
        return self.ids < np.uint64(held_out_threshold(fraction))


def write_index(folder: Storage, name: str, ids: NDArray[np.uint64], sizes: NDArray[np.int64]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ids, "bytes": sizes}), sink, write_page_checksum=True)
    folder.write_bytes(sink.getvalue().to_pybytes(), name)


def load_index(manifest: DocumentManifest, *, first_batch: int = 0) -> DocumentIndex:
    """The index of the batches from `first_batch` on. Raises DataError if it cannot be read or does not fit."""
    skipped = sum(len(batch.files) for batch in manifest.batches[:first_batch])
    ids, sizes, files, rows = [], [], [], []
    for batch in manifest.batches[first_batch:]:
        table = _read_index(manifest.folder, batch.index)
        counts = [file.documents for file in batch.files]
        if table.num_rows != sum(counts):
            raise _broken(manifest.folder, batch.index, f"{table.num_rows} entries for {sum(counts)} documents")
        ids.append(table.column("id").to_numpy())
        if hashlib.sha256(ids[-1].tobytes()).hexdigest() != batch.ids_sha256:
            raise _broken(manifest.folder, batch.index, "its ids are not those of the manifest")
        sizes.append(table.column("bytes").to_numpy())
        files.append(np.repeat(np.arange(skipped, skipped + len(counts), dtype=np.int32), counts))
        rows += [np.arange(count, dtype=np.int64) for count in counts]
        skipped += len(counts)
    return DocumentIndex(
        np.concatenate([np.empty(0, np.uint64), *ids]),
        np.concatenate([np.empty(0, np.int64), *sizes]),
        np.concatenate([np.empty(0, np.int32), *files]),
        np.concatenate([np.empty(0, np.int64), *rows]),
    )


def _read_index(folder: Storage, name: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(folder.read_bytes(name)), page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise _broken(folder, name, error) from None


# --- reading -----------------------------------------------------------------------------------------------------


def read_rows(folder: Storage, file: str, start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Rows [start, stop) of a documents file, one row group at a time. Raises DataError naming file and row."""
    first = 0
    try:
        with _open_parquet(folder, file) as parquet:
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                low, high = max(start - first, 0), min(stop - first, rows)
                if low < high:
                    table = parquet.read_row_group(group, use_threads=False).slice(low, high - low)
                    yield from table.combine_chunks().to_batches()
                first += rows
    except (OSError, pa.ArrowException) as error:
        raise _broken(folder, f"{file}, row {first}", error) from None


def iter_documents(
    manifest: DocumentManifest, *, split: str | None = None, held_out_fraction: float = 0.0
) -> Iterator[dict[str, str]]:
    """Documents in order as mappings `id, text, domain, provenance`; of `train` or `held_out` only if asked for."""
    threshold = held_out_threshold(held_out_fraction)
    for file in manifest.files:
        for batch in read_rows(manifest.folder, file.file, 0, file.documents):
            for row in batch.to_pylist():
                if split is None or (int(row["id"], 16) < threshold) == (split == "held_out"):
                    yield row


def _open_parquet(folder: Storage, file: str) -> pq.ParquetFile:
    return pq.ParquetFile(folder.filesystem.open_input_file(folder.path(file)), page_checksum_verification=True)


def _broken(folder: Storage, what: str, reason: object) -> DataError:
    return DataError(f"{folder.path(what)} cannot be read ({reason}); delete {folder.uri} and it is built again")
