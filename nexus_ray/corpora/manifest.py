"""Manifests of token shards: small files, written last, that say what a tokenised domain consists of.

Invariant: a manifest only ever grows at its end, and the fingerprint of its first n shards never changes when shards
are appended: `fingerprint(n) = hash(fingerprint(n - 1), shard n)`, starting from a hash of the settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from nexus_ray.errors import DataError
from nexus_ray.storage import Storage

FORMAT = 1
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "held_out")
ROW_GROUP_TOKENS = 65_536
"""Tokens of every row group of a token file but the last: a position is found by one division."""


def stable_hash(value: object, *, digits: int = 16) -> str:
    """The first hex `digits` of the SHA-256 of a JSON-able value; key order does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


@dataclass(frozen=True)
class Shard:
    """One pair of Parquet files: flat tokens, and a table of the documents they belong to."""

    file: str
    """Token file relative to `<root>/<split>`, `tokens-00000.parquet`."""
    tokens: int
    """Entries of the token file, padding included."""
    documents: int
    bytes: int
    """Size of the token file."""
    sha256: str
    """Hex digest of the token file."""
    batch: int
    """Number of the append it came with; the first build is 0."""
    text_bytes: int = 0
    """UTF-8 bytes of the text of its documents."""
    table_bytes: int = 0
    """Size of the document table."""
    table_sha256: str = ""
    """Hex digest of the document table."""
    padding: int = 0
    """Entries that are no token: the rest of rows that hold whole conversations."""
    answers: int | None = None
    """Tokens that are learned; None: all but each document's first."""

    @property
    def targets(self) -> int:
        """Tokens that are learned."""
        return self.tokens - self.documents if self.answers is None else self.answers

    @property
    def table(self) -> str:
        """The document table relative to `<root>/<split>`, `documents-00000.parquet`."""
        return self.file.replace("tokens-", "documents-", 1)

    def rows(self, seq_len: int) -> int:
        """Rows of `seq_len` inputs and their next tokens; the last may be shorter, none crosses into the next shard."""
        return -(-(self.tokens - 1) // seq_len)


@dataclass(frozen=True)
class TokenManifest:
    """The token shards of one domain and split, in order."""

    domain: str
    split: str
    """`train` or `held_out`."""
    root: str
    """URI of the folder that holds `<split>/tokens-*.parquet`."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: int
    eos_id: int
    shards: tuple[Shard, ...]
    base: str = ""
    """Hash of the settings that made the shards, the start of the chain of fingerprints."""
    batches: int = 1
    """Batches of documents covered; a batch may add no shard to a split."""
    stats: Mapping[str, int] = field(default_factory=dict)
    """What happened to tokens on the way: `tokens_dropped`, `eos_in_text` (both zero unless something is odd)."""
    quarantined: tuple[str, ...] = ()
    """Files of shards that were set aside as corrupt."""
    seq_len: int | None = None
    """Length of the rows that whole conversations were laid out in; None: text, which rows of any length cut."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of settings and content."""
        value = self.base
        for shard in self.shards:
            value = stable_hash([value, shard.sha256, shard.table_sha256])
        return value

    @cached_property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @cached_property
    def tokens(self) -> int:
        """Tokens, one end-of-document token per document included, padding not."""
        return sum(shard.tokens - shard.padding for shard in self.shards)

    @cached_property
    def targets(self) -> int:
        """Tokens that are learned: of text all but each document's first, of conversations the answers."""
        return sum(shard.targets for shard in self.shards)

    @cached_property
    def padding(self) -> int:
        """Places in rows that hold no token."""
        return sum(shard.padding for shard in self.shards)

    @property
    def packing_efficiency(self) -> float:
        """Share of the places in rows that hold a token."""
        return self.tokens / max(1, self.tokens + self.padding)

    @cached_property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def folder(self) -> Storage:
        """Where the shards of this split lie."""
        return Storage(self.root).child(self.split)

    def rows(self, seq_len: int) -> int:
        """Rows of `seq_len` tokens (the sum over shards of ceil((tokens - 1) / seq_len))."""
        return sum(shard.rows(seq_len) for shard in self.shards)

    def prefix(self, num_shards: int) -> TokenManifest:
        """The manifest as it was when it had `num_shards` shards."""
        if not 0 <= num_shards <= len(self.shards):
            raise DataError(
                f"the {self.split} manifest of domain {self.domain} at {self.root} has {len(self.shards)} shards, and "
                f"{num_shards} were asked for; it was rebuilt or replaced: start under another name, or restore it"
            )
        shards = self.shards[:num_shards]
        return replace(self, shards=shards, batches=max((shard.batch for shard in shards), default=-1) + 1)

    def batch_prefix(self, batches: int) -> TokenManifest:
        """The manifest as it was after `batches` batches of documents."""
        shards = tuple(shard for shard in self.shards if shard.batch < batches)
        return replace(self, shards=shards, batches=min(batches, self.batches))

    def extended(self, shards: Iterable[Shard], *, batches: int, stats: Mapping[str, int]) -> TokenManifest:
        """A new manifest with `shards` behind the present ones; counts in `stats` are added up."""
        total = {key: self.stats.get(key, 0) + stats.get(key, 0) for key in {*self.stats, *stats}}
        return replace(self, shards=(*self.shards, *shards), batches=batches, stats=dict(sorted(total.items())))

    def without(self, files: Iterable[str]) -> TokenManifest:
        """The manifest less the shards named, which are counted in `quarantined`; its fingerprint is another."""
        gone = set(files)
        kept = tuple(shard for shard in self.shards if shard.file not in gone)
        return replace(self, shards=kept, quarantined=(*self.quarantined, *sorted(gone)))

    def to_json(self) -> dict[str, Any]:
        """JSON-able form; the root is left out, so that a folder can be moved."""
        return {
            "format": FORMAT,
            "domain": self.domain,
            "split": self.split,
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "base": self.base,
            "batches": self.batches,
            "stats": dict(self.stats),
            "quarantined": list(self.quarantined),
            "fingerprint": self.fingerprint,
            "documents": self.documents,
            "tokens": self.tokens,
            "seq_len": self.seq_len,
            "text_bytes": self.text_bytes,
            "shards": [asdict(shard) for shard in self.shards],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, root: str) -> TokenManifest:
        """The inverse of `to_json`. Raises DataError if entries are missing or the fingerprint does not fit."""
        where = f"{root}/{data.get('split', '?')}/{MANIFEST_FILE}"
        if data.get("format") != FORMAT:
            raise DataError(
                f"{where} has format {data.get('format')!r} and this version reads {FORMAT}; delete the folder {root} "
                f"and it is built again"
            )
        names = {item.name for item in fields(cls)} - {"root", "shards", "quarantined", "seq_len"}
        try:
            shards = tuple(Shard(**shard) for shard in data["shards"])
            kept = {name: data[name] for name in names}
            set_aside, seq_len = tuple(data["quarantined"]), data.get("seq_len")
            manifest = cls(root=root, shards=shards, quarantined=set_aside, seq_len=seq_len, **kept)
        except (KeyError, TypeError) as error:
            raise DataError(f"{where} is incomplete ({error}); delete {root} and it is built again") from None
        if manifest.fingerprint != data.get("fingerprint"):
            raise DataError(
                f"{where} says fingerprint {data.get('fingerprint')}, its shards give {manifest.fingerprint}: it was "
                f"changed by hand or torn; delete {root} and it is built again"
            )
        return manifest


def save_manifest(manifest: TokenManifest) -> None:
    """Write the manifest beside its shards, at once; only then do they count."""
    manifest.folder.write_json(manifest.to_json(), MANIFEST_FILE)


def load_manifest(folder: Storage) -> TokenManifest:
    """The manifest of the split folder `<root>/<split>`. Raises DataError if there is none or it is broken."""
    root = folder.uri.rstrip("/").rpartition("/")[0]
    if not folder.exists(MANIFEST_FILE):
        raise DataError(f"{folder.path(MANIFEST_FILE)} does not exist; run `nexus-ray prepare` with the run's config")
    try:
        data = folder.read_json(MANIFEST_FILE)
    except ValueError as error:
        raise DataError(
            f"{folder.path(MANIFEST_FILE)} is no JSON ({error}); delete {root} and it is built again"
        ) from None
    return TokenManifest.from_json(data, root=root)
