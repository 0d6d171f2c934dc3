"""Text that generated rows share with held-out or benchmark text: verbatim or lightly edited, in both directions.

- *Verbatim*: a run of 13 words in common (GPT-3, Brown et al. 2020, app. C), or the whole of an item of 8-12 words.
- *Lightly edited*: runs of five words in common lead to the passage; of 26 words there, three quarters must stand in
  the same order. An item or row shorter than that counts if four fifths of it are there, or half of it with ten words
  in a row (Cosmopedia: a 10-gram, then a ratio of 0.5).

A row inside a held-out document, a benchmark item inside a row, and a passage common to both are all found; `overlap`
lists, for each item, the rows that hold it, and `overlap_table` counts the items that a job's accepted rows touch.
Paraphrases need a model and are not seen (Yang et al. 2023, arXiv:2311.04850). Words are compared without case and
punctuation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rapidfuzz.distance import LCSseq

from nexus_ray.config.filters import ContaminationFilter
from nexus_ray.synthesis.filters.hash_table import HashTable, Numbers
from nexus_ray.synthesis.filters.text import Hashes, Item, Text, verdict
from nexus_ray.synthesis.rows import Verdict

_SEED_WORDS = 5
_SEED_PLACES = 64  # a run of five words in more places than that is a commonplace and leads nowhere
_SEEDS = 3  # in common within a window, before it is looked at
_SET_END = re.compile(r"/|: ")
_SLACK = 6  # words that insertions and deletions may shift a passage by


@dataclass(frozen=True)
class Hit:
    """What a text has in common with an item."""

    item: str
    kind: str
    """`13 words in a row`, `whole item` or `lightly edited`."""
    share: float
    """Share of the passage found."""


class HeldOut:
    """Held-out and benchmark texts, made ready to be looked for. About 80 bytes a word."""

    def __init__(self, items: Iterable[tuple[str, str]], config: ContaminationFilter | None = None) -> None:
        """`items`: name and text of each. Those of fewer than `short_words` words are counted in `ignored`, by set."""
        self.config = config or ContaminationFilter()
        self.names: list[str] = []
        self.ignored: Counter[str] = Counter()
        texts: list[Text] = []
        for name, raw in items:
            text = Text(raw)
            if text.size < self.config.short_words:
                self.ignored[set_of(name)] += 1
                continue
            self.names.append(name)
            texts.append(text)
        self._words = [text.hashes(1) for text in texts]
        self._starts = np.cumsum([0, *map(len, self._words)])
        self._runs = _table(texts, self.config.ngram)
        self._seeds = _seed_table(texts, self._starts)
        lengths = range(self.config.short_words, self.config.ngram)
        shorts = {length: [text.size == length for text in texts] for length in lengths}
        self._shorts = {length: _table(texts, length, chosen) for length, chosen in shorts.items() if any(chosen)}

    def __len__(self) -> int:
        return len(self.names)

    def hits(self, item: Item) -> Iterator[Hit]:
        """All items that a text has a passage in common with, verbatim ones first; each at least once."""
        text = Text.of(item)
        if not self.names or text.size < min(self.config.short_words, self.config.ngram):
            return
        known: set[int] = set()
        for number in _numbers(self._runs, text.hashes(self.config.ngram)):
            known.add(number)
            yield Hit(self.names[number], f"{self.config.ngram} words in a row", 1.0)
        for length, table in self._shorts.items():
            for number in _numbers(table, text.hashes(length)):
                known.add(number)
                yield Hit(self.names[number], "whole item", 1.0)
        yield from self._edited(text, known)

    def _edited(self, text: Text, known: set[int]) -> Iterator[Hit]:
        places, positions = self._seeds.find(text.hashes(_SEED_WORDS))
        if not len(places):
            return
        owners = np.searchsorted(self._starts, positions, "right") - 1
        numbers, counts = np.unique(owners, return_counts=True)
        size = text.size
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            whole = min(size, len(self._words[number])) < self.config.window
            if number in known or (count < _SEEDS and not whole):
                continue
            mine = owners == number
            share = self._share(text.hashes(1), number, places[mine], positions[mine] - self._starts[number])
            if share:
                yield Hit(self.names[number], "lightly edited", share)

    def _share(self, row: Hashes, number: int, places: Numbers, positions: Numbers) -> float:
        """Highest share of a passage of the row that the item holds in order, 0 if none suffices.

        `places`, `positions`: where runs of five words in common begin, in the row and in the item.
        """
        config, item = self.config, self._words[number]
        length = min(config.window, len(row), len(item))
        if length < config.short_words:
            return 0.0
        is_whole = length < config.window
        enough = config.item_share if is_whole else config.window_share
        if is_whole and _longest_run(places, positions) >= config.run:
            enough = min(enough, config.run_share)
        best = 0.0
        for place, position in _anchors(places, positions, length, 1 if is_whole else _SEEDS):
            if len(item) <= len(row) and is_whole:
                best = max(best, _in_order(item, row, place - position, length))
            else:
                last = len(row) - length
                for start in {min(max(place - back, 0), last) for back in (0, length // 2, length - _SEED_WORDS)}:
                    best = max(best, _in_order(row[start : start + length], item, position - place + start, length))
        return best if best >= enough else 0.0


class Contamination:
    """Rejects rows that have a passage in common with held-out or benchmark text."""

    name = "contamination"

    def __init__(self, held_out: HeldOut) -> None:
        self.held_out = held_out

    def judge(self, item: Item) -> Verdict:
        hit = next(self.held_out.hits(item), None)
        if hit is None:
            return verdict(self.name, None, {"contamination.share": 0.0})
        return verdict(self.name, f"{hit.kind} of {hit.item}", {"contamination.share": round(hit.share, 4)})


def overlap(
    items: Iterable[tuple[str, str]], rows: Iterable[tuple[str, str]], config: ContaminationFilter | None = None
) -> dict[str, list[str]]:
    """The other direction: for each item that should be unseen, the ids of the rows that hold a part of it.

    Rows are read once and not kept. Items that no row touches are left out.
    """
    return _touched(HeldOut(items, config), rows)


def overlap_table(
    items: Iterable[tuple[str, str]], rows: Iterable[tuple[str, str]], config: ContaminationFilter | None = None
) -> list[dict[str, Any]]:
    """How much of what should be unseen the accepted rows hold, by set (domain or benchmark), for the job's summary.

    Of rows that passed `contamination` nothing is left to find; the table tells what came in without it: with the
    filter off, by a person's word, or before an item became one. `items`: how many are looked for; `too_short`: left
    out, by `short_words`; `touched`: items with a passage in a row; `rows`: rows with a passage of an item.
    """
    held_out = HeldOut(items, config)
    found = _touched(held_out, rows)
    counts = Counter(set_of(name) for name in held_out.names)
    touched = Counter(set_of(name) for name in found)
    holding: dict[str, set[str]] = {}
    for name, ids in found.items():
        holding.setdefault(set_of(name), set()).update(ids)
    return [
        {
            "unseen": name,
            "items": counts[name],
            "too_short": held_out.ignored[name],
            "touched": touched[name],
            "touched_share": round(touched[name] / counts[name], 6) if counts[name] else 0.0,
            "rows": len(holding.get(name, ())),
        }
        for name in sorted({*counts, *held_out.ignored})
    ]


def set_of(item: str) -> str:
    """What a name of `<domain>/<id>` or `<benchmark>: <place>` belongs to."""
    return _SET_END.split(item, maxsplit=1)[0]


def _touched(held_out: HeldOut, rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for id, text in rows:
        for name in dict.fromkeys(hit.item for hit in held_out.hits(text)):
            found.setdefault(name, []).append(id)
    return found


def _table(texts: list[Text], words: int, chosen: list[bool] | None = None) -> HashTable:
    """The texts (or the chosen ones) that hold each run of so many words."""
    parts, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for number, text in enumerate(texts):
        if chosen is None or chosen[number]:
            parts.append(np.unique(text.hashes(words)))
            owners.append(np.full(len(parts[-1]), number, np.int64))
    return HashTable(np.concatenate(parts), np.concatenate(owners))


def _seed_table(texts: list[Text], starts: Numbers) -> HashTable:
    """Positions of each run of five words, counted through all texts."""
    parts, positions = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for text, start in zip(texts, starts, strict=False):
        parts.append(text.hashes(_SEED_WORDS))
        positions.append(start + np.arange(len(parts[-1]), dtype=np.int64))
    return HashTable(np.concatenate(parts), np.concatenate(positions), most=_SEED_PLACES)


def _numbers(table: HashTable, hashes: Hashes) -> list[int]:
    """Distinct numbers under the hashes, in the order of the text."""
    return list(dict.fromkeys(table.find(hashes)[1].tolist()))


def _longest_run(places: Numbers, positions: Numbers) -> int:
    """Most words in a row that agree."""
    longest = 0
    runs: dict[tuple[int, int], int] = {}
    for place, position in sorted(zip(places.tolist(), positions.tolist(), strict=True)):
        runs[place, position] = runs.get((place - 1, position - 1), _SEED_WORDS - 1) + 1
        longest = max(longest, runs[place, position])
    return longest


def _anchors(places: Numbers, positions: Numbers, length: int, least: int) -> list[tuple[int, int]]:
    """Seeds with at least `least` seeds, itself among them, of about the same shift within the next `length` words."""
    pairs = sorted(zip(places.tolist(), positions.tolist(), strict=True))
    result: list[tuple[int, int]] = []
    for number, (place, position) in enumerate(pairs):
        if (
            result
            and place < result[-1][0] + _SEED_WORDS
            and abs(position - place - result[-1][1] + result[-1][0]) <= 1
        ):
            continue  # the same run
        near = 0
        for other, at in pairs[number:]:
            if other > place + length:
                break
            near += abs((at - other) - (position - place)) <= _SLACK
        if near >= least:
            result.append((place, position))
    return result


def _in_order(passage: Hashes, where: Hashes, start: int, length: int) -> float:
    """Share of a passage found in order in `where`, around `start`."""
    around = where[max(start - _SLACK, 0) : max(start + length + _SLACK, 0)]
    return float(LCSseq.similarity(passage.tolist(), around.tolist())) / length
