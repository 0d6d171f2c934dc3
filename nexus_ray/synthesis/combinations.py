"""Points of a grid of parameters by number, however large the grid: nothing is ever listed.

Sampling without replacement is a keyed permutation of the numbers of all points (a Feistel network with cycle
walking, as the stream's; here over integers of any size, because grids of word lists exceed 64 bits). A value of
weight w owns w places of its axis, and a combination counts where its first place comes: that is sampling without
replacement with chances proportional to the weights (Efraimidis & Spirakis 2006), and takes integers only.
Invariant: draw i is a function of (axes, key, i).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from nexus_ray.config.prompts import ParameterConfig

_ROUNDS = 6


def permuted(index: int, size: int, key: bytes) -> int:
    """Where `index` goes under the permutation of [0, size) that `key` (at most 64 bytes) names; size from 1 on."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    width, mask = (half + 7) // 8, (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for step in range(_ROUNDS):
            word = hashlib.blake2b(
                right.to_bytes(width, "little"), digest_size=min(64, width), key=key, salt=b"%d" % step
            )
            left, right = right, left ^ (_wide(word.digest(), width) & mask)
        index = (left << half) | right
        if index < size:
            return index


def _wide(digest: bytes, width: int) -> int:
    """`width` bytes made of a digest of at most 64."""
    while len(digest) < width:
        digest += hashlib.blake2b(digest).digest()
    return int.from_bytes(digest[:width], "little")


@dataclass(frozen=True)
class Axis:
    """One parameter of the grid."""

    name: str
    config: ParameterConfig

    @cached_property
    def _ends(self) -> list[int]:
        """Place behind the last of each value's places."""
        return list(itertools.accumulate(self.config.weights.get(value, 1) for value in self.config.values))

    @property
    def places(self) -> int:
        return self._ends[-1] if self.config.weights else self.config.combinations

    @property
    def combinations(self) -> int:
        return self.config.combinations

    def setting(self, place: int) -> int:
        """Number of the setting that owns a place."""
        return bisect_right(self._ends, place) if self.config.weights else place

    def value(self, setting: int) -> str | tuple[str, ...]:
        """What the template's variable gets: one value, or `choose` of them in the order of the list."""
        values, choose = self.config.values, self.config.choose
        if choose is None:
            return values[setting]
        return tuple(values[place] for place in _subset(setting, len(values), choose))


def _subset(number: int, size: int, choose: int) -> list[int]:
    """The `number`-th subset of `choose` out of `size`, in lexicographic order."""
    out: list[int] = []
    for place in range(size):
        if len(out) == choose:
            break
        with_it = math.comb(size - place - 1, choose - len(out) - 1)
        if number < with_it:
            out.append(place)
        else:
            number -= with_it
    return out


class Combinations:
    """The settings of all axes in drawing order (`key` given) or in the order written, the last axis fastest.

    Weighted grids keep the numbers drawn so far, some hundred bytes each; others keep nothing.
    """

    def __init__(self, axes: Sequence[Axis], key: bytes | None) -> None:
        self._axes = axes
        self._key = key
        self._weighted = key is not None and any(axis.config.weights for axis in axes)
        self._places = math.prod(axis.places for axis in axes) if self._weighted else self.size
        self._drawn: list[int] = []
        self._seen: set[int] = set()
        self._next = 0

    @property
    def size(self) -> int:
        """Different combinations; 1 for no axes."""
        return math.prod(axis.combinations for axis in self._axes)

    def __getitem__(self, draw: int) -> dict[str, str | tuple[str, ...]]:
        """Values by name. Raises IndexError from `size` on."""
        if not 0 <= draw < self.size:
            raise IndexError(draw)
        number = self._number(draw)
        out: dict[str, str | tuple[str, ...]] = {}
        for axis in reversed(self._axes):
            number, setting = divmod(number, axis.combinations)
            out[axis.name] = axis.value(setting)
        return dict(reversed(out.items()))

    def _number(self, draw: int) -> int:
        if self._key is None:
            return draw
        if not self._weighted:
            return permuted(draw, self._places, self._key)
        while len(self._drawn) <= draw:
            number = self._owner(permuted(self._next, self._places, self._key))
            self._next += 1
            if number not in self._seen:
                self._seen.add(number)
                self._drawn.append(number)
        return self._drawn[draw]

    def _owner(self, place: int) -> int:
        """Number of the combination that owns a place of the weighted grid."""
        settings = []
        for axis in reversed(self._axes):
            place, inside = divmod(place, axis.places)
            settings.append(axis.setting(inside))
        number = 0
        for axis, setting in zip(self._axes, reversed(settings), strict=True):
            number = number * axis.combinations + setting
        return number
