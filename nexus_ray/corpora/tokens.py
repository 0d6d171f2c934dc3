"""Token shards: flat tokens and a table of documents, written by independent tasks.

Invariant: shard n holds the same bytes whatever the parallelism; every text is all its tokens and one EOS, in source
order, none dropped and none twice. A conversation is its tokens as the chat template gives them, whole inside one row
of `ChatLayout.seq_len`; one that cannot be is left out and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nexus_ray.corpora.chat_template import DROPPED, TOO_LONG, Conversation, Refusal, load_chat_encoder
from nexus_ray.corpora.conversations import messages_of
from nexus_ray.corpora.documents import DocumentManifest, document_id, held_out_threshold, load_index, read_rows
from nexus_ray.corpora.manifest import ROW_GROUP_TOKENS, Shard, TokenManifest, stable_hash
from nexus_ray.corpora.packing import pack
from nexus_ray.corpora.reader import PAD
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage

VERSION = 1
CHAT_VERSION = 1
"""Raised when the same conversations would give other rows than before."""
BYTES_PER_TOKEN = 4
"""For the size of shards only, which is planned before tokenising."""
METADATA_KEY = b"nexus_ray"
_ENCODE_DOCUMENTS = 512


@dataclass(frozen=True)
class ChatLayout:
    """How conversations become rows: what their shards depend on beside the tokenizer."""

    template: str
    """Fingerprint of the chat template."""
    seq_len: int


@dataclass(frozen=True)
class DocumentRange:
    """Rows [start, stop) of a documents file."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class ShardSpec:
    """Work item: the documents of one split inside some ranges, to be written as shard `number`."""

    domain: str
    split: str
    documents: Storage
    ranges: tuple[DocumentRange, ...]
    held_out_fraction: float
    target: Storage
    """Folder of the split."""
    number: int
    batch: int
    tokenizer: Storage
    tokenizer_fingerprint: str
    eos_id: int
    expected: int
    """Documents the shard must come to hold."""
    text_bytes: int
    layout: ChatLayout | None = None
    """None: the documents are text."""


@dataclass(frozen=True)
class WrittenShard:
    """A shard, how many EOS tokens stood inside texts (zero, unless the tokenizer makes one from plain text), and the
    conversations that were left out."""

    shard: Shard
    eos_in_text: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Conversations left out, by reason."""
    tokens_dropped: int = 0
    """Tokens of those that are longer than a row."""
    longest: int = 0
    """Tokens of the longest conversation, kept or not."""
    refused: str = ""
    """Which conversation was refused first, and why."""


def base_fingerprint(split: str, tokenizer: str, held_out_fraction: float, layout: ChatLayout | None = None) -> str:
    """Start of a manifest's chain of fingerprints: the settings. The content comes in with the shards."""
    return stable_hash([VERSION, split, tokenizer, held_out_fraction, *_key(layout)])


def folder_name(
    documents: DocumentManifest,
    tokenizer: str,
    held_out_fraction: float,
    shard_tokens: int,
    layout: ChatLayout | None = None,
) -> str:
    """`<domain>-<hash>`, known before the work is done; the same for a corpus that has grown."""
    parts = [VERSION, documents.folder.name, tokenizer, held_out_fraction, shard_tokens, *_key(layout)]
    return f"{documents.domain}-{stable_hash(parts)}"


def _key(layout: ChatLayout | None) -> list[object]:
    return [] if layout is None else ["chat", CHAT_VERSION, layout.template, layout.seq_len]


def plan_shards(
    documents: DocumentManifest,
    manifest: TokenManifest,
    *,
    held_out_fraction: float,
    shard_tokens: int,
    tokenizer: Storage,
    layout: ChatLayout | None = None,
) -> list[ShardSpec]:
    """Work items for the batches that `manifest` does not cover yet: a pure function of its arguments' content."""
    specs: list[ShardSpec] = []
    files = documents.files
    for batch in range(manifest.batches, len(documents.batches)):
        index = load_index(documents.prefix(batch + 1), first_batch=batch)
        held_out = index.held_out(held_out_fraction)
        chosen = np.flatnonzero(held_out if manifest.split == "held_out" else ~held_out)
        for members in _groups(chosen, index.sizes, shard_tokens * BYTES_PER_TOKEN):
            ranges = _ranges([file.file for file in files], index.files[members], index.rows[members])
            specs.append(
                ShardSpec(
                    domain=documents.domain,
                    split=manifest.split,
                    documents=documents.folder,
                    ranges=ranges,
                    held_out_fraction=held_out_fraction,
                    target=manifest.folder,
                    number=len(manifest.shards) + len(specs),
                    batch=batch,
                    tokenizer=tokenizer,
                    tokenizer_fingerprint=manifest.tokenizer,
                    eos_id=manifest.eos_id,
                    expected=len(members),
                    text_bytes=int(index.sizes[members].sum()),
                    layout=layout,
                )
            )
    return specs


