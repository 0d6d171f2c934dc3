"""Held-out scores per domain, summed over tokens in float64 and kept per document.

Invariant: every token of a chosen document but its first is scored exactly once (of a conversation, every token of its
answers), and what a document scores depends
neither on the number of workers nor on the other domains: the same batches are formed for any number of workers and
dealt out whole, and each piece of a document is summed by one worker, to which the others add zero. Where the forward
pass itself is repeatable, so is every figure, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from nexus_ray.corpora.manifest import ROW_GROUP_TOKENS, Shard, TokenManifest
from nexus_ray.corpora.reader import NO_LOSS, PAD
from nexus_ray.errors import DataError
from nexus_ray.evaluate.scores import DomainScore
from nexus_ray.models.score import decode_rows, token_nll

AllReduce = Callable[[torch.Tensor], Any]
"""Sums a float64 tensor over all workers, in place."""


class HeldOutSet:
    """Whole held-out documents of one domain, the same ones every time, packed into rows.

    Documents are taken in the order of a permutation seeded by `seed`: the first one always, then each that still
    fits into `max_tokens`. A document longer than a row is cut into pieces that overlap by one token; each piece is
    its own segment. Pieces share rows, and each document is scored as if it stood alone. `besides` is a set whose
    documents are left out.

    Raises:
        DataError: there is no held-out document with anything to predict, or a shard cannot be read.
    """

    def __init__(
        self,
        manifest: TokenManifest,
        seq_len: int,
        max_tokens: int,
        *,
        seed: int = 0,
        besides: HeldOutSet | None = None,
    ) -> None:
        lengths, sizes, shard_of, offsets = _document_table(manifest)
        taken = besides.documents if besides is not None else np.zeros(0, np.int64)
        free = lengths.copy()
        free[taken] = 0
        chosen = choose_documents(free, max_tokens, seed)
        if not chosen.size and len(taken):
            raise DataError(
                f"domain {manifest.domain}: all {len(taken)} held-out documents are scored, and none is left to choose "
                f"by; lower evaluation.max_tokens, or raise domains.{manifest.domain}.held_out_fraction"
            )
        if not chosen.size:
            raise DataError(
                f"domain {manifest.domain} has no held-out document with text to score; raise "
                f"domains.{manifest.domain}.held_out_fraction or add documents"
            )
        self.domain = manifest.domain
        self.documents: NDArray[np.int64] = chosen
        """Indices into the manifest's documents, ascending."""
        self.bytes_by_document: NDArray[np.int64] = sizes[chosen]
        texts = _read_documents(manifest, shard_of[chosen], offsets[chosen], lengths[chosen])
        self.tokens_by_document = np.array([int(_targets(text).sum()) for text in texts], np.int64)
        self.rows, self.piece_of, self.document_of_piece = pack_documents(texts, seq_len)

    def batch(self, number: int, batch_size: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Rows [n, S+1] of a batch and the piece of each target [n, S]; all padding past the last batch."""
        part = slice(number * batch_size, (number + 1) * batch_size)
        rows, piece_of = self.rows[part], self.piece_of[part]
        if not len(rows):
            return np.full_like(self.rows[:1], PAD), np.full_like(self.piece_of[:1], -1)
        return rows, piece_of


def evaluate_domains(
    model: Any,
    sets: Mapping[str, HeldOutSet],
    *,
    batch_size: int,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: AllReduce | None = None,
) -> dict[str, DomainScore]:
    """Score every set; all ranks call this together and return the same.

    `batch_size` is in rows per forward pass. Every rank runs the same number of forward passes (ZeRO-3 gathers
    weights in each). `device` defaults to that of the model's parameters; the model's mode is restored.
    """
    place = device if device is not None else next(model.parameters()).device
    sums = {name: np.zeros(len(held_out.document_of_piece)) for name, held_out in sets.items()}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for name, held_out in sets.items():
                batches = -(-len(held_out.rows) // batch_size)
                for turn in range(-(-batches // world_size)):
                    rows, piece_of = held_out.batch(turn * world_size + rank, batch_size)
                    sums[name] += _sum_by_piece(model, rows, piece_of, len(sums[name]), place)
    finally:
        model.train(was_training)
    if all_reduce is not None:
        sums = _reduce(sums, all_reduce, place)
    return {
        name: DomainScore(
            _sum_by(held_out.document_of_piece, sums[name], len(held_out.documents)),
            held_out.tokens_by_document,
            held_out.bytes_by_document,
        )
        for name, held_out in sets.items()
    }


def _sum_by_piece(
    model: Any, rows: NDArray[np.int32], piece_of: NDArray[np.int32], pieces: int, place: torch.device | str
) -> NDArray[np.float64]:
    """Nats of each piece in this batch, float64 [pieces]; padding counts nowhere."""
    nll = token_nll(model, decode_rows(torch.from_numpy(rows).to(place))).double().cpu().numpy()
    scored = piece_of >= 0
    return _sum_by(piece_of[scored], nll[scored], pieces)


def _sum_by(index: NDArray[Any], values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Sums of `values` by `index`, float64 [size], added in order."""
    return np.bincount(index, weights=values, minlength=size).astype(np.float64, copy=False)


def _reduce(
    sums: dict[str, NDArray[np.float64]], all_reduce: AllReduce, place: torch.device | str
) -> dict[str, NDArray[np.float64]]:
    """The sums of all ranks, in one exchange."""
    total = torch.from_numpy(np.concatenate([*sums.values(), np.zeros(1)])).to(place)
    all_reduce(total)
    ends = np.cumsum([len(part) for part in sums.values()])
    return dict(zip(sums, np.split(total.cpu().numpy(), ends), strict=False))


def choose_documents(lengths: NDArray[np.int64], max_tokens: int, seed: int) -> NDArray[np.int64]:
    """Indices, ascending, of the documents to score: in permuted order, each that fits; the first in any case.

    `lengths` are in tokens; documents with nothing to predict are passed over.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[lengths[order] > 1]
    chosen: list[int] = []
    left = max_tokens
    for index in order:
        length = int(lengths[index])
        if length <= left or not chosen:
            chosen.append(int(index))
            left -= length
        if left < 2:
            break
    return np.sort(np.asarray(chosen, dtype=np.int64))


def pack_documents(
    texts: list[NDArray[np.int32]], seq_len: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Rows of whole documents in the wire format, cut into pieces where they are longer than a row.

    Returns rows int32 [n, S+1], the piece of each target int32 [n, S] (-1: none), and each piece's document. Pieces
    go, in order, into the first row with room.
    """
    cuts = [(number, start) for number, text in enumerate(texts) for start in range(0, len(text) - 1, seq_len)]
    free = np.full(len(cuts), seq_len + 1, dtype=np.int64)
    rows = np.full((len(cuts), seq_len + 1), PAD, dtype=np.int32)
    piece_of = np.full((len(cuts), seq_len), -1, dtype=np.int32)
    used = 0
    for piece, (number, start) in enumerate(cuts):
        tokens = texts[number][start : start + seq_len + 1]
        row = int(np.argmax(free[: used + 1] >= len(tokens)))
        column = seq_len + 1 - int(free[row])
        rows[row, column : column + len(tokens)] = tokens
        rows[row, column] = ~tokens[0]
        piece_of[row, column : column + len(tokens) - 1] = np.where(_targets(tokens), piece, -1)
        free[row] -= len(tokens)
        used = max(used, row + 1)
    document_of_piece = np.asarray([number for number, _ in cuts], dtype=np.int64)
    return rows[:used].copy(), piece_of[:used].copy(), document_of_piece


def _targets(tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether each token after the first is one to predict."""
    return tokens[1:] & NO_LOSS == 0


def _document_table(manifest: TokenManifest) -> tuple[NDArray[np.int64], ...]:
    """Of every document: tokens, predicted bytes, shard, offset of its first token in that shard."""
    columns: list[list[NDArray[np.int64]]] = [[], [], [], []]
    for number, shard in enumerate(manifest.shards):
        with _naming(manifest, shard.table):
            source = manifest.folder.filesystem.open_input_file(manifest.folder.path(shard.table))
            with source:
                table = pq.read_table(source, columns=["tokens", "predicted_bytes", "offset"])
        for column, name in zip((0, 1, 3), ("tokens", "predicted_bytes", "offset"), strict=True):
            columns[column].append(table.column(name).to_numpy().astype(np.int64))
        columns[2].append(np.full(len(table), number, dtype=np.int64))
    return tuple(np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in columns)


def _read_documents(
    manifest: TokenManifest, shards: NDArray[np.int64], offsets: NDArray[np.int64], lengths: NDArray[np.int64]
) -> list[NDArray[np.int32]]:
    """Token ids of documents given in corpus order; only the row groups that hold them are read."""
    texts: list[NDArray[np.int32]] = []
    for number in np.unique(shards):
        shard = manifest.shards[number]
        here = np.flatnonzero(shards == number)
        with _naming(manifest, shard.file):
            source = manifest.folder.filesystem.open_input_file(manifest.folder.path(shard.file))
            with source:
                reader = pq.ParquetFile(source, page_checksum_verification=True)
                texts += [_read_tokens(reader, shard, int(offsets[i]), int(lengths[i])) for i in here]
    return texts


def _read_tokens(reader: pq.ParquetFile, shard: Shard, offset: int, length: int) -> NDArray[np.int32]:
    first, last = offset // ROW_GROUP_TOKENS, (offset + length - 1) // ROW_GROUP_TOKENS
    column = reader.read_row_groups(list(range(first, last + 1)), columns=["tokens"]).column("tokens")
    tokens = column.to_numpy()[offset - first * ROW_GROUP_TOKENS :][:length]
    if len(tokens) != length:
        raise pa.ArrowInvalid(f"{shard.file} ends before token {offset + length}")
    return tokens.astype(np.int32)


@contextmanager
def _naming(manifest: TokenManifest, file: str) -> Iterator[None]:
    """Turns a reading error into a DataError that names domain, file and remedy."""
    try:
        yield
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(
            f"{manifest.folder.path(file)}, held-out text of domain {manifest.domain}, cannot be read: {error}; "
            f"delete the folder {manifest.root} and run `nexus-ray prepare` again"
        ) from None
