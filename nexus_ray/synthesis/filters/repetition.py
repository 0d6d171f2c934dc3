"""Repetition inside a text, by Gopher's measures (Rae et al. 2021, arXiv:2112.11446, table A1).

Shares are counted as datatrove counts them, but words are compared in lower case, a run of words must occur three times
before it can be the "top" one (so that the question of a short text may come back in its answer), and lines without
letter or digit do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from nexus_ray.config.filters import RepetitionFilter
from nexus_ray.synthesis.filters.text import Item, Text, verdict
from nexus_ray.synthesis.rows import Verdict

TOP = (2, 3, 4)
DUPLICATE = (5, 6, 7, 8, 9, 10)
_LEAST_TOP = 3


class Repetition:
    """Rejects texts that repeat lines, paragraphs or runs of words."""

    name = "repetition"

    def __init__(self, config: RepetitionFilter | None = None) -> None:
        self.config = config or RepetitionFilter()
        limits = self.config.model_dump()
        self._limits = {f"repetition.{key}": limits[key] for key in limits if not key.startswith("short_")}
        by_run = [f"top_{n}gram" for n in TOP] + [f"duplicate_{n}gram" for n in DUPLICATE]
        self._short_limits = {**self._limits, **{f"repetition.{key}": self.config.short_share for key in by_run}}

    def judge(self, item: Item) -> Verdict:
        text = Text.of(item)
        scores = measure(text)
        limits = self._short_limits if text.size < self.config.short_words else self._limits
        over = next((key for key, value in scores.items() if value > limits[key]), None)
        return verdict(self.name, over and over.partition(".")[2], scores)


def measure(text: Text) -> dict[str, float]:
    """Shares of a text that are repetition, by name; 0 for an empty one."""
    total = len(text.raw) or 1
    lines, line_chars = _repeated(text.lines)
    paragraphs, paragraph_chars = _repeated(text.paragraphs)
    scores = {
        "repetition.lines": lines,
        "repetition.line_chars": line_chars / total,
        "repetition.paragraphs": paragraphs,
        "repetition.paragraph_chars": paragraph_chars / total,
    }
    scores.update((f"repetition.top_{n}gram", chars / total) for n, chars in zip(TOP, _top(text), strict=True))
    duplicate = zip(DUPLICATE, _duplicates(text), strict=True)
    scores.update((f"repetition.duplicate_{n}gram", chars / total) for n, chars in duplicate)
    return scores


def _repeated(parts: Sequence[str]) -> tuple[float, int]:
    """Share of parts that stood before, and their characters."""
    if len(parts) < 2 or len(set(parts)) == len(parts):
        return 0.0, 0
    seen: set[str] = set()
    again = [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]
    return len(again) / len(parts), sum(map(len, again))


def _top(text: Text) -> list[int]:
    """Characters under the commonest run of 2, 3 and 4 words; the longest one of those equally common."""
    result = [0] * len(TOP)
    for place, n in enumerate(TOP):
        _, first, counts = np.unique(text.hashes(n), return_index=True, return_counts=True)
        most = int(counts.max(initial=0))
        if most < _LEAST_TOP:
            break  # longer runs are rarer still
        starts = first[counts == most].tolist()
        result[place] = most * (n - 1 + max(sum(map(len, text.words[start : start + n])) for start in starts))
    return result


def _duplicates(text: Text) -> list[int]:
    """Characters of the words in runs of 5, ..., 10 words that stood before; runs counted do not overlap."""
    result = [0] * len(DUPLICATE)
    chars: list[int] = []
    for place, n in enumerate(DUPLICATE):
        grams = text.hashes(n)
        if len(set(grams.tolist())) == len(grams):
            break  # no longer run is repeated either
        _, first, which = np.unique(grams, return_index=True, return_inverse=True)
        chars = chars or [0, *accumulate(map(len, text.words))]
        end = 0
        for start in np.flatnonzero(first[which] < np.arange(len(grams))).tolist():
            if start >= end:
                end = start + n
                result[place] += chars[end] - chars[start]
    return result
