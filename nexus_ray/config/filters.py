"""What a generated row must be to count: one section per filter of `filters`; `null` turns a filter off.

Numbers without another source are those of the survey behind this project (public pipelines' defaults).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from nexus_ray.config.methods import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Action = Literal["reject", "flag"]
Language = Literal["en", "fr", "es", "de", "it", "pt", "nl", "code"]
Script = Literal[
    "latin", "greek", "cyrillic", "armenian", "hebrew", "arabic", "devanagari", "thai", "hangul", "kana", "han"
]
PersonalKind = Literal["email", "phone", "iban", "card", "ip", "ssn", "secret"]
Form = Literal["any", "required", "forbidden"]


class LengthFilter(Section):
    """How long a text is. Self-Instruct's range for instructions is 4-150 words; Gopher's for web pages 50-100,000."""

    min_words: int = Field(4, ge=0)
    max_words: int | None = Field(None, ge=1)
    min_chars: int = Field(0, ge=0)
    max_chars: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for unit in ("words", "chars"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if most is not None and most < least:
                raise ValueError(f"max_{unit}={most} is less than min_{unit}={least}; no text has both; raise it")
        return self


class FinishFilter(Section):
    """Why the model stopped writing."""

    allow: list[Literal["stop", "length", "content_filter", "other"]] = Field(["stop"], min_length=1)
    """`length` lets texts cut off at `max_tokens` through: right for continuations, wrong for answers."""


class FormatFilter(Section):
    """The shape a text must have."""

    required: list[str] = Field(default_factory=list)
    """Regular expressions, each found at least once."""
    forbidden: list[str] = Field(default_factory=list)
    """Regular expressions, none found."""
    json_text: Form = "any"
    """Whether the whole text is one JSON value, a code fence around it aside."""
    json_keys: list[str] = Field(default_factory=list)
    """Keys of that value, an object; needs `json_text: required`."""
    tags: list[str] = Field(default_factory=list)
    """Names of tags (`answer` for `<answer>...</answer>`), each once, closed, not empty."""
    stray_tags: Form = "any"
    """HTML or XML tags other than those in `tags`; `required` makes no sense here."""
    markdown: Form = "any"
    """Headings, lists, emphasis, tables, links or code fences."""
    assistant_phrases: Literal["any", "forbidden"] = "forbidden"
    """Chat manners around the text asked for: `Sure! Here is`, `As an AI language model`, `I cannot help with`."""

    @field_validator("required", "forbidden")
    @classmethod
    def _compiles(cls, patterns: list[str]) -> list[str]:
        for place, pattern in enumerate(patterns):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"[{place}]={pattern!r} is no regular expression ({error}); correct it") from None
        return patterns

    @field_validator("tags")
    @classmethod
    def _names(cls, tags: list[str]) -> list[str]:
        for place, tag in enumerate(tags):
            if not re.fullmatch(r"[A-Za-z][\w.:-]*", tag):
                raise ValueError(f"[{place}]={tag!r} is no name of a tag; write it without brackets, such as `answer`")
        return tags

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.json_keys and self.json_text != "required":
            raise ValueError(f"json_keys={self.json_keys} needs json_text: required, not {self.json_text}; set it")
        if self.stray_tags == "required":
            raise ValueError("stray_tags=required asks for faults; name the wanted tags in `tags` instead")
        return self


class CharsetFilter(Section):
    """Which characters a text is made of."""

    scripts: list[Script] = Field(["latin"], min_length=1)
    max_foreign: Share = 0.05
    """Most letters of other scripts, as a share of all letters (a Greek formula is no Greek text)."""
    max_broken: int = Field(0, ge=0)
    """Most control, replacement and private characters, and pairs that wrong decoding leaves behind."""


class LanguageFilter(Section):
    """The language a text is written in, told by function words and letter triples; scripts are `charset`'s."""

    allow: list[Language] = Field(["en"], min_length=1)
    min_confidence: Share = 0.65
    """Least share of the evidence for an allowed language (datatrove's LanguageFilter has 0.65)."""
    min_words: int = Field(10, ge=1)
    """Shorter texts pass: they say too little."""


class RepetitionFilter(Section):
    """Repetition inside a text: Gopher's numbers (Rae et al. 2021, arXiv:2112.11446, table A1), of characters."""

    lines: Share = 0.30
    """Repeated lines, as a share of lines."""
    line_chars: Share = 0.20
    paragraphs: Share = 0.30
    """Repeated paragraphs, as a share of paragraphs."""
    paragraph_chars: Share = 0.20
    top_2gram: Share = 0.20
    top_3gram: Share = 0.18
    top_4gram: Share = 0.16
    duplicate_5gram: Share = 0.15
    duplicate_6gram: Share = 0.14
    duplicate_7gram: Share = 0.13
    duplicate_8gram: Share = 0.12
    duplicate_9gram: Share = 0.11
    duplicate_10gram: Share = 0.10
    short_words: int = Field(50, ge=0)
    """Gopher's numbers are for documents of at least so many words; below, one sentence said twice already exceeds."""
    short_share: Share = 0.30
    """The limit for every `top_*` and `duplicate_*` in such short texts."""


