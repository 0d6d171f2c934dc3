"""Rows of `seq_len` tokens, computed from a domain's token shards: reading is a copy, not a parse.

Row i of a shard holds its tokens [i S, i S + S + 1): S inputs and, shifted by one, S targets, so that every token but
a document's first is a target exactly once. The last row of a shard is padded; rows never cross shards.

Wire format of a row (int32, S + 1 wide): t >= 0 continues a document, ~t (= -t - 1) is the first token of a document,
`PAD` is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from nexus_ray.corpora.manifest import ROW_GROUP_TOKENS, Shard, TokenManifest
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage

PAD = np.int32(np.iinfo(np.int32).min)


class TokenReader:
    """Random access to the packed rows of one domain; memory is bounded by the rows asked for, not by the corpus."""

    def __init__(self, manifest: TokenManifest, seq_len: int) -> None:
        self.manifest = manifest
        self.seq_len = seq_len
        rows = [shard.rows(seq_len) for shard in manifest.shards]
        self._ends = np.cumsum(np.asarray(rows, dtype=np.int64))
        self._folder = manifest.folder

    @property
    def num_rows(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The rows, in the order asked for: [n, seq_len + 1] in the wire format."""
        out = np.full((len(rows), self.seq_len + 1), PAD, dtype=np.int32)
        shard_of = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(shard_of):
            chosen = np.flatnonzero(shard_of == number)
            first = int(self._ends[number - 1]) if number else 0
            self._read_shard(self.manifest.shards[number], rows[chosen] - first, out, chosen)
        return out

    def _read_shard(
        self, shard: Shard, rows: NDArray[np.int64], out: NDArray[np.int32], where: NDArray[np.int64]
    ) -> None:
        width = self.seq_len + 1
        begin = rows * self.seq_len
        for low, high in _runs(begin, np.minimum(begin + width, shard.tokens)):
            buffer = self._tokens(shard, low, high)
            inside = np.flatnonzero((begin >= low) & (begin < high))
            whole = inside[begin[inside] + width <= shard.tokens]
            if whole.size:
                out[where[whole]] = sliding_window_view(buffer, width)[begin[whole] - low]
            for i in np.setdiff1d(inside, whole):
                rest = buffer[begin[i] - low :]
                out[where[i], : rest.size] = rest

    def _tokens(self, shard: Shard, low: int, high: int) -> NDArray[np.int32]:
        """Tokens [low, high) of a shard; the first token of each document is stored as its complement."""
        path = self._folder.path(shard.file)
        try:
            file = _open(self._folder.uri, shard.file)
            groups = range(low // ROW_GROUP_TOKENS, (high - 1) // ROW_GROUP_TOKENS + 1)
            column = file.read_row_groups(list(groups), columns=["tokens"], use_threads=False).column(0)
            buffer = np.concatenate([chunk.to_numpy(zero_copy_only=True) for chunk in column.chunks])
            starts = _offsets(self._folder.uri, shard.table)
        except (OSError, pa.ArrowException) as error:
            first = self.manifest.shards.index(shard)
            raise DataError(
                f"token shard {path} of domain {self.manifest.domain!r} cannot be read near token {low} "
                f"(shard {first}): {error}. Delete the folder {self.manifest.root} and prepare again, restore the "
                f"file, or set data.on_corrupt: quarantine (under another name) to leave the shard out"
            ) from None
        buffer = buffer[low - groups[0] * ROW_GROUP_TOKENS : high - groups[0] * ROW_GROUP_TOKENS]
        if buffer.size != high - low or (
            buffer.size and not 0 <= int(buffer.min()) <= int(buffer.max()) < self.manifest.vocab_size
        ):
            raise DataError(
                f"token shard {path} of domain {self.manifest.domain!r} does not hold {high - low} tokens below "
                f"{self.manifest.vocab_size} from token {low} on: it was cut short or made with another tokenizer. "
                f"Delete the folder {self.manifest.root} and prepare again"
            )
        marks = starts[np.searchsorted(starts, low) : np.searchsorted(starts, high)] - low
        buffer[marks] = ~buffer[marks]
        return buffer


def _runs(begin: NDArray[np.int64], end: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Merged token ranges that cover all rows, with gaps below one row group filled in."""
    order = np.argsort(begin, kind="stable")
    low, high = int(begin[order[0]]), int(end[order[0]])
    for i in order[1:]:
        if int(begin[i]) > high + ROW_GROUP_TOKENS:
            yield low, high
            low = int(begin[i])
        high = max(high, int(end[i]))
    yield low, high


@lru_cache(maxsize=32)
def _open(folder: str, file: str) -> pq.ParquetFile:
    storage = Storage(folder)
    source = storage.filesystem.open_input_file(storage.path(file))  # no memory map: its pages would count as ours
    return pq.ParquetFile(source, pre_buffer=not storage.is_local, page_checksum_verification=True)


@lru_cache(maxsize=32)
def _offsets(folder: str, file: str) -> NDArray[np.int64]:
    storage = Storage(folder)
    with storage.filesystem.open_input_file(storage.path(file)) as source:
        return pq.read_table(source, columns=["offset"]).column(0).to_numpy()
