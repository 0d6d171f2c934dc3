"""Token shards made in a test, whose token values say where they come from: readable failures, no Ray, milliseconds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nexus_ray.corpora.manifest import ROW_GROUP_TOKENS, Shard, TokenManifest

EOS = 0


def write_manifest(
    root: Path,
    domain: str,
    documents: list[list[int]],
    *,
    split: str = "train",
    shards: int = 1,
    vocab_size: int = 256,
    batch: int = 0,
    first_shard: int = 0,
) -> TokenManifest:
    """A manifest over `documents` (token ids without EOS), dealt out over `shards` in order."""
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    parts = np.array_split(np.arange(len(documents)), shards)
    made = [
        _write_shard(folder, first_shard + number, [documents[i] + [EOS] for i in part], batch)
        for number, part in enumerate(parts)
    ]
    return TokenManifest(
        domain=domain,
        split=split,
        root=str(root),
        tokenizer="test",
        vocab_size=vocab_size,
        eos_id=EOS,
        shards=tuple(made),
        base=f"{domain}-{split}",
    )


def _write_shard(folder: Path, number: int, documents: list[list[int]], batch: int) -> Shard:
    lengths = np.asarray([len(document) for document in documents], dtype=np.int64)
    flat = np.concatenate([np.asarray(document, dtype=np.int32) for document in documents])
    tokens, table = folder / f"tokens-{number:05d}.parquet", folder / f"documents-{number:05d}.parquet"
    pq.write_table(
        pa.table({"tokens": flat}),
        tokens,
        row_group_size=ROW_GROUP_TOKENS,
        use_dictionary=False,
        compression="NONE",
        column_encoding={"tokens": "PLAIN"},
        write_page_checksum=True,
    )
    pq.write_table(
        pa.table(
            {
                "id": [f"{number}-{i}" for i in range(len(documents))],
                "offset": np.cumsum(lengths) - lengths,
                "tokens": lengths.astype(np.int32),
                "bytes": (lengths * 3).astype(np.int32),
                "predicted_bytes": (lengths * 3 - 3).astype(np.int32),
            }
        ),
        table,
    )
    return Shard(
        file=tokens.name,
        tokens=int(lengths.sum()),
        documents=len(documents),
        bytes=tokens.stat().st_size,
        sha256=hashlib.sha256(tokens.read_bytes()).hexdigest(),
        batch=batch,
        text_bytes=int(lengths.sum() * 3),
        table_bytes=table.stat().st_size,
        table_sha256=hashlib.sha256(table.read_bytes()).hexdigest(),
    )


def random_documents(count: int, *, seed: int, low: int = 1, high: int = 250, longest: int = 60) -> list[list[int]]:
    """Documents of 1 to `longest` tokens in [low, high)."""
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, rng.integers(1, longest + 1)).tolist() for _ in range(count)]
