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
    NEGATIONS,
    NUMBER_WORDS,
    STOP_WORDS,
    capitalised,
    sentences,
    stem,
)

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_NUMBER = re.compile(r"(?<![\w.])\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|(?<![\w.])\d+(?:\.\d+)?|(?<=[A-Za-z-])\d+")
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
    """Numbers that are not in the source."""
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
        self.numbers = numbers(self.text)


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
        numbers=len(numbers(text) - source.numbers),
        names=len({stem(name) for name in capitalised(text)} - source.stems),
        quotations=sum(not _quoted(quotation, source) for quotation in _QUOTATION.findall(text)),
        negations=negations,
    )


def numbers(text: str) -> set[Fraction | str]:
    """Values of the numbers in a text, in digits or as single words from two to a hundred.

    What is too long to be a number counts by its digits: made up, it is as new as any other.
    """
    text = "\n".join(sentences(text))  # without the numbers of a list
    found = {number if (value := exact(number)) is None else value for number in _NUMBER.findall(text)}
    return found | {Fraction(NUMBER_WORDS[word]) for word in _words(text) if word in NUMBER_WORDS}


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


def _denied(sentence: str) -> set[str]:
    """Stems that a sentence denies: of the first content word behind its negation. None behind two: they may cancel."""
    words = _words(sentence)
    places = [place for place, word in enumerate(words) if word in NEGATIONS or word.endswith("n't")]
    if len(places) != 1:
        return set()
    behind = [word for word in words[places[0] + 1 :] if word not in STOP_WORDS and word not in NUMBER_WORDS]
    return {stem(behind[0])} if behind else set()


def _contradicts(sentence: str, stems: set[str], source: Source) -> bool:
    """Whether the source affirms what the sentence denies, or denies what it affirms, in a sentence much like it."""
    denied = _denied(sentence)
    alike = [
        (other, other_denied)
        for other, other_denied in source.sentences
        if other and len(stems & other) >= _SAME_SENTENCE * min(len(stems), len(other))
    ]
    refuted = set().union(*(other_denied for _, other_denied in alike)) if alike else set()
    affirmed = set().union(*(other - other_denied for other, other_denied in alike)) if alike else set()
    everywhere = set().union(*(other_denied for _, other_denied in source.sentences)) if source.sentences else set()
    return bool((denied & affirmed) - everywhere) or bool((stems - denied) & refuted - affirmed)


def _quoted(quotation: str, source: Source) -> bool:
    """Whether each part of a quotation, parted by dots of omission, stands in the source."""
    parts = [_flat(part) for part in re.split(r"\.\.\.|…", quotation)]
    whole = " ".join(parts)
    if len(whole.split()) < _MIN_QUOTED_WORDS:
        return True
    return all(f" {part} " in f" {source.flat} " for part in parts if part)
