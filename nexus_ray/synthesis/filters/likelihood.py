"""How plausible a text is: by the frequency of its words (`Prior`), and by a language model (`Perplexity`).

Both cut both tails at quantiles frozen on anchor text (`anchor`). The low tail holds templates, repetition and
memorised text, the high one noise, but also code, formulas and other languages: which tail to keep depends on the data
(Ankner et al. 2024, arXiv:2405.20541), so bounds are per domain. The reference must not be the student, which prefers
its own text and narrows it each round. No model is imported here: what scores is handed in.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from nexus_ray.config.filters import PerplexityFilter, PriorFilter
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.synthesis.filters.anchor import PASSAGE_WORDS, Anchor, Documents, grids, passages, with_all
from nexus_ray.synthesis.filters.text import Item, Text, verdict, words_of
from nexus_ray.synthesis.rows import Verdict

WORDS = "words 1"
"""The tokens of the prior: runs of letters and digits in lower case; the number changes with their definition."""
VOCABULARY = 50_000
"""Words whose frequency is kept; rarer ones count as unknown."""
_UNSEEN = 0.5  # times that a word outside the table is taken to occur (the Jeffreys prior of a rare event)
_SCORED_AT_ONCE = 256


class Scorer(Protocol):
    """Measures perplexity per token. What a text scores depends on that text alone, not on its neighbours."""

    fingerprint: str
    """Of weights, precision and whatever else the figures depend on."""
    tokenizer: str
    """Fingerprint of the tokenizer."""

    def __call__(self, texts: Sequence[str]) -> Sequence[float]:
        """One perplexity per text; NaN for one that has none (too short)."""
        ...


class Perplexities(Protocol):
    """The least that scores: texts to perplexities. Quantiles need a `Scorer`, which says what it is."""

    def __call__(self, texts: Sequence[str]) -> Sequence[float]: ...


# --- the prior ---------------------------------------------------------------------------------------------------


class Prior:
    """Rejects texts whose words are unusually common or rare, or unusually even or uneven in that.

    Figures: mean and standard deviation of the words' log frequency in the anchor text, nats (arXiv:2509.18577).
    """

    name = "prior"

    def __init__(self, anchor: Anchor, config: PriorFilter | None = None) -> None:
        """Raises ConfigError if the anchor text is too small for the tails, DataError if it is of other words."""
        self.config = config or PriorFilter()
        self.anchor = anchor
        if anchor.measure != "prior" or anchor.tokenizer != WORDS or anchor.model != _table_digest(anchor.words):
            raise DataError(
                f"anchor of {anchor.measure}, {anchor.tokenizer}: this is no table of {WORDS}; freeze the prior again"
            )
        anchor.check_levels(self.config.low, self.config.high)
        self._unseen = math.log(_UNSEEN / anchor.total)
        self._logs = {word: math.log(count / anchor.total) for word, count in anchor.words.items()}
        self._bounds = _Bounds(anchor, self.config.low, self.config.high)

    def judge(self, item: Item) -> Verdict:
        text = Text.of(item)
        if text.size < self.config.min_words:
            return Verdict("pass")
        unseen, logs = self._unseen, self._logs
        figures = _spread([logs.get(word, unseen) for word in text.words])
        return verdict(self.name, self._bounds.finding(text.domain, figures), _rounded(figures))


def freeze_prior(documents: Documents, *, passage_words: int = PASSAGE_WORDS, min_words: int = 20) -> Anchor:
    """Word counts and quantiles of the prior's figures over anchor documents. Keeps the documents in memory.

    A passage is measured with its whole document taken out of the counts: otherwise no passage would hold an unknown
    word, and every new text would look strange. Passages of fewer than `min_words` words are left out.
    """
    found: list[tuple[str, list[Counter[str]]]] = []
    for domain, text in documents:
        found.append((domain, [Counter(words_of(piece)) for piece in passages(text, passage_words)]))
    counted = _sum(piece for _, pieces in found for piece in pieces)
    known = dict(sorted(counted.items(), key=lambda entry: (-entry[1], entry[0]))[:VOCABULARY])
    figures: dict[str, list[dict[str, float]]] = {}
    for domain, pieces in found:
        own = _sum(pieces)
        rest = max(counted.total() - own.total(), 1)
        for piece in pieces:
            if piece.total() >= min_words:
                figures.setdefault(domain, []).append(_without(piece, own, known, rest))
    return Anchor(
        measure="prior",
        model=_table_digest(known),
        tokenizer=WORDS,
        passage_words=passage_words,
        documents=with_all(Counter(domain for domain, _ in found)),
        passages=with_all({domain: len(some) for domain, some in figures.items()}),
        quantiles=grids(figures),
        words=known,
        total=counted.total(),
    )


def _sum(counts: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return total


def _without(piece: Counter[str], own: Counter[str], known: Mapping[str, int], rest: int) -> dict[str, float]:
    """Figures of a passage under the counts of all text but its own document, which is `rest` words."""
    logs: list[float] = []
    for word, count in piece.items():
        logs += [math.log(max(known.get(word, 0) - own[word], _UNSEEN) / rest)] * count
    return _spread(logs)


def _spread(logs: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation, independent of the order (`fsum` rounds once)."""
    mean = math.fsum(logs) / len(logs)
    variance = math.fsum((value - mean) ** 2 for value in logs) / len(logs)
    return {"prior.mean": mean, "prior.std": math.sqrt(variance)}


