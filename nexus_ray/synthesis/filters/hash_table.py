"""A fixed table from 64-bit hashes to numbers, read for a whole text at a time: sorted arrays behind a bitmap."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nexus_ray.synthesis.filters.text import Hashes

Numbers = NDArray[np.int64]
_SPARSITY = 16  # bitmap entries per hash, so that few absent hashes get past it


class HashTable:
    """Several numbers may stand under one hash. 16 bytes an entry, and as many for the bitmap."""

    def __init__(self, hashes: Hashes, numbers: Numbers, *, most: int | None = None) -> None:
        """`most`: hashes with more numbers than that are left out."""
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._numbers = hashes[order], numbers[order]
        if most is not None and len(hashes):
            _, places, counts = np.unique(self._hashes, return_inverse=True, return_counts=True)
            keep = counts[places] <= most
            self._hashes, self._numbers = self._hashes[keep], self._numbers[keep]
        bits = max(int(len(self._hashes) * _SPARSITY).bit_length(), 8)
        self._shift = np.uint64(64 - bits)
        self._present = np.zeros(1 << bits, np.bool_)
        self._present[self._hashes >> self._shift] = True

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, query: Hashes) -> tuple[Numbers, Numbers]:
        """Place in `query` and number, for each number under one of its hashes; two arrays of equal length."""
        places = np.flatnonzero(self._present[query >> self._shift])
        if not len(places):
            return places, places
        first = np.searchsorted(self._hashes, query[places], "left")
        counts = np.searchsorted(self._hashes, query[places], "right") - first
        if not counts.any():
            return places[:0], places[:0]
        ends = np.cumsum(counts)
        offsets = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        return np.repeat(places, counts), self._numbers[np.repeat(first, counts) + offsets]
