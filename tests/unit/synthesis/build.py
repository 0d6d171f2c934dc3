"""Builds the documents of a domain without its source."""

from __future__ import annotations

import hashlib

import numpy as np

from nexus_ray.corpora.documents import DocumentBatch, DocumentManifest, DocumentWriter, write_index
from nexus_ray.corpora.sources import RawDocument
from nexus_ray.storage import Storage


def write_domain(folder: Storage, texts: list[str], *, batches: int = 1) -> None:
    """Write `texts` as the documents of domain `d`, in so many batches."""
    done = []
    for number, part in enumerate(np.array_split(np.arange(len(texts)), batches)):
        writer = DocumentWriter(folder, f"documents-{number}", "d")
        for place in part:
            writer.add(RawDocument(texts[place], {}))
        writer.close()
        ids = np.array(writer.ids, np.uint64)
        write_index(folder, f"index-{number}.parquet", ids, np.array(writer.sizes, np.int64))
        digest = hashlib.sha256(ids.tobytes()).hexdigest()
        done.append(DocumentBatch(tuple(writer.files), f"index-{number}.parquet", digest, {}, writer.stats))
    DocumentManifest("d", folder.uri, "s", "d", None, None, tuple(done)).save()
