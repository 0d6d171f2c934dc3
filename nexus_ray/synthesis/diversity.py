"""How varied generated text is, measured beside as much real text, so that collapse shows.

All of these measures depend on how much text there is and on how it is cut: distinct-n falls with every further word,
the compression ratio favours short texts (Shaib et al. 2024, arXiv:2403.00553; length as confounder: arXiv:2507.15092),
a longer row repeats more 4-grams, more rows meet more topics. A figure alone says nothing; so generated rows are paired
with pieces of real text, each pair cut to the same number of words, and both sides are measured alike. A second,
separate part of the real text is the reference for vocabulary and topics, so that the real side is measured against
text it has not seen, too: its figure is what a generator without any collapse would get.

Invariant: figures depend on the texts, their order and the seed alone; memory is bounded by `max_rows` x `max_words`,
however much is streamed through.
"""

from __future__ import annotations

import hashlib
import heapq
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.errors import DataError
from nexus_ray.synthesis.topics import Clusters, Vectors, k_means, normal_entropy, vendi_score

OPENING_WORDS = 5
TAIL_SHARE = 0.1
"""The tail is the rarest words that together make up this share of the reference's words."""
MAX_CLUSTERS = 32
ROWS_PER_CLUSTER = 16
LEAST_ROWS = 4
"""Pieces of the reference that make a cluster a topic."""
VENDI_ROWS = 256
MAX_WORD_CHARACTERS = 40
"""Characters kept of a row, per word: a row of marks without words stays small."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class Measures:
    """Figures of one side. `None` where the real text is too little to say."""

    distinct_1: float | None
    """Different words / words (Li et al. 2016, arXiv:1510.03055); higher is more varied."""
    distinct_2: float | None
    distinct_3: float | None
    compression_ratio: float
    """Bytes / bytes after zlib level 9 (a window of 32 KiB); lower is more varied."""
    self_repetition: float | None
    """Mean over rows of the share of a row's different 4-grams that another row has too (after Salkar et al. 2022);
    lower is more varied."""
    common_opening: float
    """Share of rows that begin with the commonest first five words. 59 % of TinyStories share theirs
    (arXiv:2504.09184)."""
    tail_kept: float | None
    """Share of the reference's rare words that occur; collapse loses the tail first (Shumailov et al. 2024)."""
    topics_hit: float | None
    """Share of the reference's topic clusters that at least one row lies in."""
    topic_entropy: float | None
    """Evenness of the rows over those clusters, 0 to 1."""
    vendi_score: float
    """Effective number of different rows among `vendi_rows`."""


@dataclass(frozen=True)
class DiversityReport:
    """Generated text beside real text of the same size and shape."""

    generated: Measures
    anchor: Measures
    rows: int
    """Rows on either side."""
    words: int
    """Words on either side."""
    generated_rows: int
    """Rows that were given, of which `rows` are a sample."""
    reference_rows: int
    """Pieces of real text behind vocabulary and topics."""
    clusters: int
    vendi_rows: int

    def table(self) -> list[dict[str, Any]]:
        """One row per measure, for the stats file: both figures, their ratio, and which way is more varied."""
        lower = ("compression_ratio", "self_repetition", "common_opening")
        anchor = asdict(self.anchor)
        rows = []
        for name, value in asdict(self.generated).items():
            real = anchor[name]
            ratio = value / real if value is not None and real else None
            figures = {"generated": value, "anchor": real, "ratio": ratio}
            rounded = {key: None if figure is None else round(figure, 6) for key, figure in figures.items()}
            rows.append({"measure": name, **rounded, "more_varied": "lower" if name in lower else "higher"})
        return rows