class PersonalFilter(Section):
    """Personal data and secrets, by pattern and checksum."""

    kinds: list[PersonalKind] = Field(["email", "phone", "iban", "card", "ip", "ssn", "secret"], min_length=1)
    action: Literal["reject", "flag", "mask"] = "reject"
    """`mask` puts `[EMAIL]` and the like in their place before the other filters look."""


class SafetyModel(Section):
    """A Hugging Face text classifier that tells harmful text; loaded without code of its own."""

    model: str = Field(min_length=1)
    """Folder or Hugging Face id."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    unsafe: list[str] = Field(min_length=1)
    """Its labels that count as harmful. Where labels exclude each other their probabilities are added; where each
    stands alone the highest counts."""
    max_tokens: int = Field(512, ge=8)
    """Tokens judged at once; a longer text is judged in pieces of so many, and the worst of them counts."""
    batch_size: int = Field(16, ge=1)
    """Pieces judged together: of the rows of one answer, so that a figure never depends on timing."""
    device: Literal["cpu", "cuda"] = "cpu"
    """`cuda` needs a share of a GPU in `gpus_per_worker`."""


class SafetyFilter(Section):
    """Words that a training text should not hold; a classifier can stand beside them."""

    action: Action = "reject"
    max_mild: Share = 0.02
    """Most mild or ambiguous words (damn, ass), as a share of words; strong ones are never allowed."""
    extra_words: list[str] = Field(default_factory=list)
    """More words or phrases that are never allowed."""
    allow_words: list[str] = Field(default_factory=list)
    """Words of the built-in list that are all right here."""
    classifier: SafetyModel | None = None
    """Asked about rows that nothing cheaper rejected."""
    max_classifier: Share | None = None
    """Most that the classifier may give (0 harmless, 1 harmful)."""

    @model_validator(mode="after")
    def _has_both(self) -> Self:
        if self.max_classifier is not None and self.classifier is None:
            raise ValueError(
                f"max_classifier={self.max_classifier} needs a model to measure it; name one as classifier.model, with "
                f"its labels in classifier.unsafe, or drop max_classifier"
            )
        if self.max_classifier is None and self.classifier is not None:
            raise ValueError(
                f"classifier.model={self.classifier.model} rejects nothing without a limit; set max_classifier, or "
                f"drop classifier"
            )
        return self


class _AnchoredFilter(Section):
    """Both tails of a figure, cut at quantiles of real text that were computed once and written down beforehand."""

    reference: str | None = None
    """Path or URI of the file with the quantiles; None: they are handed in."""
    low: Share | None = 0.05
    """Share of real passages below the lower bound (templates, repetition, memorised text); None: no such bound."""
    high: Share | None = 0.95
    """Share of real passages below the upper bound (noise, other languages, formulas); None: no such bound."""
    min_words: int = Field(20, ge=1)
    """Shorter texts pass: their figures scatter more than those of the passages."""

    @model_validator(mode="after")
    def _is_range(self) -> Self:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low={self.low} is not less than high={self.high}; no text lies between; lower it")
        return self


class PriorFilter(_AnchoredFilter):
    """How common a text's words are in real text: mean and deviation of their log frequency; no model is needed.

    As good as perplexity by a model for choosing text, a thousand times cheaper (arXiv:2509.18577).
    """

    low: Share | None = 0.02
    high: Share | None = 0.98


class PerplexityFilter(_AnchoredFilter):
    """Perplexity per token under a frozen reference model, which must not be the model that is trained.

    The generator may be it, but finds its own text more plausible than another model would.
    """

    min_perplexity: float | None = Field(None, ge=1.0)
    """A bound beside the quantiles', whatever the domain."""
    max_perplexity: float | None = Field(None, ge=1.0)
    model: str | None = None
    """Folder or Hugging Face id of the reference model, other than `model.source` and `model.init_from`; None: what
    measures is handed in."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_tokens: int = Field(512, ge=2)
    """Tokens of a text that are scored, from its beginning."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        least, most = self.min_perplexity, self.max_perplexity
        if least is not None and most is not None and least >= most:
            raise ValueError(f"min_perplexity={least} is not less than max_perplexity={most}; no text lies between")
        return self


