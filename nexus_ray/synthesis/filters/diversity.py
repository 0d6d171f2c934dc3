"""How much of a text is new phrasing: the mission's `diversity_threshold`, against repetitive outputs.

A text's diversity is the share of its runs of four words that occurred neither earlier in it nor in one of the rows
accepted lately. So it falls with loops inside a text and with formulas that all texts share, which no pairwise
comparison sees (59 % of TinyStories open with the same phrase). Self-repetition of 4-grams: Salkar et al. 2022.
"""

from __future__ import annotations

from collections import deque

from nexus_ray.config.filters import DiversityFilter
from nexus_ray.synthesis.filters.text import Hashes, Item, Text, verdict
from nexus_ray.synthesis.rows import Verdict


class Diversity:
    """Rejects texts with too little new phrasing, compared with themselves and the last `window` accepted rows."""

    name = "diversity"

    def __init__(self, config: DiversityFilter | None = None) -> None:
        self.config = config or DiversityFilter()
        self._rows: deque[list[int]] = deque()
        self._counts: dict[int, int] = {}

    def judge(self, item: Item) -> Verdict:
        value = self.measure(item)
        finding = "repetitive" if value < self.config.threshold else None
        return verdict(self.name, finding, {"diversity.new": round(value, 4)})

    def measure(self, item: Item) -> float:
        """Share of the runs of words that are new; 0 for a text without words."""
        runs = self._runs(Text.of(item))
        if not len(runs):
            return 0.0
        distinct = set(runs.tolist())
        return len(distinct.difference(self._counts)) / len(runs)

    def remember(self, item: Item) -> None:
        runs, counts = list(set(self._runs(Text.of(item)).tolist())), self._counts
        self._rows.append(runs)
        for run in runs:
            counts[run] = counts.get(run, 0) + 1
        while len(self._rows) > self.config.window:
            for run in self._rows.popleft():
                if counts[run] == 1:
                    del counts[run]
                else:
                    counts[run] -= 1

    def _runs(self, text: Text) -> Hashes:
        return text.hashes(max(min(self.config.ngram, text.size), 1))
