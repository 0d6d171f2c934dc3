"""English words for the validators: sentences, stems, stop words, names, numbers; small lists, no download."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

STOP_WORDS = frozenset((Path(__file__).parent / "data/stop_words.txt").read_text(encoding="utf-8").split())
"""Words that carry no claim of their own, among them those that answers use to speak about their source."""
NEGATIONS = frozenset(
    {"not", "never", "no", "none", "nobody", "nothing", "neither", "nor", "cannot", "without", "instead"}
)
_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {
    **{word: number for number, word in enumerate(f"{_UNITS} seventeen eighteen nineteen".split()) if number != 1},
    **{word: 10 * number for number, word in enumerate(_TENS.split(), start=2)},
    "hundred": 100,
}
"""Without `one`, which is more often a pronoun."""
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
"""Words that multiply the number before them."""


@dataclass(frozen=True)
class Measure:
    """A unit, under one name for all its spellings, and what it measures: `pound` is a weight and a currency."""

    unit: str
    kinds: frozenset[str]


_MEASURES = {
    "length": "mm millimetre millimeter|cm centimetre centimeter|metre meter|km kilometre kilometer|inch inches|"
              "foot feet ft|yard yd|mile mi",
    "weight": "mg milligram|gram|kg kilogram kilo|tonne ton|pound lb|ounce oz",
    "volume": "ml millilitre milliliter|litre liter|gallon|pint|quart",
    "time": "second sec|minute min|hour hr|day|week|month|year yr|decade|century centuries",
    "temperature": "celsius centigrade|fahrenheit|kelvin",
    "currency": "dollar $ usd|euro € eur|pound £ gbp|yen ¥ jpy|cent|penny pence pennies|nickel|dime|quarter|franc|"
                "crown|mark|rupee|yuan|peso|ruble rouble|krona kronor|lira",
}  # fmt: skip


def _measures() -> dict[str, Measure]:
    kinds: dict[str, set[str]] = {}
    units: dict[str, str] = {}
    for kind, text in _MEASURES.items():
        for spellings in text.split("|"):
            unit, *others = spellings.split()
            kinds.setdefault(unit, set()).add(kind)
            for spelling in (unit, *others):
                units[spelling] = units[f"{spelling}s"] = unit
    return {spelling: Measure(unit, frozenset(kinds[unit])) for spelling, unit in units.items()}


MEASURES = _measures()
"""By spelling, in lower case. Single letters are left out: they name unknowns too, and `m` is million or metre."""
CURRENCIES = {sign: MEASURES[sign].unit for sign in "$€£¥"}
_ABBREVIATIONS = (
    "mr",
    "mrs",
    "ms",
    "dr",
    "st",
    "prof",
    "sr",
    "jr",
    "vs",
    "e.g",
    "i.e",
    "cf",
    "no",
    "fig",
    "approx",
    "ca",
)
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|;\s+|\n+")
_MARKS = re.compile(r"^\s*(?:[-*•]|\d+[.)]|#+)\s+")
_NAME = re.compile(r"[A-Z][^\W\d_]+(?:['-][^\W\d_]+)*")
_ENDINGS = ("ization", "ational", "fulness", "ousness", "iveness", "ations", "ation", "ments", "ment", "ness", "ings",
            "ing", "ions", "ion", "edly", "ed", "ies", "ily", "ers", "ors", "er", "or", "ally", "ly", "al", "es", "s",
            "e", "y")  # fmt: skip


def sentences(text: str) -> list[str]:
    """Sentences of a text without list marks; a semicolon or a line's end ends one, an abbreviation's dot does not."""
    found: list[str] = []
    for piece in _split(text):
        piece = _MARKS.sub("", piece).strip()
        if piece:
            found.append(piece)
    return found


def _split(text: str) -> list[str]:
    pieces, start = [], 0
    for match in _END.finditer(text):
        before = text[start : match.start()]
        word = before.rstrip().rpartition(" ")[2].rstrip(".").casefold()
        if "\n" not in match.group() and before.rstrip().endswith(".") and (word in _ABBREVIATIONS or len(word) == 1):
            continue
        pieces.append(text[start : match.end()].rstrip("; \n"))
        start = match.end()
    return [*pieces, text[start:]]


def stem(word: str) -> str:
    """A word without its commonest endings: equal for forms of one word, and now and then for others."""
    word = word.casefold().removesuffix("'s")
    for ending in _ENDINGS:
        base = word.removesuffix(ending)
        if base != word and len(base) >= 3:
            return base[:-1] if len(base) > 3 and base[-1] == base[-2] else base
    return word


def capitalised(text: str) -> set[str]:
    """Words written like names: capitals inside a sentence, or at its start if the next word has one too."""
    found: set[str] = set()
    for sentence in sentences(text):
        words = re.findall(r"[\w'-]+|[^\w\s]", sentence)
        for place, word in enumerate(words):
            if not _NAME.fullmatch(word) or word.casefold() in STOP_WORDS:
                continue
            opens = place == 0 or words[place - 1] in '".:!?('
            if not opens or (place + 1 < len(words) and _NAME.fullmatch(words[place + 1])):
                found.update(part for part in word.removesuffix("'s").split("-") if _may_name(part.casefold()))
    return found


def _may_name(word: str) -> bool:
    return bool(word) and word not in STOP_WORDS and word not in NUMBER_WORDS
