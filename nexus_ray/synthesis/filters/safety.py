"""Harmful or obscene text: a short word list with word boundaries, and a classifier beside it.

A word list finds words, not meaning: it is the offline default, and it errs on the side of letting text pass. The
classifier (`safety_model` loads one) is asked apart from the cheap filters, as `SafetyClassifier`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from nexus_ray.config.filters import Action, SafetyFilter
from nexus_ray.synthesis.filters.safety_words import MILD, PHRASES, STRONG
from nexus_ray.synthesis.filters.text import Item, Text, verdict, words_of
from nexus_ray.synthesis.rows import Verdict

_LEAST_MILD = 3  # in a short text, one is already a large share
_SIGNS = re.compile(r"[0134579@$*!]+[a-z]")
_DISGUISED = re.compile(r"\b[a-z]+[0134579@$*!][a-z0134579@$*!]*[a-z]\b|\b[a-z]+[@$*]{1,3}[a-z]+\b")
_DISGUISES = str.maketrans("013457@$!", "oieastasi")
_LEAST_STARRED = 4  # characters; `k*s` is a product
_CODE_BEFORE = re.compile(r"(?:[`=+$\\]|\w[(\[.]|[\d)\]]\s*[-/<>]|[<>]=|[\w)\]]\s?\*{1,2})\s*\Z")
_CODE_AFTER = re.compile(
    r"[`$(\[}]|\s*(?:[=+^]|[-/]\s*[\d(]|%\s*[\w(]|[<>]=?\s*[\w(])|\*{1,2}[\w(]|\s\*{1,2}\s[\w(]|\]\s*[-=+*/\[(.]"
)
_WORD_BEFORE = re.compile(r"([a-z'’]{2,})\W{0,3}\s\W{0,2}\Z")
_WORD_AFTER = re.compile(r"\W{0,3}?\s\W{0,2}?([a-z'’]{2,})")
_CODE_WORDS = frozenset(
    (
        *("return", "yield", "lambda", "print", "assert", "for", "in", "if", "else", "while", "and", "or", "not", "is"),
        *("def", "let", "var", "const", "compute", "calculate", "evaluate", "where", "sum", "pow", "mod", "equals"),
    )
)
_BESIDE_CHARS, _NEAR_CHARS = 40, 400


class Safety:
    """Rejects or flags texts with strong words, listed phrases, or too many mild words."""

    name = "safety"

    def __init__(self, config: SafetyFilter | None = None) -> None:
        self.config = config or SafetyFilter()
        allowed = {word.lower() for word in self.config.allow_words}
        extra = [words_of(entry) for entry in self.config.extra_words]
        self._strong = (STRONG | {entry[0] for entry in extra if len(entry) == 1}) - allowed
        self._mild = MILD - allowed
        phrases = [tuple(words_of(phrase)) for phrase in PHRASES] + [tuple(entry) for entry in extra if len(entry) > 1]
        self._phrases = _by_first_word(phrase for phrase in phrases if " ".join(phrase) not in allowed)

    def judge(self, item: Item) -> Verdict:
        text = Text.of(item)
        present = text.distinct
        strong = sum(1 for word in text.words if word in self._strong) if present & self._strong else 0
        strong += self._disguised(text.raw)
        mild = sum(1 for word in text.words if word in self._mild) if present & self._mild else 0
        share = mild / (len(text.words) or 1)
        scores = {"safety.strong": float(strong), "safety.mild": share}
        return verdict(self.name, self._finding(text, present, strong, mild, share), scores, action=self.config.action)

    def _finding(self, text: Text, present: frozenset[str], strong: int, mild: int, share: float) -> str | None:
        if strong:
            return "strong word"
        if self._has_phrase(text.words, present):
            return "phrase"
        return "mild words" if mild >= _LEAST_MILD and share > self.config.max_mild else None

    def _has_phrase(self, words: list[str], present: frozenset[str]) -> bool:
        for first in present & self._phrases.keys():
            places = [place for place, word in enumerate(words) if word == first]
            for phrase in self._phrases[first]:
                if any(tuple(words[place : place + len(phrase)]) == phrase for place in places):
                    return True
        return False

    def _disguised(self, raw: str) -> int:
        """Strong words written as `sh1t`, `f*ck` or `f**k`: a star is any one letter."""
        lower = raw.lower()
        if not any(lower[found.start() - 1].isalpha() for found in _SIGNS.finditer(lower) if found.start()):
            return 0
        return sum(
            1 for found in _DISGUISED.finditer(lower) if self._is_strong(found[0]) and not _is_code(lower, found)
        )

    def _is_strong(self, word: str) -> bool:
        plain = word.translate(_DISGUISES)
        if "*" not in plain:
            return plain in self._strong
        if len(plain) < _LEAST_STARRED:
            return False
        pattern = re.compile(plain.replace("*", "."))
        return word[0] != "*" and any(len(some) == len(plain) and pattern.fullmatch(some) for some in self._strong)


def _is_code(lower: str, found: re.Match[str]) -> bool:
    """Whether a starred word is a product or a power: beside operators, or of single letters without prose around them
    or that are names nearby."""
    if "*" not in found[0]:
        return False
    before = lower[max(0, found.start() - _BESIDE_CHARS) : found.start()]
    after = lower[found.end() : found.end() + _BESIDE_CHARS]
    if _CODE_BEFORE.search(before) or _CODE_AFTER.match(after):
        return True
    names = [name for name in found[0].split("*") if name]
    if any(len(name) > 1 for name in names):
        return False
    beside = [some[1] for some in (_WORD_BEFORE.search(before), _WORD_AFTER.match(after)) if some]
    if all(word in _CODE_WORDS for word in beside):
        return True
    near = lower[max(0, found.start() - _NEAR_CHARS) : found.end() + _NEAR_CHARS]
    return all(re.search(rf"(?<![\w'’*]){name}(?![\w'’*])", near) for name in names)


class Classifier(Protocol):
    """Texts to harmfulness, each in [0, 1]; NaN for one it has no answer for. The same texts give the same figures."""

    def __call__(self, texts: Sequence[str]) -> Sequence[float]: ...


class SafetyClassifier:
    """Asks a classifier; for what costs more than a look."""

    name = "safety_classifier"

    def __init__(self, classify: Classifier, limit: float, *, action: Action = "reject") -> None:
        """`limit`: the most that passes, in [0, 1]."""
        self._classify = classify
        self._limit = limit
        self._action = action

    def judge(self, item: Item) -> Verdict:
        return self.judge_many([item])[0]

    def judge_many(self, items: Sequence[Item]) -> list[Verdict]:
        """Rejects above the limit, and what the classifier gives no number for; it is asked once for all."""
        return [self._verdict(float(harm)) for harm in self._classify([Text.of(item).raw for item in items])]

    def _verdict(self, harm: float) -> Verdict:
        if not math.isfinite(harm):
            return verdict(self.name, "no finite score", {}, action=self._action)
        finding = "harmful" if harm > self._limit else None
        return verdict(self.name, finding, {"safety.classifier": harm}, action=self._action)


def _by_first_word(phrases: Iterable[tuple[str, ...]]) -> dict[str, list[tuple[str, ...]]]:
    result: dict[str, list[tuple[str, ...]]] = {}
    for phrase in phrases:
        result.setdefault(phrase[0], []).append(phrase)
    return result
