"""Which language a text is written in: function words first, letter triples where those say too little.

Built-in tables tell English, French, Spanish, German, Italian, Portuguese, Dutch and program code apart, offline. A
text in another language has little evidence for any of them, and so a low confidence.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

from nexus_ray.config.filters import Language as Name
from nexus_ray.config.filters import LanguageFilter
from nexus_ray.synthesis.filters.language_profiles import FUNCTION_WORDS, LETTERS, SAMPLES
from nexus_ray.synthesis.filters.text import Item, Text, verdict
from nexus_ray.synthesis.rows import Verdict

NAMES: tuple[Name, ...] = tuple(FUNCTION_WORDS)
_SEEN_WORDS = 300
_SEEN_CHARS = 600
_CLEAR = 0.99  # function words alone decide from this probability on
_WORD_BITS = 3.0  # evidence of one function word
_ENOUGH = 0.2  # of the words must be function words of the language; running text has 0.3 to 0.6
_STRANGE = 0.05  # letters that are not at home in a language leave nothing of its confidence from this share on
_NATURAL_BITS = 2.0  # by which a letter triple of a language is likelier there than anywhere, per triple
_CODE_SIGNS = "{}()[];=<>_#"
_CODE_LINE = re.compile(
    r"[ \t]*(?:(?:def|class|func|function|fn|struct|enum|interface|impl)\s+\w+.*[({:]\s*(?:#.*)?$"
    r"|(?:from\s+[\w.]+\s+)?import\s+[\w.{*\"'(]|#include\b|#define\b|package\s+[\w.]+;?$|using\s+[\w.:]+;"
    r"|(?:if|elif|else|for|while|try|except|finally|with|switch|case|match|catch|do)\b.*[:{]\s*(?:#.*)?$"
    r"|(?:return|raise|yield|assert|del|throw|await)\b(?:\s.*)?[\w)\]}\"';]$(?<![.?!,])"
    r"|(?:public|private|protected|static|const|let|var|final|pub|async|void|int|char|float|double|bool|auto)\s.*[;{=(:]"
    r"|@\w+[\w.]*(?:\(.*\))?$|[\])}]+[;,)]*$|(?:pass|break|continue|else|try);?$"
    r"|[\w.\[\]\"'*&:<>, ]+\s(?:[-+*/|&%]?=|:=|<-|\+=)\s\S.*|[\w.\->:]+\(.*\)?[;,:{]?$|.*[;{]$|[\"']?\w+[\"']?:\s\S.*,$"
    r"|(?:SELECT|INSERT|UPDATE|CREATE|FROM|WHERE)\s)"
)
_BEYOND = re.compile(r"[^\W\d_a-z]")
_LETTERS = re.compile(r"[^\W\d_]+")
_COMMENT = re.compile(r"[ \t]*(?://|#|/\*|\*\s|--\s|\"\"\"|''')")


class Language:
    """Rejects texts that are not surely enough in an allowed language."""

    name = "language"

    def __init__(self, config: LanguageFilter | None = None) -> None:
        self.config = config or LanguageFilter()

    def judge(self, item: Item) -> Verdict:
        text = Text.of(item)
        if len(text.words) < self.config.min_words:
            return Verdict("pass")
        shares = identify(text)
        best = max(shares, key=lambda name: shares[name])
        confidence = max(shares[name] for name in self.config.allow)
        finding = None
        if confidence < self.config.min_confidence:
            finding = "another language" if shares[best] < self.config.min_confidence else best
        return verdict(self.name, finding, {"language.confidence": round(confidence, 4)})


def identify(item: Item) -> dict[Name, float]:
    """Confidence for each language and `code`, each in [0, 1]; together at most 1, less for an unknown language."""
    text = Text.of(item)
    code = code_share(text)
    prose = _prose(text)
    home = _at_home(text.raw)
    return {**{name: share * home[name] * (1.0 - code) for name, share in prose.items()}, "code": code}


def code_share(item: Item) -> float:
    """How sure it is that a text is program code: by the share of its lines that look like it; 0 for plain prose."""
    text = Text.of(item)
    start = text.raw[:4000]
    if sum(map(start.count, _CODE_SIGNS)) * 33 < len(start):
        return 0.0
    lines = [line.rstrip() for line in start.split("\n") if line.strip()]
    code = sum(1 for line in lines if _CODE_LINE.match(line))
    comments = sum(1 for line in lines if _COMMENT.match(line))
    share = code / max(len(lines) - comments, 1) if code else 0.0
    return min(max((share - 0.2) / 0.4, 0.0), 1.0)


def _at_home(raw: str) -> dict[Name, float]:
    """What is left of the confidence for each language, given the letters beyond a-z."""
    if raw.isascii():
        return dict.fromkeys(NAMES, 1.0)
    lower = raw[:4000].lower()
    beyond = Counter(_BEYOND.findall(lower))
    whole = len(lower) * _STRANGE
    return {
        name: max(1.0 - sum(n for letter, n in beyond.items() if letter not in LETTERS[name]) / whole, 0.0)
        for name in NAMES
    }


def _prose(text: Text) -> dict[Name, float]:
    words = text.words[:_SEEN_WORDS]
    masks_of = _word_masks()
    masks = [found for found in map(masks_of.get, words) if found]
    totals = [0.0] * len(NAMES)
    for mask, count in Counter(masks).items():
        for place in _members(mask):
            totals[place] += count
    shares = _odds([_WORD_BITS * total for total in totals])
    best = max(totals)
    if max(shares) >= _CLEAR and best >= _ENOUGH * len(words) and len(masks_of.keys() & set(words)) >= 3:
        return dict(zip(NAMES, shares, strict=True))
    return _by_triples(text.raw, totals, len(words))


def _by_triples(raw: str, totals: Sequence[float], words: int) -> dict[Name, float]:
    """Letter triples as naive Bayes, with the function words as further evidence; damped where nothing fits well."""
    triples = Counter(_triples(raw[:_SEEN_CHARS]))
    count = sum(triples.values())
    if not count:
        return dict.fromkeys(NAMES, 0.0)
    tables = _tables()
    bits = [sum(n * tables[name].get(triple, 0.0) for triple, n in triples.items()) for name in NAMES]
    evidence = [own / 4 + _WORD_BITS * total for own, total in zip(bits, totals, strict=True)]
    best = evidence.index(max(evidence))
    fit = min(bits[best] / count / _NATURAL_BITS, 1.0)
    known = min(totals[best] / max(words, 1) / _ENOUGH, 1.0)
    likely = max(min((fit + known) / 1.2, 1.0), 0.0)
    return {name: share * likely for name, share in zip(NAMES, _odds(evidence), strict=True)}


def _odds(bits: Sequence[float]) -> list[float]:
    """Probabilities of alternatives, given the evidence for each."""
    top = max(bits)
    odds = [math.exp2(max(value - top, -60.0)) for value in bits]
    whole = sum(odds)
    return [value / whole for value in odds]


def _triples(raw: str) -> list[str]:
    padded = f" {' '.join(_LETTERS.findall(raw.lower()))} "
    return [padded[i : i + 3] for i in range(len(padded) - 2)]


@cache
def _word_masks() -> Mapping[str, int]:
    masks: dict[str, int] = {}
    for place, name in enumerate(NAMES):
        for word in FUNCTION_WORDS[name].split():
            masks[word] = masks.get(word, 0) | 1 << place
    return masks


@cache
def _members(mask: int) -> tuple[int, ...]:
    return tuple(place for place in range(len(NAMES)) if mask >> place & 1)


@cache
def _tables() -> Mapping[Name, Mapping[str, float]]:
    """For each language: by how many bits a triple is likelier in it than under a flat guess over all triples seen."""
    counts = {name: Counter(_triples(f"{SAMPLES[name]} {FUNCTION_WORDS[name]}")) for name in NAMES}
    kinds = len(set().union(*counts.values()))
    tables: dict[Name, dict[str, float]] = {}
    for name, seen in counts.items():
        whole = sum(seen.values())
        tables[name] = {triple: math.log2((n + 0.1) / (whole + 0.1 * kinds) * kinds) for triple, n in seen.items()}
    return tables