def measure_diversity(
    generated: Iterable[str], anchor: Iterable[str], *, seed: int = 0, max_rows: int = 2000, max_words: int = 400
) -> DiversityReport:
    """Compare rows of generated text with documents of real text, each streamed through once.

    At most `max_rows` rows of at most `max_words` words are compared. Long documents give several pieces; beginnings
    of documents are taken first, because openings are compared. Words are runs of letters and digits, in lower case:
    text written without spaces counts as few, long words.

    Raises:
        DataError: there is no generated text, or too little real text for a single pair and a reference.
    """
    if max_rows < 1 or max_words < 1:
        raise ValueError(f"max_rows={max_rows} and max_words={max_words} must be at least 1")
    sample, given = _Sample(max_rows, seed), 0
    for text in generated:
        given += 1
        sample.add(_first_words(text, max_words))
    rows = sample.texts()
    if not rows:
        raise DataError("diversity: there is no generated text to measure; accept at least one row with words in it")
    longest = max(len(words_of(row)) for row in rows)
    matched, reference = _anchor_pieces(anchor, longest, rows=max_rows, seed=seed)
    ours, real = _paired(rows, matched)
    if not ours or not reference:
        raise DataError(
            f"diversity: {len(matched) + len(reference)} pieces of anchor text are too few to compare with; name an "
            "anchor domain with at least two documents"
        )
    scale = _Scale([words_of(text) for text in reference], seed)
    return DiversityReport(
        generated=_measures(ours, scale),
        anchor=_measures(real, scale),
        rows=len(ours),
        words=sum(len(words_of(text)) for text in ours),
        generated_rows=given,
        reference_rows=len(reference),
        clusters=scale.clusters,
        vendi_rows=min(VENDI_ROWS, len(ours)),
    )


