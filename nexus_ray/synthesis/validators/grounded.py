"""Whether a text is supported by the source it was made from: words, numbers, names, quotations; offline.

Each sentence of the text must take most of its content words from the source, and must bring no number, name or
quotation of its own. What this cannot see: a claim put together wrongly from the source's own words (who did it to
whom), or a synonym taken for a new word; a judge or a fact-checking model (MiniCheck, Tang et al. 2024,
arXiv:2404.10774) is for those. Numbers and names count apart because they are what made-up claims are made of, and a
sentence with one wrong year has nearly full coverage.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from nexus_ray.config.validators import GroundedConfig
from nexus_ray.synthesis.rows import Row, Verdict
from nexus_ray.synthesis.validators.digits import exact
from nexus_ray.synthesis.validators.words import (
    CURRENCIES,
    MEASURES,
    NEGATIONS,
    NUMBER_WORDS,
    SCALES,
    STOP_WORDS,
    Measure,
    capitalised,
    sentences,
    stem,
)

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_NUMBER = re.compile(r"(?<![\w.])\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|(?<![\w.])\d+(?:\.\d+)?|(?<=[A-Za-z-])\d+")
_PART = re.compile(rf"(?P<number>{_NUMBER.pattern})|(?P<word>{_WORD.pattern})|(?P<money>[{''.join(CURRENCIES)}])")
_SHORT_SCALES = {"k": 10**3, "m": 10**6, "bn": 10**9}
"""Right behind the digits. `3m` is read both as millions and, of metres or minutes, as 3; `$3m` is not."""
_RANGE = ("to", "or", "and")
_INTERJECTION = re.compile(r"^\W*no(?:\s*[,.!;:]|\s+-)\s*", re.IGNORECASE)
"""`No, it was not`: what follows denies or affirms by itself."""
_QUOTATION = re.compile(r'"([^"]{3,}?)"')
_MIN_WORDS = 3
"""Content words below which a share of them says nothing: `Yes, it did.`"""
_MIN_QUOTED_WORDS = 3
"""Shorter quotations are names and turns of phrase."""
_SAME_SENTENCE = 0.6
"""Share of common stems, of the shorter one's, from which two sentences are taken to speak of the same thing."""


@dataclass(frozen=True)
class Support:
    """How much of a text its source carries."""

    coverage: float
    """Least share of content words over the sentences."""
    supported: float
    """Share of sentences at or above the demanded coverage."""
    numbers: int
    """Numbers that are not in the source, or there only with another unit of the same kind."""
    names: int
    """Words inside a sentence that are written like names and are not in the source."""
    quotations: int
    """Quotations that do not stand in the source word for word."""
    negations: int
    """Sentences that deny what the source affirms, or the other way round."""

    @property
    def new_facts(self) -> int:
        return self.numbers + self.names + self.quotations + self.negations


class Source:
    """A source text, prepared for many questions."""

    def __init__(self, text: str) -> None:
        self.text = _normal(text)
        self.flat = _flat(self.text)
        self.sentences = [(_stems(one), _denied(one)) for one in sentences(self.text)]
        self.stems = set().union(*(stems for stems, _ in self.sentences)) if self.sentences else set()
        self.units: dict[Fraction | str, set[Measure | None]] = {}
        """What stands behind each of its numbers."""
        for amount in amounts(self.text):
            for reading in amount.readings:
                self.units.setdefault(reading, set()).add(amount.unit)

    def has(self, amount: Amount) -> bool:
        """Whether a number stands in the source, and not only with another unit of the same kind."""
        units = {unit for reading in amount.readings for unit in self.units.get(reading, ())}
        return any(not _differ(unit, amount.unit) for unit in units)


@dataclass(frozen=True)
class Amount:
    """A number in a text and the unit that it stands with."""

    value: Fraction | str
    """Its scale word multiplied in: 3000000 for `3 million`."""
    readings: frozenset[Fraction | str]
    """All that it may mean: the 2 of `2 to 3 million`."""
    unit: Measure | None


def _differ(one: Measure | None, other: Measure | None) -> bool:
    """Whether two units measure the same kind of thing and are not the same."""
    return one is not None and other is not None and bool(one.kinds & other.kinds) and one.unit != other.unit