class ExactFilter(Section):
    """Texts equal to an accepted one but for case, white space and Unicode form."""


class NearFilter(Section):
    """Near duplicates of accepted texts: MinHash finds candidates, true Jaccard similarity decides."""

    jaccard: float = Field(0.7, gt=0.0, le=1.0)
    """Rejected from here on."""
    shingle_words: int = Field(5, ge=1, le=32)
    """Words of a shingle."""
    short_words: int = Field(40, ge=0)
    """A pair in which one text has fewer words is compared by `short_shingle_words`."""
    short_shingle_words: int = Field(3, ge=1, le=32)
    bands: int = Field(32, ge=1, le=256)
    rows: int = Field(5, ge=1, le=32)
    """A pair of similarity s is looked at with probability 1 - (1 - s^rows)^bands: 0.997 at 0.7, 0.075 at 0.3."""


class NoveltyFilter(Section):
    """The longest common subsequence of words with anything accepted or in the pool (Self-Instruct's rule)."""

    max_rouge: float = Field(0.7, gt=0.0, le=1.0)
    """Highest ROUGE-L F that passes."""
    max_words: int = Field(100, ge=1)
    """Words looked at, from the beginning; each remembered text costs about 0.1 us for every 100 of them."""


class BenchmarkText(Section):
    """Files of one benchmark, whose items rows must not hold: text, JSONL, JSON or Parquet."""

    paths: list[str] = Field(min_length=1)
    """Files, folders, glob patterns or URIs (`s3://bucket/prefix`)."""
    format: Literal["auto", "text", "jsonl", "json", "parquet"] = "auto"
    """How files are parsed; `auto` goes by the file name."""
    fields: list[str] = Field(["text"], min_length=1)
    """Fields of a record that must stay unseen (`question`, `answer`, `choices.text`), each alone and, in this order,
    together. Text, numbers and lists of them; an empty one is passed over. Not looked at in text files."""
    where: dict[str, str] = Field(default_factory=dict)
    """Keep only records whose fields equal these values."""
    split_on: str | None = None
    """Text files: regular expression at whose matches a text is cut into items."""

    @field_validator("split_on")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression ({error}); correct it") from None
        return value


class ContaminationFilter(Section):
    """Text that is also in held-out or benchmark text."""

    benchmarks: dict[str, BenchmarkText] = Field(default_factory=dict)
    """Benchmarks by name; the name is part of the reason of a rejection."""
    ngram: int = Field(13, ge=5, le=50)
    """A run of so many words in common is contamination (GPT-3, Brown et al. 2020, app. C)."""
    short_words: int = Field(8, ge=5)
    """An item shorter than `ngram`, from so many words, counts if it is there as a whole; shorter ones are ignored."""
    window: int = Field(26, ge=10, le=200)
    """Words of the passage in which light edits are looked for."""
    window_share: float = Field(0.75, gt=0.0, le=1.0)
    """Share of that passage found in the same order that is contamination."""
    item_share: float = Field(0.8, gt=0.0, le=1.0)
    """The same for an item shorter than the passage."""
    run: int = Field(10, ge=5)
    """Where so many words in a row agree, `run_share` of a short item is enough (Cosmopedia)."""
    run_share: float = Field(0.5, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.short_words > self.ngram:
            raise ValueError(f"short_words={self.short_words} exceeds ngram={self.ngram}; items between go unseen")
        return self


class DiversityFilter(Section):
    """How much of a text is new phrasing: neither said earlier in it nor in the rows accepted lately."""

    threshold: Share = 0.3
    """Least share of its runs of `ngram` words that are new."""
    ngram: int = Field(4, ge=1, le=16)
    window: int = Field(1000, ge=0)
    """Accepted rows remembered; 0 looks at the text alone."""


class FiltersConfig(Section):
    """`filters`: the chain, in the order in which it is applied."""

    length: LengthFilter | None = LengthFilter()
    finish: FinishFilter | None = FinishFilter()
    format: FormatFilter | None = FormatFilter()
    charset: CharsetFilter | None = CharsetFilter()
    language: LanguageFilter | None = LanguageFilter()
    repetition: RepetitionFilter | None = RepetitionFilter()
    personal: PersonalFilter | None = PersonalFilter()
    safety: SafetyFilter | None = SafetyFilter()
    contamination: ContaminationFilter | None = ContaminationFilter()
    prior: PriorFilter | None = None
    perplexity: PerplexityFilter | None = None
    exact: ExactFilter | None = ExactFilter()
    near: NearFilter | None = NearFilter()
    novelty: NoveltyFilter | None = NoveltyFilter()
    diversity: DiversityFilter | None = DiversityFilter()
