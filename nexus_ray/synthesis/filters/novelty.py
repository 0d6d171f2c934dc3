"""Novelty by ROUGE-L: a text too close to anything accepted, or to the pool it was prompted with, is no news.

Self-Instruct's rule (Wang et al. 2022, arXiv:2212.10560): F = 2 LCS / (m + n) over words, at most 0.7. All remembered
texts are compared, exactly: an index of words rules out those that share too few words to reach the threshold.
"""

from __future__ import annotations

import numpy as np
from rapidfuzz.distance import Indel
from rapidfuzz.process import extractOne

from nexus_ray.config.filters import NoveltyFilter
from nexus_ray.synthesis.filters.text import Item, Text, verdict
from nexus_ray.synthesis.rows import Verdict

_ALPHABET = 0x110000 - 0x800  # code points that are no surrogates
_PROBED = 0.1  # share of a text's words that the index is asked for beyond the least that is exact


class _Postings:
    """Numbers of the texts that hold a word so many times, growing."""

    __slots__ = ("array", "count")

    def __init__(self) -> None:
        self.array = np.empty(4, np.int32)
        self.count = 0

    def add(self, number: int) -> None:
        if self.count == len(self.array):
            self.array = np.resize(self.array, 2 * self.count)
        self.array[self.count] = number
        self.count += 1


class Novelty:
    """Rejects texts whose ROUGE-L F with any remembered text exceeds the threshold.

    Words are written as one character each, so that comparing texts is comparing strings: ROUGE-L's F is then
    `rapidfuzz`'s normalised Indel similarity.
    """

    name = "novelty"

    def __init__(self, config: NoveltyFilter | None = None) -> None:
        self.config = config or NoveltyFilter()
        self._letters: dict[int, str] = {}
        self._texts: list[str] = []
        self._sizes = np.empty(1024, np.int32)
        self._postings: dict[tuple[str, int], _Postings] = {}
        self._pool: set[int] = set()
        """Numbers of the texts that prompts showed."""

    def __len__(self) -> int:
        return len(self._texts)

    def judge(self, item: Item) -> Verdict:
        rouge, number = self._closest(item)
        finding = f"close to {self._what(number)}" if rouge > self.config.max_rouge else None
        return verdict(self.name, finding, {"novelty.rouge_l": round(rouge, 4)})

    def _what(self, number: int) -> str:
        return "a text of the prompts" if number in self._pool else "an accepted row"

    def highest(self, item: Item) -> float:
        """Highest ROUGE-L F with a remembered text; 0 if it does not reach the threshold."""
        return self._closest(item)[0]

    def _closest(self, item: Item) -> tuple[float, int]:
        """The highest figure and the number of that text; 0 and -1 if none reaches the threshold."""
        written = self._write(Text.of(item), learn=False)
        near = self._candidates(written)
        # the cutoff must not itself cut off a value at the threshold
        best = extractOne(
            written,
            [self._texts[number] for number in near],
            scorer=Indel.normalized_similarity,
            processor=None,
            score_cutoff=self.config.max_rouge - 1e-9,
        )
        return (float(best[1]), near[best[2]]) if best else (0.0, -1)

    def remember(self, item: Item) -> None:
        written = self._write(Text.of(item), learn=True)
        number = len(self._texts)
        self._texts.append(written)
        if number == len(self._sizes):
            self._sizes = np.resize(self._sizes, 2 * number)
        self._sizes[number] = len(written)
        for token in _tokens(written):
            self._postings.setdefault(token, _Postings()).add(number)

    def show(self, text: str) -> None:
        """Take note of a text that a prompt showed as an example: what only repeats it is no news either."""
        self._pool.add(len(self._texts))
        self.remember(text)

    def _write(self, text: Text, *, learn: bool) -> str:
        """One character per word, the same for the same word; unknown words that need not be learnt share one."""
        letters = self._letters
        hashes = text.hashes(1)[: self.config.max_words].tolist()
        if learn:
            for value in hashes:
                if value not in letters:
                    letters[value] = _letter(len(letters) % (_ALPHABET - 1) + 1)
        return "".join([letters.get(value, "\0") for value in hashes])

    def _candidates(self, written: str) -> list[int]:
        """Numbers of the texts that can reach the threshold, in order.

        With F >= t and m words here, a text of n words has LCS >= t (m + n) / 2, and n >= t m / (2 - t). Of the m
        words, at most m - LCS find no partner: so of any words taken, all but m - LCS must be in the text.
        """
        m, t = len(written), self.config.max_rouge
        if not m or not self._texts:
            return []
        known = [self._postings.get(token) for token in _tokens(written)]
        known.sort(key=lambda postings: postings.count if postings else 0)
        least = int(np.ceil(m * t / (2.0 - t) - 1e-9))
        taken = min(m - least + max(1, int(_PROBED * m)), m)
        shared = np.zeros(len(self._texts), np.int32)
        for postings in known[:taken]:
            if postings:
                shared[postings.array[: postings.count]] += 1
        sizes = self._sizes[: len(self._texts)]
        fits = (shared >= taken - m + t * (m + sizes) / 2.0 - 1e-6) & (shared > 0)
        fits &= (sizes >= least) & (sizes * t <= m * (2.0 - t) + 1e-6)
        return np.flatnonzero(fits).tolist()


def rouge_l(first: Item, second: Item) -> float:
    """ROUGE-L's F of two texts, over their words."""
    return float(Indel.normalized_similarity(Text.of(first).words, Text.of(second).words))


def _tokens(written: str) -> list[tuple[str, int]]:
    """Each word with the number of times that it stood before."""
    before: dict[str, int] = {}
    result = []
    for letter in written:
        count = before.get(letter, 0)
        before[letter] = count + 1
        result.append((letter, count))
    return result


def _letter(number: int) -> str:
    """The character of that number, surrogates left out."""
    return chr(number if number < 0xD800 else number + 0x800)
