"""Documents of a domain as parents of prompts: excerpts by number, planned from sizes without reading text.

Invariant: held-out documents are never parents (generated text would carry them into training), and excerpt n is a
function of the documents alone, so that documents added at the end leave earlier excerpts as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nexus_ray.config.prompts import DocumentsConfig
from nexus_ray.corpora.documents import DocumentManifest, load_index, read_rows
from nexus_ray.errors import ConfigError

BLOCK_BYTES = 2 * 2**20
"""Text read at once, about."""
CACHED_BLOCKS = 8


class Documents(Protocol):
    """Documents by number."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each, int64 [documents]."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes with any of them."""
        ...

    def read(self, number: int) -> tuple[str, str]:
        """Id and text."""
        ...


class DomainDocuments:
    """The training documents of a built domain, in its order; some megabytes of text are kept in memory."""

    def __init__(self, manifest: DocumentManifest, *, held_out_fraction: float) -> None:
        self._manifest = manifest
        index = load_index(manifest)
        kept = np.flatnonzero(~index.held_out(held_out_fraction))
        self.sizes: NDArray[np.int64] = index.sizes[kept]
        self.fingerprint = f"{manifest.fingerprint}-{held_out_fraction!r}"
        self._files, self._rows = index.files[kept], index.rows[kept]
        self._blocks = _block_starts(index.files, index.sizes)
        self._first_row = np.searchsorted(index.files, np.arange(len(manifest.files) + 1))
        self._cache: OrderedDict[int, list[tuple[str, str]]] = OrderedDict()

    def read(self, number: int) -> tuple[str, str]:
        """Raises DataError if the file is corrupt."""
        place = int(self._first_row[self._files[number]] + self._rows[number])
        block = int(np.searchsorted(self._blocks, place, side="right")) - 1
        if block not in self._cache:
            self._cache[block] = self._load(block)
            if len(self._cache) > CACHED_BLOCKS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(block)
        return self._cache[block][place - int(self._blocks[block])]

    def _load(self, block: int) -> list[tuple[str, str]]:
        start, stop = int(self._blocks[block]), int(self._blocks[block + 1])
        file = int(np.searchsorted(self._first_row, start, side="right")) - 1
        first = int(self._first_row[file])
        batches = read_rows(self._manifest.folder, self._manifest.files[file].file, start - first, stop - first)
        return [(row["id"], row["text"]) for batch in batches for row in batch.to_pylist()]


def _block_starts(files: NDArray[np.int32], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places at which a new block begins, and the end: blocks of one file each, of about BLOCK_BYTES."""
    if not len(sizes):
        return np.zeros(1, np.int64)
    part = (np.cumsum(sizes) - sizes) // BLOCK_BYTES
    starts = np.flatnonzero((np.diff(part) != 0) | (np.diff(files) != 0)) + 1
    return np.concatenate([[0], starts, [len(sizes)]]).astype(np.int64)


@dataclass(frozen=True)
class Excerpt:
    """A piece of a document."""

    document: str
    """Its id."""
    text: str
    window: int
    """Which window of `max_bytes` it begins in."""


class Excerpts:
    """All excerpts that a recipe may use, by number: windows of each document in turn.

    What is left at the end of a document and shorter than a window is used only if it is all there is.
    """

    def __init__(self, documents: Documents, config: DocumentsConfig) -> None:
        self._documents = documents
        self._config = config
        if not len(documents.sizes):
            raise ConfigError(
                f"documents.domain={config.domain!r} has no documents for training; name another domain, or lower "
                "its held_out_fraction"
            )

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        sizes = self._documents.sizes
        windows = np.maximum(1, sizes // self._config.max_bytes) if self._config.excerpts == "all" else sizes * 0 + 1
        return np.cumsum(windows)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Excerpt:
        if not 0 <= number < len(self):
            raise IndexError(number)
        document = int(np.searchsorted(self._ends, number, side="right"))
        window = number - (int(self._ends[document - 1]) if document else 0)
        name, text = self._documents.read(document)
        return Excerpt(name, excerpt(text, window, self._config.max_bytes), window)


def excerpt(text: str, window: int, max_bytes: int) -> str:
    """The text of window `window`, from its first line start to its last line end, or by words where lines are long.

    Never empty for a text that is not: a window of white space gives the beginning of the text.
    """
    data = text.encode()
    start, stop = window * max_bytes, (window + 1) * max_bytes
    piece = data[start:stop].decode(errors="ignore")
    if window:
        piece = piece[_cut(piece, "\n", range(len(piece) // 2)) or _cut(piece, " ", range(len(piece) // 2)) :]
    if stop < len(data):
        half = range(len(piece) - 1, len(piece) // 2, -1)
        piece = piece[: _cut(piece, "\n", half) or _cut(piece, " ", half) or len(piece)]
    return piece.strip() or (excerpt(text.strip(), 0, max_bytes) if text.strip() else "")


def _cut(piece: str, mark: str, places: range) -> int:
    """Place behind the first `mark` that `places` comes by; 0 if there is none."""
    return next((place + 1 for place in places if piece[place] == mark), 0)