def _table_digest(words: Mapping[str, int]) -> str:
    text = json.dumps(sorted(words.items()), ensure_ascii=False)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


# --- perplexity --------------------------------------------------------------------------------------------------


class Perplexity:
    """Rejects texts that a reference model finds too improbable, or suspiciously probable."""

    name = "perplexity"

    def __init__(
        self, scorer: Scorer | Perplexities, config: PerplexityFilter | None = None, *, anchor: Anchor | None = None
    ) -> None:
        """Without `anchor`, the config's absolute bounds alone hold.

        Raises:
            ConfigError: there is neither bound nor anchor; or the anchor text is too small for the tails.
            DataError: the anchor was measured by another model or tokenizer.
        """
        self.config = config or PerplexityFilter()
        self._scorer = scorer
        self._bounds = _Bounds(anchor, self.config.low, self.config.high)
        if anchor is not None:
            _check_same(anchor, scorer)
            anchor.check_levels(self.config.low, self.config.high)
        elif self.config.min_perplexity is None and self.config.max_perplexity is None:
            raise ConfigError(
                "perplexity: there is no bound; name the file with the anchor text's quantiles as `reference`, or set "
                "max_perplexity"
            )

    def judge(self, item: Item) -> Verdict:
        return self.judge_many([item])[0]

    def judge_many(self, items: Sequence[Item]) -> list[Verdict]:
        """The same verdicts as one by one; the scorer is asked once for all of them."""
        texts = [Text.of(item) for item in items]
        asked = [text for text in texts if text.size >= self.config.min_words]
        scores = iter(self._scorer([text.raw for text in asked]) if asked else ())
        return [
            self._verdict(text, float(next(scores))) if text.size >= self.config.min_words else Verdict("pass")
            for text in texts
        ]

    def _verdict(self, text: Text, value: float) -> Verdict:
        if not math.isfinite(value):
            return verdict(self.name, "not finite", {})
        finding = None
        if self.config.max_perplexity is not None and value > self.config.max_perplexity:
            finding = "too high"
        elif self.config.min_perplexity is not None and value < self.config.min_perplexity:
            finding = "too low"
        finding = finding or self._bounds.finding(text.domain, {"perplexity": value})
        return verdict(self.name, finding, {"perplexity": value})


def freeze_perplexity(
    documents: Documents, scorer: Scorer, *, passage_words: int = PASSAGE_WORDS, min_words: int = 20
) -> Anchor:
    """Quantiles of the perplexity of anchor passages, each scored alone; those under `min_words` words are left out."""
    figures: dict[str, list[dict[str, float]]] = {}
    sizes: Counter[str] = Counter()
    waiting: list[tuple[str, str]] = []

    def score() -> None:
        values = scorer([text for _, text in waiting]) if waiting else ()
        for (domain, _), value in zip(waiting, values, strict=True):
            figures.setdefault(domain, []).append({"perplexity": float(value)})
        waiting.clear()

    for domain, text in documents:
        sizes[domain] += 1
        waiting += [(domain, one) for one in passages(text, passage_words) if len(words_of(one)) >= min_words]
        if len(waiting) >= _SCORED_AT_ONCE:
            score()
    score()
    return Anchor(
        measure="perplexity",
        model=scorer.fingerprint,
        tokenizer=scorer.tokenizer,
        passage_words=passage_words,
        documents=with_all(sizes),
        passages=with_all({domain: len(some) for domain, some in figures.items()}),
        quantiles=grids(figures),
    )


def _check_same(anchor: Anchor, scorer: Scorer | Perplexities) -> None:
    found = getattr(scorer, "fingerprint", None), getattr(scorer, "tokenizer", None)
    if anchor.measure != "perplexity" or found != (anchor.model, anchor.tokenizer):
        raise DataError(
            f"the anchor holds {anchor.measure} by model {anchor.model}, tokenizer {anchor.tokenizer}; this one is "
            f"{found[0]}, {found[1]}, whose figures do not compare; score with that model, or freeze the quantiles "
            f"with this one"
        )


# --- both --------------------------------------------------------------------------------------------------------


class _Bounds:
    """Lower and upper bound of each figure in each domain."""

    def __init__(self, anchor: Anchor | None, low: float | None, high: float | None) -> None:
        self._anchor = anchor
        self._of: dict[str, dict[str, tuple[float | None, float | None]]] = {}
        if anchor is not None:
            for domain, grid in anchor.quantiles.items():
                bounds = {name: (anchor.bound(domain, name, low), anchor.bound(domain, name, high)) for name in grid}
                self._of[domain] = bounds

    def finding(self, domain: str, figures: Mapping[str, float]) -> str | None:
        """The first figure outside its bounds, in words."""
        if self._anchor is None:
            return None
        bounds = self._of[self._anchor.domain(domain)]
        for name, value in figures.items():
            low, high = bounds[name]
            what = name.partition(".")[2]
            if low is not None and value < low:
                return f"{what} below the anchor's".strip()
            if high is not None and value > high:
                return f"{what} above the anchor's".strip()
        return None


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}


def judge_together(some: object, texts: Iterable[Text]) -> list[Verdict]:
    """Verdicts of a filter, all at once if it can."""
    texts = list(texts)
    many = getattr(some, "judge_many", None)
    return many(texts) if many is not None else [some.judge(text) for text in texts]  # type: ignore[attr-defined]