def _groups(chosen: NDArray[np.intp], sizes: NDArray[np.int64], limit: int) -> list[NDArray[np.intp]]:
    """Consecutive documents of about `limit` bytes together; a document is never split."""
    if not chosen.size:
        return []
    before = np.cumsum(sizes[chosen]) - sizes[chosen]
    borders = np.flatnonzero(np.diff(before // limit)) + 1
    return list(np.split(chosen, borders))


def _ranges(names: Sequence[str], files: NDArray[np.int32], rows: NDArray[np.int64]) -> tuple[DocumentRange, ...]:
    found = []
    for file in np.unique(files):
        inside = rows[files == file]
        found.append(DocumentRange(names[file], int(inside[0]), int(inside[-1]) + 1))
    return tuple(found)


# --- encoding ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Tokens of one text without EOS, and the UTF-8 bytes that its first token covers."""

    ids: NDArray[np.int32]
    first_bytes: int


class Encoder:
    """Encodes plain text: nothing in it is read as a special token, nothing is added."""

    def __init__(self, tokenizer_json: bytes) -> None:
        from tokenizers import Tokenizer
        from tokenizers.decoders import ByteLevel

        self._tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._widths: NDArray[np.int32] | None = None
        if isinstance(self._tokenizer.decoder, ByteLevel):
            self._widths = self._byte_widths()

    def _byte_widths(self) -> NDArray[np.int32]:
        """Bytes per token of a byte-level vocabulary, whose strings have one character per byte."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        widths = np.zeros(max(vocabulary.values()) + 1, np.int32)
        for token, number in vocabulary.items():
            widths[number] = len(token.encode()) if number in added else len(token)
        return widths

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        if self._widths is not None:
            fast = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            arrays = [np.array(encoding.ids, np.int32) for encoding in fast]
            return [Encoded(ids, int(self._widths[ids[0]]) if ids.size else 0) for ids in arrays]
        slow = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            Encoded(np.array(encoding.ids, np.int32), _first_bytes(text, encoding.offsets))
            for text, encoding in zip(texts, slow, strict=True)
        ]


def _first_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> int:
    return len(text[: offsets[0][1]].encode()) if offsets else 0


@lru_cache(maxsize=4)
def load_encoder(folder: Storage) -> Encoder:
    """The encoder of a tokenizer folder, kept for the next shard of the same process."""
    return Encoder(folder.read_bytes("tokenizer.json"))


# --- writing -----------------------------------------------------------------------------------------------------


@dataclass
class ShardBuffer:
    """Documents on their way into one shard."""

    eos_id: int
    layout: ChatLayout | None = None
    ids: list[str] = field(default_factory=list)
    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    predicted_bytes: list[int] = field(default_factory=list)
    eos_in_text: int = 0
    answers: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens_dropped: int = 0
    longest: int = 0
    refused: str = ""

    def add(self, document: str, text: str, encoded: Encoded) -> None:
        size = len(text.encode())
        self.ids.append(document)
        self.tokens.append(np.append(encoded.ids, np.int32(self.eos_id)))
        self.bytes.append(size)
        self.predicted_bytes.append(size - min(encoded.first_bytes, size))
        self.eos_in_text += int((encoded.ids == self.eos_id).sum())

    def add_conversation(self, document: str, text: str, made: Conversation | Refusal) -> None:
        """Keep a conversation that fits into a row; count any other by its reason."""
        assert self.layout is not None
        if isinstance(made, Refusal):
            self.dropped[made.count] = self.dropped.get(made.count, 0) + 1
            self.refused = self.refused or f"document {document}: {made.reason}"
            return
        self.longest = max(self.longest, len(made.ids))
        if len(made.ids) > self.layout.seq_len:
            self.dropped[TOO_LONG] = self.dropped.get(TOO_LONG, 0) + 1
            self.tokens_dropped += len(made.ids)
            return
        self.ids.append(document)
        self.tokens.append(made.ids)
        self.bytes.append(len(text.encode()))
        self.predicted_bytes.append(made.answer_bytes)
        self.answers += made.targets

    def _laid_out(self) -> tuple[list[int], NDArray[np.int64], NDArray[np.int32]]:
        """Numbers of the documents in the order they stand in, the offset of each, and the tokens with padding."""
        lengths = np.array([len(part) for part in self.tokens], np.int64)
        if self.layout is None:
            return list(range(len(lengths))), np.cumsum(lengths) - lengths, np.concatenate(self.tokens)
        packing = pack(lengths, self.layout.seq_len)
        tokens = np.full(packing.size, PAD, np.int32)
        for number, offset in zip(packing.order.tolist(), packing.offsets.tolist(), strict=True):
            tokens[offset : offset + len(self.tokens[number])] = self.tokens[number]
        return packing.order.tolist(), packing.offsets, tokens

    def write(self, target: Storage, number: int, *, batch: int, metadata: dict[str, str | int]) -> Shard:
        """Both files of the shard, each at once; the table last."""
        order, offsets, tokens = self._laid_out()
        counts = np.array([len(self.tokens[i]) for i in order], np.int32)
        token_file, table_file = f"tokens-{number:05d}.parquet", f"documents-{number:05d}.parquet"
        token_data = _token_bytes(tokens, metadata)
        table = pa.table(
            {
                "id": pa.array([self.ids[i] for i in order], pa.string()),
                "offset": offsets,
                "tokens": counts,
                "bytes": np.array([self.bytes[i] for i in order], np.int32),
                "predicted_bytes": np.array([self.predicted_bytes[i] for i in order], np.int32),
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(_tagged(table, metadata), sink, write_page_checksum=True)
        table_data = sink.getvalue().to_pybytes()
        target.write_bytes(token_data, token_file)
        target.write_bytes(table_data, table_file)
        return Shard(
            file=token_file,
            tokens=len(tokens),
            documents=len(counts),
            bytes=len(token_data),
            sha256=hashlib.sha256(token_data).hexdigest(),
            batch=batch,
            text_bytes=sum(self.bytes),
            table_bytes=len(table_data),
            table_sha256=hashlib.sha256(table_data).hexdigest(),
            padding=len(tokens) - int(counts.sum()),
            answers=None if self.layout is None else self.answers,
        )


def _token_bytes(tokens: NDArray[np.int32], metadata: dict[str, str | int]) -> bytes:
    """Plain, uncompressed, in row groups of exactly `ROW_GROUP_TOKENS`: a read is a copy."""
    table = pa.table([pa.array(tokens)], schema=pa.schema([pa.field("tokens", pa.int32(), nullable=False)]))
    sink = pa.BufferOutputStream()
    pq.write_table(
        _tagged(table, metadata),
        sink,
        row_group_size=ROW_GROUP_TOKENS,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    return sink.getvalue().to_pybytes()


def _tagged(table: pa.Table, metadata: dict[str, str | int]) -> pa.Table:
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def write_shard(spec: ShardSpec) -> WrittenShard:
    """Tokenise one shard's documents; runs in a task. Raises DataError if the documents are not as planned."""
    buffer = ShardBuffer(spec.eos_id, spec.layout)
    found = 0
    for ids, texts in _batches(spec):
        found += len(ids)
        for document, text in zip(ids, texts, strict=True):
            if document_id(text) != document:
                raise DataError(
                    f"{spec.documents.uri}: the text of document {document} ({spec.domain}) does not fit its id; the "
                    f"files are damaged: delete the folder and it is built again"
                )
        _encode(spec, buffer, ids, texts)
    if found != spec.expected:
        raise DataError(
            f"{spec.documents.uri} gives {found} documents for shard {spec.number} of {spec.split} where "
            f"{spec.expected} were counted; the folder was changed: delete it and it is built again"
        )
    metadata: dict[str, str | int] = {
        "domain": spec.domain,
        "split": spec.split,
        "tokenizer": spec.tokenizer_fingerprint,
        "eos_id": spec.eos_id,
    }
    shard = buffer.write(spec.target, spec.number, batch=spec.batch, metadata=metadata)
    dropped = {} if spec.layout is None else {name: buffer.dropped.get(name, 0) for name in DROPPED}
    return WrittenShard(
        shard, buffer.eos_in_text, dropped, buffer.tokens_dropped, longest=buffer.longest, refused=buffer.refused
    )


def _encode(spec: ShardSpec, buffer: ShardBuffer, ids: Sequence[str], texts: Sequence[str]) -> None:
    if spec.layout is None:
        for document, text, encoded in zip(ids, texts, load_encoder(spec.tokenizer).encode(texts), strict=True):
            buffer.add(document, text, encoded)
        return
    made = load_chat_encoder(spec.tokenizer).encode([messages_of(text) for text in texts])
    for document, text, conversation in zip(ids, texts, made, strict=True):
        buffer.add_conversation(document, text, conversation)


def _batches(spec: ShardSpec) -> Iterator[tuple[list[str], list[str]]]:
    threshold = held_out_threshold(spec.held_out_fraction)
    for part in spec.ranges:
        for rows in read_rows(spec.documents, part.file, part.start, part.stop):
            ids = rows.column("id").to_pylist()
            held_out = np.array([int(document, 16) < threshold for document in ids], dtype=bool)
            chosen = np.flatnonzero(held_out == (spec.split == "held_out"))
            for first in range(0, len(chosen), _ENCODE_DOCUMENTS):
                some = pa.array(chosen[first : first + _ENCODE_DOCUMENTS])
                yield [ids[i] for i in some.to_pylist()], rows.column("text").take(some).to_pylist()