def support(text: str, source: Source, *, min_words: float) -> Support:
    """Compare a text with its source; `min_words` is the demanded coverage of a sentence."""
    text = _normal(text)
    shares: list[float] = []
    negations = 0
    for sentence in sentences(text):
        stems = _stems(sentence)
        if len(stems) >= _MIN_WORDS:
            shares.append(len(stems & source.stems) / len(stems))
        if len(stems) > 1 and not sentence.endswith("?"):
            negations += _contradicts(sentence, stems, source)
    return Support(
        coverage=min(shares, default=1.0),
        supported=sum(share >= min_words for share in shares) / len(shares) if shares else 1.0,
        numbers=len({amount.value for amount in amounts(text) if not source.has(amount)}),
        names=len({stem(name) for name in capitalised(text)} - source.stems),
        quotations=sum(not _quoted(quotation, source) for quotation in _QUOTATION.findall(text)),
        negations=negations,
    )


def numbers(text: str) -> set[Fraction | str]:
    """Values of the numbers in a text, in digits or as single words from two to a hundred, with their scale words.

    What is too long to be a number counts by its digits: made up, it is as new as any other.
    """
    return {amount.value for amount in amounts(text)}


def amounts(text: str) -> list[Amount]:
    """The numbers in a text with their units, without the numbers of a list."""
    parts = _parts("\n".join(sentences(text)))
    return [amount for place in range(len(parts)) if (amount := _amount(parts, place))]


@dataclass(frozen=True)
class _Part:
    kind: str
    """`number`, `word` or `money`; of an end, nothing."""
    text: str
    gap: str
    """What stands between it and the one before."""

    @property
    def near(self) -> bool:
        return not self.gap.strip("-° \t") and self.kind != ""


def _parts(text: str) -> list[_Part]:
    """Numbers, currency signs and, in lower case, words and parts of words joined by hyphens."""
    parts: list[_Part] = []
    end = 0
    for match in _PART.finditer(text):
        kind, gap = match.lastgroup or "", text[end : match.start()]
        whole = match.group()
        for piece in whole.casefold().removesuffix("'s").split("-") if kind == "word" else [whole]:
            parts.append(_Part(kind, piece, gap))
            gap = "-"
        end = match.end()
    return parts


def _amount(parts: list[_Part], place: int) -> Amount | None:
    """The number at a place, if there is one."""
    value, before = _number(parts[place]), parts[max(place - 1, 0) : place]
    behind = [*parts[place + 1 : place + 5], *[_Part("", "", "")] * 4]
    if value is None and not (parts[place].text == "one" and behind[0].near and _scale(behind[0])):
        return None
    readings: set[Fraction | str] = set()
    if value is None:
        value = Fraction(1)
    elif isinstance(value, Fraction):
        readings = {value * scale for scale in _range_scale(behind)}
    if isinstance(value, Fraction) and behind[0].near:
        scale = _scale(behind[0])
        short = _SHORT_SCALES.get(behind[0].text, 0) if not behind[0].gap else 0
        if behind[0].text == "m" and short and not (before and before[0].kind == "money"):
            readings |= {value}
        if scale or short:
            value *= scale or short
            behind = behind[1:]
    return Amount(value, frozenset(readings | {value}), _unit(before, parts[place], behind))


def _number(part: _Part) -> Fraction | str | None:
    if part.kind == "number":
        exactly = exact(part.text)
        return part.text if exactly is None else exactly
    return Fraction(NUMBER_WORDS[part.text]) if part.kind == "word" and part.text in NUMBER_WORDS else None


def _scale(part: _Part) -> int:
    return SCALES.get(part.text.removesuffix("s"), 0)


def _range_scale(behind: list[_Part]) -> list[int]:
    """What multiplies a number before `to 3 million` and `-3 million`: perhaps the same."""
    if behind[0].kind == "word" and behind[0].near and behind[0].text in _RANGE:
        behind = behind[1:]
    scaled = all(part.near for part in behind[:2]) and _number(behind[0]) is not None and _scale(behind[1])
    return [scaled] if scaled else []


