"""Rows of `seq_len` tokens, computed from a domain's token shards: reading is a copy, not a parse.

Row i of a shard holds its tokens [i S, i S + S + 1): S inputs and, shifted by one, S targets, so that every token but
a document's first is a target exactly once. The last row of a shard is padded; rows never cross shards.

Wire format of a row (int32, S + 1 wide): t >= 0 continues a document, ~t (= -t - 1) is the first token of a document,
`PAD` is nothing. The bit `NO_LOSS` set in t makes it an input that is no target (a conversation's prompts); the rest of
t is the token. Shards of conversations hold those bits and the padding of their rows as they are read.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nexus_ray.corpora.manifest import ROW_GROUP_TOKENS, Shard, TokenManifest
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage

PAD = np.int32(np.iinfo(np.int32).min)
NO_LOSS = 1 << 29
"""Set in a token that is read but not predicted; vocabularies are smaller."""
CACHE_GROUPS = 160
"""Row groups (of 256 KiB) that a process keeps: the windows in which a mixture of a few domains is shuffled."""
PIECE_TOKENS = 2**20
"""Tokens read in one go, about."""
_CACHE: dict[tuple[str, str, int, int], NDArray[np.int32]] = {}


class TokenReader:
    """Random access to the packed rows of one domain; memory is bounded by the rows asked for and `CACHE_GROUPS`."""

    def __init__(self, manifest: TokenManifest, seq_len: int) -> None:
        if manifest.seq_len not in (None, seq_len):
            raise DataError(
                f"the conversations of domain {manifest.domain} at {manifest.root} were laid out in rows of "
                f"{manifest.seq_len} tokens, and rows of {seq_len} are asked for, which would cut them; prepare again "
                f"with training.seq_len={seq_len}"
            )
        self.manifest = manifest
        self.seq_len = seq_len
        rows = [shard.rows(seq_len) for shard in manifest.shards]
        self._ends = np.cumsum(np.asarray(rows, dtype=np.int64))
        self._folder = manifest.folder
        self._piece = max(1, PIECE_TOKENS // seq_len)

    @property
    def num_rows(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def read(
        self, rows: NDArray[np.int64], out: NDArray[np.int32] | None = None, where: NDArray[np.int64] | None = None
    ) -> NDArray[np.int32]:
        """The rows, in the order asked for: [n, seq_len + 1] in the wire format, or in the rows `where` of `out`."""
        out = np.empty((len(rows), self.seq_len + 1), dtype=np.int32) if out is None else out
        where = np.arange(len(rows)) if where is None else where
        shard_of = np.searchsorted(self._ends, rows, side="right")
        for low in range(0, len(rows), self._piece):  # in order, so that what is kept is what comes next
            piece = slice(low, low + self._piece)
            for number in np.unique(shard_of[piece]):
                chosen = low + np.flatnonzero(shard_of[piece] == number)
                first = int(self._ends[number - 1]) if number else 0
                self._read_shard(self.manifest.shards[number], rows[chosen] - first, out, where[chosen])
        return out

    def _read_shard(
        self, shard: Shard, rows: NDArray[np.int64], out: NDArray[np.int32], where: NDArray[np.int64]
    ) -> None:
        width = self.seq_len + 1
        begin = rows * self.seq_len
        end = np.minimum(begin + width, shard.tokens)
        first, last = begin // ROW_GROUP_TOKENS, (end - 1) // ROW_GROUP_TOKENS
        groups = self._groups(shard, np.unique(np.concatenate([first, last])).tolist())
        simple = (first == last) & (end == begin + width)
        for number, tokens in groups.items():
            inside = np.flatnonzero(simple & (first == number))
            if inside.size:
                at = begin[inside] - number * ROW_GROUP_TOKENS
                shape = (tokens.size - width + 1, width)  # every row that could be: a view, made in a microsecond
                out[where[inside]] = np.ndarray(shape, np.int32, tokens, strides=(4, 4))[at]
        for i in np.flatnonzero(~simple):  # a row at the border of two row groups, or a shard's last
            out[where[i]] = PAD
            start, stop = int(begin[i]), int(end[i])
            for number in range(int(first[i]), int(last[i]) + 1):
                tokens = groups[number] if number in groups else self._groups(shard, [number])[number]
                origin = number * ROW_GROUP_TOKENS
                low, high = max(start, origin), min(stop, origin + tokens.size)
                out[where[i], low - start : high - start] = tokens[low - origin : high - origin]

    def _groups(self, shard: Shard, numbers: list[int]) -> dict[int, NDArray[np.int32]]:
        """Row groups of a shard by number; the first token of each document is stored as its complement."""
        keys = {number: (self._folder.uri, shard.file, shard.tokens, number) for number in numbers}
        found = {number: _CACHE[key] for number, key in keys.items() if key in _CACHE}
        missing = [number for number in numbers if number not in found]
        if missing:
            found |= zip(missing, self._load(shard, missing), strict=True)
        for number, key in keys.items():
            _CACHE[key] = _CACHE.pop(key, found[number])  # to the end: the one used longest ago goes first
        while len(_CACHE) > CACHE_GROUPS:
            del _CACHE[next(iter(_CACHE))]
        return {number: found[number] for number in numbers}

    def _load(self, shard: Shard, numbers: list[int]) -> list[NDArray[np.int32]]:
        path, low = self._folder.path(shard.file), numbers[0] * ROW_GROUP_TOKENS
        try:
            file = _open(self._folder.uri, shard.file)
            column = file.read_row_groups(numbers, columns=["tokens"], use_threads=False).column(0)
            parts = [chunk.to_numpy(zero_copy_only=True) for chunk in column.chunks]
            flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
            starts = _offsets(self._folder.uri, shard.table)
        except (OSError, pa.ArrowException) as error:
            first = self.manifest.shards.index(shard)
            raise DataError(
                f"token shard {path} of domain {self.manifest.domain!r} cannot be read near token {low} "
                f"(shard {first}): {error}. Delete the folder {self.manifest.root} and prepare again, restore the "
                f"file, or set data.on_corrupt: quarantine (under another name) to leave the shard out"
            ) from None
        sizes = [min(ROW_GROUP_TOKENS, shard.tokens - number * ROW_GROUP_TOKENS) for number in numbers]
        known = flat if self.manifest.seq_len is None else token_ids(flat)
        if known.size != sum(sizes) or not 0 <= int(known.min()) <= int(known.max()) < self.manifest.vocab_size:
            raise DataError(
                f"token shard {path} of domain {self.manifest.domain!r} does not hold {sum(sizes)} tokens below "
                f"{self.manifest.vocab_size} from token {low} on: it was cut short or made with another tokenizer. "
                f"Delete the folder {self.manifest.root} and prepare again"
            )
        groups = [part.copy() for part in np.split(flat, np.cumsum(sizes)[:-1])]  # each lives and dies on its own
        for number, group in zip(numbers, groups, strict=True):
            at = number * ROW_GROUP_TOKENS
            marks = starts[np.searchsorted(starts, at) : np.searchsorted(starts, at + group.size)] - at
            group[marks] = ~group[marks]
        return groups


def token_ids(wire: NDArray[np.int32]) -> NDArray[np.int32]:
    """Tokens of wire-format entries, without marks and flags; 0 for padding."""
    unmarked = np.where(wire < 0, ~wire, wire) & ~np.int32(NO_LOSS)
    return np.where(wire == PAD, 0, unmarked).astype(np.int32)


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
