"""Builds the documents of a domain without its source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from nexus_ray.corpora.documents import DocumentBatch, DocumentManifest, DocumentWriter, write_index
from nexus_ray.corpora.sources import RawDocument
from nexus_ray.storage import Storage


def write_domain(
    folder: Storage, texts: Sequence[str | RawDocument], *, batches: int = 1, domain: str = "d"
) -> DocumentManifest:
    """Write `texts` as the documents of a domain, in so many batches."""
    done = []
    for number, part in enumerate(np.array_split(np.arange(len(texts)), batches)):
        writer = DocumentWriter(folder, f"documents-{number}", domain)
        for place in part:
            text = texts[place]
            writer.add(RawDocument(text, {}) if isinstance(text, str) else text)
        writer.close()
        ids = np.array(writer.ids, np.uint64)
        write_index(folder, f"index-{number}.parquet", ids, np.array(writer.sizes, np.int64))
        digest = hashlib.sha256(ids.tobytes()).hexdigest()
        done.append(DocumentBatch(tuple(writer.files), f"index-{number}.parquet", digest, {}, writer.stats))
    manifest = DocumentManifest(domain, folder.uri, "s", f"files of {domain}", "CC0-1.0", "A. Author", tuple(done))
    manifest.save()
    return manifest
