"""From a source to a documents folder: found again, extended by what is new, or built, under a lock.

Invariant: a documents folder holds each text once, and its earlier batches never change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nexus_ray.corpora.documents import (
    COUNTS,
    FILE_BYTES,
    DocumentBatch,
    DocumentFile,
    DocumentManifest,
    DocumentWriter,
    load_documents,
    load_index,
    rewrite_without,
    write_index,
)
from nexus_ray.corpora.manifest import MANIFEST_FILE, stable_hash
from nexus_ray.corpora.sources import CorpusSource, Item, RawDocument
from nexus_ray.corpora.tasks import run_tasks
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage

VERSION = 1
"""Raised when the same source would give other documents than before."""


@dataclass(frozen=True)
class Found:
    """What the storage already holds for a source."""

    manifest: DocumentManifest | None = None
    """Batches that fit; None if a new folder is needed."""
    new: tuple[Item, ...] = ()
    """Items beyond them."""

    @property
    def complete(self) -> bool:
        return self.manifest is not None and not self.new


@dataclass(frozen=True)
class PartSpec:
    """Work item: some items of a source, to be written as files `<prefix>-*.parquet`."""

    source: CorpusSource
    items: tuple[Item, ...]
    folder: Storage
    prefix: str
    limit: int | None
    """Most documents to keep."""


@dataclass(frozen=True)
class Part:
    """Outcome of a PartSpec."""

    files: tuple[DocumentFile, ...]
    ids: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    stats: dict[str, int]


@dataclass(frozen=True)
class RewriteSpec:
    """Work item: a documents file less the rows marked in `drop`."""

    folder: Storage
    file: DocumentFile
    drop: NDArray[np.bool_]


def settings_hash(source: CorpusSource) -> str:
    return stable_hash([VERSION, source.domain, source.settings()])


def find_documents(source: CorpusSource, root: Storage) -> Found:
    """Documents of this source under `root`: all of them, or a prefix to which new items can be appended.

    An item that changed or went away makes a new folder; earlier ones stay for the runs that used them.
    """
    wanted = settings_hash(source)
    listing = source.listing()
    now = None if listing is None else {item.name: item.stamp for item in listing}
    best = Found()
    for name in root.list():
        if not name.startswith(f"{source.domain}-") or not root.exists(name, MANIFEST_FILE):
            continue
        manifest = load_documents(root.child(name))
        if manifest.settings != wanted or manifest.domain != source.domain:
            continue
        if now is None:
            return Found(manifest)
        if (batches := _matching_batches(manifest, now)) is not None:
            return Found(manifest.prefix(batches))
        known = {key: stamp for batch in manifest.batches for key, stamp in batch.items.items()}
        if known.items() < now.items() and (best.manifest is None or len(known) > len(now) - len(best.new)):
            best = Found(manifest, tuple(item for item in listing or () if item.name not in known))
    return best


def _matching_batches(manifest: DocumentManifest, now: dict[str, str]) -> int | None:
    """How many batches together come from exactly the items of `now`; the most, if several do."""
    known: dict[str, str] = {}
    found = None
    for count, batch in enumerate(manifest.batches, start=1):
        known.update(batch.items)
        if known == now:
            found = count
    return found


def folder_name(source: CorpusSource, items: Iterable[Item]) -> str:
    """`<domain>-<hash>`, known before the work is done."""
    return f"{source.domain}-{stable_hash([settings_hash(source), [[item.name, item.stamp] for item in items]])}"


def build_documents(
    sources: Sequence[CorpusSource], root: Storage, found: Sequence[Found], *, progress: Callable[[str], None]
) -> list[DocumentManifest]:
    """Documents of all sources, what is missing made in one go. The caller holds the lock of each domain.

    Raises DataError if a source has no documents.
    """
    drafts: list[tuple[DocumentManifest, tuple[Item, ...], int]] = []
    specs: list[PartSpec] = []
    for source, have in zip(sources, found, strict=True):
        if have.complete and have.manifest is not None:
            drafts.append((have.manifest, (), 0))
            continue
        progress(f"documents of {source.domain}: reading {source.label}")
        base, items = _base(source, root, have)
        own = list(_part_specs(source, base, items))
        drafts.append((base, items, len(own)))
        specs += own
    parts = run_tasks(write_part, specs, cost=_size, progress=progress, label="documents")
    manifests = []
    for base, items, count in drafts:
        own_parts, parts = parts[:count], parts[count:]
        manifests.append(_commit(base, items, own_parts, progress=progress) if items else base)
    return manifests


def _base(source: CorpusSource, root: Storage, have: Found) -> tuple[DocumentManifest, tuple[Item, ...]]:
    if have.manifest is not None:
        return have.manifest, have.new
    items = tuple(source.items())
    folder = root.child(folder_name(source, items))
    folder.delete()  # no manifest: the rest of a build that was interrupted
    licence, attribution = source.credits
    return DocumentManifest(
        source.domain, folder.uri, settings_hash(source), source.label, licence, attribution, ()
    ), items


def _part_specs(source: CorpusSource, base: DocumentManifest, items: Sequence[Item]) -> Iterable[PartSpec]:
    """Consecutive items of about `FILE_BYTES` together; a limit on documents makes it one part, which ends early."""
    limit = source.settings().get("max_documents")
    if limit is not None:
        limit = max(0, limit - base.stats["documents"])
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        width = FILE_BYTES if item.size is None else item.size
        if groups[-1] and limit is None and size + width > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += width
    for number, group in enumerate(groups):
        prefix = f"documents-{len(base.batches):03d}-{number:05d}"
        yield PartSpec(source, tuple(group), base.folder, prefix, limit)


def _size(spec: PartSpec) -> int:
    return sum(FILE_BYTES if item.size is None else item.size for item in spec.items)


def write_part(spec: PartSpec) -> Part:
    """Read the items and write their documents, in order; runs in a task."""
    writer = DocumentWriter(spec.folder, spec.prefix, spec.source.domain)
    for document in (document for item in spec.items for document in spec.source.read(item)):
        if spec.limit is not None and writer.stats["documents"] >= spec.limit:
            break
        writer.add(document)
    return _finish(writer)


def _finish(writer: DocumentWriter) -> Part:
    writer.close()
    ids, sizes = np.array(writer.ids, np.uint64), np.array(writer.sizes, np.int64)
    return Part(tuple(writer.files), ids, sizes, dict(writer.stats))


def append_documents(manifest: DocumentManifest, documents: Iterable[RawDocument]) -> DocumentManifest:
    """Add a batch of documents from elsewhere to a domain; earlier files and fingerprints stay as they are.

    Texts that the domain already has are dropped and counted. `prepare` then tokenises the new batch alone. Raises
    DataError if nothing new remains.
    """
    prefix = f"documents-{len(manifest.batches):03d}-00000"
    known = load_index(manifest).ids.tolist()
    writer = DocumentWriter(manifest.folder, prefix, manifest.domain, seen=known)
    for document in documents:
        writer.add(document)
    part = _finish(writer)
    if not part.files:
        raise DataError(
            f"domain {manifest.domain}: none of the {part.stats['documents_in']} documents to append is new "
            f"({part.stats['empty_dropped']} empty, {part.stats['exact_duplicates']} already there); append others"
        )
    return _add_batch(manifest, {}, part)


def _commit(
    base: DocumentManifest, items: Sequence[Item], parts: Sequence[Part], *, progress: Callable[[str], None]
) -> DocumentManifest:
    part = _without_repeats(base, parts, progress=progress)
    if not base.batches and not part.files:
        raise DataError(
            f"domains.{base.domain}.source: {base.label} gives no document ({len(items)} files or members, "
            f"{part.stats['documents_in']} texts, {part.stats['empty_dropped']} of them empty); check its paths or "
            f"members, text_field and where"
        )
    return _add_batch(base, {item.name: item.stamp for item in items}, part)


def _add_batch(base: DocumentManifest, items: dict[str, str], part: Part) -> DocumentManifest:
    index = f"index-{len(base.batches):03d}.parquet"
    write_index(base.folder, index, part.ids, part.sizes)
    digest = hashlib.sha256(part.ids.tobytes()).hexdigest()
    batch = DocumentBatch(part.files, index, digest, items, part.stats)
    manifest = replace(base, batches=(*base.batches, batch))
    manifest.save()
    return manifest


def _without_repeats(base: DocumentManifest, parts: Sequence[Part], *, progress: Callable[[str], None]) -> Part:
    """All parts together, each text once over all of them and the earlier batches; only files with repeats change."""
    ids = np.concatenate([np.empty(0, np.uint64), *(part.ids for part in parts)])
    sizes = np.concatenate([np.empty(0, np.int64), *(part.sizes for part in parts)])
    files = [file for part in parts for file in part.files]
    stats = {name: sum(part.stats[name] for part in parts) for name in COUNTS}
    drop = np.ones(len(ids), dtype=bool)
    drop[np.unique(ids, return_index=True)[1]] = False
    if base.batches:
        drop |= np.isin(ids, load_index(base).ids)
    if drop.any():
        ends = np.cumsum([file.documents for file in files])
        masks = np.split(drop, ends[:-1])
        dirty = [i for i, mask in enumerate(masks) if mask.any()]
        specs = [RewriteSpec(base.folder, files[i], masks[i]) for i in dirty]
        again = run_tasks(
            _rewrite, specs, cost=lambda spec: spec.file.bytes, progress=progress, label=f"duplicates of {base.domain}"
        )
        for i in dirty:
            base.folder.delete(files[i].file)
        replaced = dict(zip(dirty, again, strict=True))
        files = [file for i, old in enumerate(files) if (file := replaced.get(i, old)) is not None]
        stats["exact_duplicates"] += int(drop.sum())
        stats["documents"] -= int(drop.sum())
    return Part(tuple(files), ids[~drop], sizes[~drop], stats)


def _rewrite(spec: RewriteSpec) -> DocumentFile | None:
    return rewrite_without(spec.folder, spec.file, spec.drop)
