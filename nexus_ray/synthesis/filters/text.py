"""A text as filters see it: words, lines and n-gram hashes, each computed once and shared by the whole chain.

Words are runs of letters and digits in lower case; scripts that put no space between words count each character as
one. Hashes are 64-bit, the same on every machine and in every run, so that indexes made of them can be kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nexus_ray.synthesis.rows import FinishReason, Row, Verdict

Hashes = NDArray[np.uint64]

_WORDS = re.compile(r"\w+")
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai, Lao, kana, Han
_WORDS_UNSPACED = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_LINES = re.compile(r"\n+")
_PARAGRAPHS = re.compile(r"\n{2,}")
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that multiplying loses nothing
_CACHED_WORDS = 2**20


class _WordHashes(dict[str, int]):
    """BLAKE2b of each word, computed at first sight and forgotten all at once when there are too many."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHED_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


_HASHES = _WordHashes()


class Text:
    """One text and what is counted in it. Made by `Text.of` from plain text or a row; immutable."""

    def __init__(self, raw: str, *, row: Row | None = None, hashes: Hashes | None = None) -> None:
        """`hashes`: those of its words, if they are known."""
        self.raw = raw
        self._row = row
        self._grams: dict[int, Hashes] = {} if hashes is None else {1: hashes}

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process with the hashes of its words: enough for the filters that remember."""
        return _received, (self.raw, self._row, self._grams.get(1))

    @classmethod
    def of(cls, item: Item) -> Text:
        if isinstance(item, Text):
            return item
        if isinstance(item, str):
            return cls(item)
        return cls(item.text, row=item)

    @property
    def id(self) -> str:
        """Id of its row; empty for plain text."""
        return self._row.id if self._row else ""

    @property
    def domain(self) -> str:
        """Domain of its row; empty for plain text."""
        return self._row.domain if self._row else ""

    @property
    def finish_reason(self) -> FinishReason | None:
        """None for plain text."""
        return self._row.finish_reason if self._row else None

    @cached_property
    def words(self) -> list[str]:
        """Words in lower case, in order."""
        return words_of(self.raw)

    @property
    def size(self) -> int:
        """Number of words."""
        return len(self._grams[1]) if 1 in self._grams else len(self.words)

    @cached_property
    def distinct(self) -> frozenset[str]:
        """The words without order and number."""
        return frozenset(self.words)

    @cached_property
    def lines(self) -> list[str]:
        """Lines that hold a letter or digit (a line with only a bracket repeats in any code)."""
        return [line for line in _LINES.split(self.raw) if _WORDS.search(line)]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Parts between blank lines."""
        return _PARAGRAPHS.split(self.raw.strip())

    def hashes(self, n: int) -> Hashes:
        """Hash of each run of `n` words, in order, [words - n + 1]; empty if there are fewer words."""
        if n not in self._grams:
            self._grams[n] = self._hash(n)
        return self._grams[n]

    def _hash(self, n: int) -> Hashes:
        """A polynomial in the words' hashes, put together from those of shorter runs."""
        if n == 1:
            return word_hashes(self.words)
        count = self.size - n + 1
        if count <= 0:
            return np.empty(0, np.uint64)
        head = 1 << ((n - 1).bit_length() - 1)
        factor = np.uint64(pow(_FACTOR, n - head, 2**64))
        result = self.hashes(head)[:count] * factor
        result += self.hashes(n - head)[head : head + count]
        return result


def _received(raw: str, row: Row | None, hashes: Hashes | None) -> Text:
    return Text(raw, row=row, hashes=hashes)


Item = str | Row | Text
"""What a filter can be asked about."""


class Filter(Protocol):
    """Judges a text by itself: the same verdict whenever and wherever it is asked."""

    name: str

    def judge(self, item: Item) -> Verdict:
        """The verdict, with the figures behind it."""
        ...


class RememberingFilter(Filter, Protocol):
    """Judges a text by what was accepted before it, so it must be asked in plan order, in one process.

    Its memory is rebuilt at each start by remembering the accepted texts in order: no copy of it can grow stale.
    """

    def remember(self, item: Item) -> None:
        """Take note of an accepted text."""
        ...


def words_of(text: str) -> list[str]:
    """Runs of letters and digits in lower case."""
    lower = text.lower()
    if not lower.isascii() and max(lower) >= "\u0e00":
        return _WORDS_UNSPACED.findall(lower)
    return _WORDS.findall(lower)


def word_hashes(words: Sequence[str]) -> Hashes:
    """64-bit hash of each word."""
    return np.fromiter(map(_HASHES.__getitem__, words), np.uint64, len(words))


def verdict(name: str, finding: str | None, scores: dict[str, float], *, action: str = "reject") -> Verdict:
    """`pass` if nothing was found; else the action with the reason `name: finding`."""
    if finding is None:
        return Verdict("pass", "", scores)
    return Verdict("flag" if action == "flag" else "reject", f"{name}: {finding}", scores)
