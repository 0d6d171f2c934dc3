"""Near duplicates of accepted texts: MinHash LSH (`rensa`) finds candidates, true Jaccard similarity decides.

A text is the set of its shingles, runs of five words (three, if one of the pair has fewer than 40 words: a short text
has too few of five). Only pairs at or above the threshold are rejected, so precision is that of 64-bit hashes;
recall is that of the bands: 1 - (1 - s^5)^32, 0.997 at similarity 0.7. Every text accepted stays in the index, over
all rounds: public pipelines forget theirs on a restart.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rensa import RMinHash, RMinHashLSH

from nexus_ray.config.filters import NearFilter
from nexus_ray.synthesis.filters.text import Hashes, Item, Text, verdict
from nexus_ray.synthesis.rows import Verdict

_SEED = 42


class _Space:
    """Accepted texts as sets of shingles of one length, and the index that finds similar ones."""

    def __init__(self, config: NearFilter) -> None:
        self._permutations = config.bands * config.rows
        self._index = RMinHashLSH(config.jaccard, self._permutations, config.bands)
        self.sets: list[Hashes] = []
        """Sorted distinct shingles of each text: 8 bytes each."""
        self.rows: list[int] = []
        """Number of the accepted row behind each."""

    def sketch(self, shingles: Hashes) -> RMinHash:
        result = RMinHash(self._permutations, _SEED)
        result.update(shingles.view("V8").tolist())
        return result

    def add(self, shingles: Hashes, sketch: RMinHash, row: int) -> None:
        self._index.insert(len(self.sets), sketch)
        self.sets.append(shingles)
        self.rows.append(row)

    def candidates(self, sketch: RMinHash) -> list[int]:
        return sorted(self._index.query(sketch)) if self.sets else []


class Near:
    """Rejects near duplicates of what it remembers.

    Memory: 8 bytes for each shingle and about 1.3 kB for the index, so 3 GB for a million rows of 200 words.
    """

    name = "near"

    def __init__(self, config: NearFilter | None = None) -> None:
        self.config = config or NearFilter()
        self._long, self._short = _Space(self.config), _Space(self.config)
        self._ids: list[str] = []
        self._words: list[int] = []
        self._last: tuple[Text, list[tuple[_Space, Hashes, RMinHash]]] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def judge(self, item: Item) -> Verdict:
        text = Text.of(item)
        similarity, twin = self.nearest(text)
        finding = f"{similarity:.2f} of {self._ids[twin]}" if similarity >= self.config.jaccard else None
        return verdict(self.name, finding, {"near.jaccard": round(similarity, 4)})

    def nearest(self, item: Item) -> tuple[float, int]:
        """Highest Jaccard similarity among the candidates and the number of that row, the earliest of equals; or 0, -1.

        Pairs far below the threshold are mostly no candidates, so a low figure is only a lower bound.
        """
        text = Text.of(item)
        best, twin = 0.0, -1
        for space, shingles, sketch in self._views(text):
            for key in space.candidates(sketch):
                row = space.rows[key]
                if space is self._short and not self._is_short_pair(text.size, self._words[row]):
                    continue
                similarity = jaccard(shingles, space.sets[key])
                if (similarity, -row) > (best, -twin):
                    best, twin = similarity, row
        return best, twin

    def remember(self, item: Item) -> None:
        text = Text.of(item)
        row = len(self._ids)
        for space, shingles, sketch in self._views(text):
            space.add(shingles, sketch, row)
        self._ids.append(text.id or f"text {row}")
        self._words.append(text.size)

    def _is_short_pair(self, words: int, others: int) -> bool:
        return min(words, others) < self.config.short_words

    def _views(self, text: Text) -> list[tuple[_Space, Hashes, RMinHash]]:
        """The spaces a text lives in, its shingles and their sketch; kept for the text that was asked about last."""
        if self._last is None or self._last[0] is not text:
            views = [(space, shingles(text, words)) for space, words in self._spaces(text.size)]
            self._last = text, [(space, some, space.sketch(some)) for space, some in views]
        return self._last[1]

    def _spaces(self, words: int) -> Iterator[tuple[_Space, int]]:
        """By a text's own length, and by that of texts that could be near duplicates of it."""
        short = self.config.short_words
        if words >= short:
            yield self._long, self.config.shingle_words
        if words < short / self.config.jaccard + self.config.short_shingle_words:
            yield self._short, self.config.short_shingle_words


def shingles(text: Text, words: int) -> Hashes:
    """Sorted distinct hashes of the runs of `words` words; of the whole text if it is shorter."""
    return np.unique(text.hashes(max(min(words, text.size), 1)))


def jaccard(first: Hashes, second: Hashes) -> float:
    """Size of the intersection over that of the union, of two sorted arrays without repetition; 0 if both are empty."""
    union_and_common = len(first) + len(second)
    if not union_and_common:
        return 0.0
    union = len(np.unique(np.concatenate([first, second])))
    return (union_and_common - union) / union