def _unit(before: list[_Part], number: _Part, behind: list[_Part]) -> Measure | None:
    """The currency before a number, or the known unit right behind it."""
    if before and before[0].kind == "money" and number.near:
        return MEASURES[before[0].text]
    if behind[0].text in ("c", "f") and "°" in behind[0].gap:
        return MEASURES["celsius" if behind[0].text == "c" else "fahrenheit"]
    if behind[0].near and behind[0].text in ("degree", "degrees"):
        behind = behind[1:]
    return MEASURES.get(behind[0].text) if behind[0].near else None


class Grounded:
    """Validator of rows whose prompt carries a source."""

    def __init__(self, config: GroundedConfig | None = None) -> None:
        self.config = config or GroundedConfig()

    def validate(self, row: Row) -> Verdict:
        """Rows without a source are flagged: nothing can be said of them."""
        if row.prompt.source is None:
            return Verdict("flag", "grounded: the prompt has no source")
        return self.compare(row.text, row.prompt.source)

    def compare(self, text: str, source: str) -> Verdict:
        """The verdict on a text, given its source."""
        found = support(text, Source(source), min_words=self.config.min_words)
        scores = {
            "grounded.coverage": found.coverage,
            "grounded.supported": found.supported,
            "grounded.new_facts": float(found.new_facts),
        }
        if found.new_facts:
            kinds = ("numbers", "names", "quotations", "negations")
            parts = [f"{getattr(found, kind)} {kind}" for kind in kinds if getattr(found, kind)]
            return Verdict(self.config.new_facts, f"grounded: not in the source: {', '.join(parts)}", scores)
        if found.supported < self.config.min_sentences:
            reason = f"grounded: a sentence has {found.coverage:.2f} of its words from the source"
            return Verdict("reject", f"{reason}, less than {self.config.min_words:g}", scores)
        return Verdict("pass", scores=scores)


def _normal(text: str) -> str:
    text = unicodedata.normalize("NFKC", text)
    return text.translate(str.maketrans("“”„’‘–", '"""\'\'-')).replace("—", " - ")


def _flat(text: str) -> str:
    """Words alone, in one case: what must be equal for a quotation to be verbatim."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _words(text: str) -> list[str]:
    return [word for match in _WORD.findall(text) for word in match.casefold().removesuffix("'s").split("-")]


def _stems(text: str) -> set[str]:
    return {stem(word) for word in _words(text) if word not in STOP_WORDS and word not in NUMBER_WORDS}


def _denied(sentence: str) -> set[str] | None:
    """Stems that a sentence denies: of the first content word behind its negation. None (unknown) behind two: they may
    cancel."""
    words = _words(_INTERJECTION.sub("", sentence))
    places = [place for place, word in enumerate(words) if word in NEGATIONS or word.endswith("n't")]
    if len(places) > 1:
        return None
    content = [
        word
        for word in (words[places[0] + 1 :] if places else [])
        if word not in STOP_WORDS and word not in NUMBER_WORDS
    ]
    return {stem(content[0])} if content else set()


def _contradicts(sentence: str, stems: set[str], source: Source) -> bool:
    """Whether the source affirms what the sentence denies, or denies what it affirms, in a sentence much like it."""
    denied = _denied(sentence)
    if denied is None:
        return False
    refuted: set[str] = set()
    affirmed: set[str] = set()
    spared: set[str] = set()
    """What is denied somewhere in the source, or stands in a sentence of which nobody knows what it denies."""
    for other, other_denied in source.sentences:
        spared |= other if other_denied is None else other_denied
        if other and len(stems & other) >= _SAME_SENTENCE * min(len(stems), len(other)):
            affirmed |= other - (other_denied or set())
            refuted |= other_denied or set()
    return bool((denied & affirmed) - spared) or bool((stems - denied) & refuted - affirmed)


def _quoted(quotation: str, source: Source) -> bool:
    """Whether each part of a quotation, parted by dots of omission, stands in the source."""
    parts = [_flat(part) for part in re.split(r"\.\.\.|…", quotation)]
    whole = " ".join(parts)
    if len(whole.split()) < _MIN_QUOTED_WORDS:
        return True
    return all(f" {part} " in f" {source.flat} " for part in parts if part)