def words_of(text: str) -> list[str]:
    """Its words, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


# --- samples of equal size and shape -----------------------------------------------------------------------------


class _Sample:
    """`size` texts of a stream, each as likely as any other: those whose places have the smallest hashes."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed, self._place = size, seed, 0
        self._heap: list[tuple[int, int, str]] = []

    def add(self, text: str, *, later: bool = False) -> None:
        """`later` texts are taken only where others do not fill the sample. A text without words is left out."""
        digest = hashlib.blake2b(f"{self._seed} {self._place}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "big") + (later << 64)
        self._place += 1
        if not text or (len(self._heap) == self._size and -self._heap[0][0] < key):
            return
        push = heapq.heappush if len(self._heap) < self._size else heapq.heapreplace
        push(self._heap, (-key, self._place, text))

    def texts(self) -> list[str]:
        """In the order of their hashes."""
        return [text for _, _, text in sorted(self._heap, reverse=True)]


def _first_words(text: str, words: int) -> str:
    """From the first word to the end of the `words`-th; empty if there is none."""
    return next(_pieces(text, words), "")


def _pieces(text: str, words: int) -> Iterator[str]:
    """The text in pieces of `words` words, each from the start of its first to the end of its last word."""
    start, end, count = 0, 0, 0
    for match in _WORD.finditer(text):
        start = start if count else match.start()
        end, count = match.end(), count + 1
        if count == words:
            yield text[start:end][: words * MAX_WORD_CHARACTERS]
            count = 0
    if count:
        yield text[start:end][: words * MAX_WORD_CHARACTERS]


def _anchor_pieces(anchor: Iterable[str], words: int, *, rows: int, seed: int) -> tuple[list[str], list[str]]:
    """Samples of pieces to compare with (documents 0, 2, ...) and for reference (documents 1, 3, ...)."""
    sides = _Sample(rows, seed), _Sample(rows, seed)
    for place, document in enumerate(anchor):
        for number, piece in enumerate(_pieces(document, words)):
            sides[place % 2].add(piece, later=number > 0)
    return sides[0].texts(), sides[1].texts()


def _paired(rows: list[str], pieces: list[str]) -> tuple[list[str], list[str]]:
    """Equally many of both, the longest with the longest and so on, each pair cut to the shorter one's words."""
    size = min(len(rows), len(pieces))
    ours, real = rows[:size], pieces[:size]
    lengths, others = ([len(words_of(text)) for text in side] for side in (ours, real))
    order, other_order = (sorted(range(size), key=found.__getitem__) for found in (lengths, others))
    matched = [""] * size
    for place, other in zip(order, other_order, strict=True):
        words = min(lengths[place], others[other])
        ours[place], matched[place] = _first_words(ours[place], words), _first_words(real[other], words)
    return ours, matched


# --- measures ----------------------------------------------------------------------------------------------------


class _Scale:
    """What both sides are held against: rare words and topics of the reference."""

    def __init__(self, reference: Sequence[list[str]], seed: int) -> None:
        self.tail = _tail(Counter(word for words in reference for word in words))
        self.vectors = Vectors(reference)
        self.seed = seed
        self._topics: Clusters | None = None
        if (clusters := min(MAX_CLUSTERS, len(reference) // ROWS_PER_CLUSTER)) > 1:
            rows_ND = self.vectors.projected(reference, seed=seed)
            self._topics = k_means(rows_ND, clusters, seed=seed).without_small(rows_ND, LEAST_ROWS)

    @property
    def clusters(self) -> int:
        """Topics of the reference; 0 if there is too little of it."""
        return len(self._topics.centres_KD) if self._topics else 0

    def topics(self, rows: Sequence[list[str]]) -> tuple[float, float] | None:
        """Share of the clusters hit, and evenness over them."""
        if self._topics is None:
            return None
        counts = self._topics.count(self.vectors.projected(rows, seed=self.seed))
        return float((counts > 0).mean()), normal_entropy(counts)


def _tail(counts: Counter[str]) -> frozenset[str]:
    """The rarest words that make up `TAIL_SHARE` of all, without those that occur once: misspellings and names."""
    left, total = TAIL_SHARE * sum(counts.values()), 0
    tail = set()
    for word, count in sorted(counts.items(), key=lambda entry: (entry[1], entry[0])):
        total += count
        if total > left:
            break
        if count > 1:
            tail.add(word)
    return frozenset(tail)


def _measures(texts: list[str], scale: _Scale) -> Measures:
    rows = [words_of(text) for text in texts]
    seen = {word for words in rows for word in words}
    topics = scale.topics(rows)
    openings = Counter(tuple(words[:OPENING_WORDS]) for words in rows)
    grams = _Grams(rows)
    data = "\n".join(texts).encode(errors="replace")
    return Measures(
        distinct_1=grams.distinct(1),
        distinct_2=grams.distinct(2),
        distinct_3=grams.distinct(3),
        compression_ratio=len(data) / len(zlib.compress(data, 9)),
        self_repetition=grams.shared_between_rows(4),
        common_opening=max(openings.values()) / len(rows),
        tail_kept=len(scale.tail & seen) / len(scale.tail) if scale.tail else None,
        topics_hit=topics[0] if topics else None,
        topic_entropy=topics[1] if topics else None,
        vendi_score=vendi_score(scale.vectors(rows[:VENDI_ROWS])),
    )


class _Grams:
    """n-grams of rows of words as 64-bit codes; none reaches over the end of a row."""

    def __init__(self, rows: Sequence[Sequence[str]]) -> None:
        numbers: dict[str, int] = {}
        self._rows = [np.array([numbers.setdefault(w, len(numbers) + 1) for w in row], np.uint64) for row in rows]

    def _codes(self, row: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
        codes = np.zeros(max(0, len(row) - n + 1), np.uint64)
        for place in range(n):
            codes = codes * _MULTIPLIER + row[place : len(codes) + place]
        return codes

    def distinct(self, n: int) -> float | None:
        """Different n-grams / n-grams."""
        codes = np.concatenate([self._codes(row, n) for row in self._rows])
        return len(np.unique(codes)) / len(codes) if len(codes) else None

    def shared_between_rows(self, n: int) -> float | None:
        """Mean over rows of the share of a row's different n-grams that occur in another row."""
        rows = [codes for row in self._rows if len(codes := np.unique(self._codes(row, n)))]
        if not rows:
            return None
        _, places, counts = np.unique(np.concatenate(rows), return_inverse=True, return_counts=True)
        shared = (counts[places] > 1).astype(np.float64)
        starts = np.cumsum([0, *map(len, rows[:-1])])
        return float((np.add.reduceat(shared, starts) / [len(row) for row in rows]).mean())
