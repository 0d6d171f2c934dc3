"""Whole conversations into rows: where each lies in a token file, so that none crosses a row. Pure.

Best fit decreasing (Johnson et al. 1974) inside windows of consecutive conversations, so that memory is bounded and
short and long ones stay mixed over the file: rows stand in the order of their first conversation.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 8192
"""Conversations that are packed together."""


@dataclass(frozen=True)
class Packing:
    """Where conversations lie: the k-th in the file is number `order[k]` and starts at token `offsets[k]`."""

    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    """Ascending."""
    size: int
    """Tokens of the file, padding included: a multiple of the row length."""


def pack(lengths: NDArray[np.int64], seq_len: int, *, window: int = WINDOW) -> Packing:
    """Positions of conversations of `lengths` tokens (1 to `seq_len` each) in rows of `seq_len`; deterministic."""
    rows: list[list[int]] = []
    for first in range(0, len(lengths), window):
        rows += _best_fit(lengths[first : first + window].tolist(), first, seq_len)
    order = np.array([number for row in rows for number in row], np.int64)
    counts = np.array([len(row) for row in rows], np.int64)
    before = np.cumsum(lengths[order]) - lengths[order]
    row_of = np.repeat(np.arange(len(rows)), counts)
    first_of_row = np.cumsum(counts) - counts
    offsets = row_of * seq_len + before - before[first_of_row][row_of] if len(order) else before
    return Packing(order, offsets.astype(np.int64), len(rows) * seq_len)


def _best_fit(lengths: list[int], first: int, seq_len: int) -> list[list[int]]:
    """Numbers of the conversations in each row; each goes, longest first, where the least room would be left."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), ascending
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free, (lengths[number], 0))
        room, row = free.pop(at) if at < len(free) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(first + number)
        insort(free, (room - lengths[number], row))
    return sorted(sorted(row) for row in rows)
