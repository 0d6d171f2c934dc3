"""Two-level permutation of a domain's rows: a pure function of (key, epoch, position), O(1) memory.

Fully random rows read a hundred times slower than whole groups, so an epoch permutes *groups* of consecutive rows
first, then the rows inside windows of a few groups. Every epoch visits every row exactly once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key_of(*parts: object) -> int:
    """A 64-bit key from any printable parts (seed, domain, epoch ...)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): a cheap bijection with good avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffle_index(index: Indices, size: int | Indices, key: int | NDArray[np.uint64]) -> Indices:
    """Keyed permutation of [0, size), element-wise: a Feistel network with cycle walking.

    `size` and `key` may differ per element. Expected work is below four passes, whatever the size.
    """
    x = np.asarray(index, dtype=np.uint64).copy()
    sizes = np.broadcast_to(np.asarray(size, dtype=np.uint64), x.shape)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), x.shape)
    if x.size == 0:
        return x.astype(np.int64)
    bits = np.maximum(np.frexp((sizes - np.uint64(1)).astype(np.float64))[1], 2)  # of size - 1, exact below 2**53
    halves = ((bits + 1) // 2).astype(np.uint64)
    masks = (np.uint64(1) << halves) - np.uint64(1)
    todo = np.arange(x.size)
    with np.errstate(over="ignore"):
        while todo.size:
            y, k, half, mask = x[todo], keys[todo], halves[todo], masks[todo]
            left, right = y >> half, y & mask
            for i in range(_ROUNDS):
                k_i = k + _GOLDEN * np.uint64(i + 1)
                left, right = right, left ^ (_mix(right ^ k_i) & mask)
            x[todo] = (left << half) | right
            todo = todo[x[todo] >= sizes[todo]]
    return x.astype(np.int64)


@dataclass(frozen=True)
class RowOrder:
    """The order in which the rows of one domain are read, epoch after epoch.

    `num_rows` rows, in groups of `group_rows` consecutive ones, shuffled inside windows of `window_rows`.
    """

    num_rows: int
    group_rows: int
    window_rows: int
    key: int
    used: int | None = None
    """Only the first so many rows of the first epoch are read, again and again; None is all. Of two such orders the
    shorter one's rows are among the longer one's, and both begin with the same."""

    def __call__(self, counter: Indices) -> Indices:
        """Row number for each value of the domain's own counter (0, 1, 2 ... without end)."""
        counter = np.asarray(counter, dtype=np.int64)
        if self.used is not None:
            return self._epoch(self._cut(counter, self.used), key_of(self.key, 0))
        out = np.empty_like(counter)
        epochs = counter // self.num_rows
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = self._epoch(counter[chosen] - epoch * self.num_rows, key_of(self.key, int(epoch)))
        return out

    def _cut(self, counter: Indices, used: int) -> Indices:
        """Positions in the first epoch: as they come, then in windows of it, shuffled anew each time."""
        again = RowOrder(used, self.window_rows, self.window_rows, key_of(self.key, "again"))
        late = counter >= used
        out = counter.copy()
        out[late] = again(counter[late])
        return out

    def _epoch(self, position: Indices, key: int) -> Indices:
        full_groups, tail_rows = divmod(self.num_rows, self.group_rows)
        tail_at = int(key_of(key, "tail") % (full_groups + 1)) * self.group_rows
        in_tail = (position >= tail_at) & (position < tail_at + tail_rows)
        out = np.empty_like(position)
        out[in_tail] = full_groups * self.group_rows + shuffle_index(
            position[in_tail] - tail_at, tail_rows, key_of(key, "rows of the tail")
        )
        body = position[~in_tail]
        out[~in_tail] = self._body(np.where(body >= tail_at + tail_rows, body - tail_rows, body), full_groups, key)
        return out

    def _body(self, position: Indices, full_groups: int, key: int) -> Indices:
        if position.size == 0:
            return position
        window_rows = max(1, self.window_rows // self.group_rows) * self.group_rows
        window = position // window_rows
        size = np.minimum(window_rows, full_groups * self.group_rows - window * window_rows)
        with np.errstate(over="ignore"):
            window_key = _mix(window.astype(np.uint64) * _GOLDEN + np.uint64(key_of(key, "rows")))
        inside = window * window_rows + shuffle_index(position - window * window_rows, size, window_key)
        group = shuffle_index(inside // self.group_rows, full_groups, key_of(key, "groups"))
        return group * self.group_rows + inside % self.group_rows
