"""The chain as a whole: order, figures, memory in plan order; the mission's QualityFilter; the config's faults."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from nexus_ray.config.filters import FiltersConfig
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.filters import FilterChain, QualityFilter, build_chain
from nexus_ray.synthesis.filters.chain import combine
from nexus_ray.synthesis.filters.text import Item, Text
from nexus_ray.synthesis.rows import Verdict
from tests.unit.synthesis.filters.samples import CODE, ESSAY, STORY, random_words, row

NAMES = ["length", "finish", "format", "charset", "language", "repetition", "personal", "safety", "contamination"]
OFF = dict.fromkeys(FiltersConfig.model_fields)


class Recorder:
    """A costly filter that counts what it is asked."""

    name = "recorder"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def judge(self, item: Item) -> Verdict:
        self.asked.append(Text.of(item).raw)
        return Verdict("pass", "", {"recorder": 1.0})


def harmful(texts: Sequence[str]) -> list[float]:
    return [1.0] * len(texts)


def accept(chain: FilterChain, texts: list[str]) -> list[str]:
    """Reasons of rows judged in order; the accepted ones are remembered."""
    reasons = []
    for number, text in enumerate(texts):
        some = chain.clean(row(text, item=number))
        verdict = combine([chain.judge(some)])
        if verdict.outcome == "pass":
            verdict = chain.judge_in_order(some)
        if verdict.outcome == "pass":
            chain.remember(some)
        reasons.append(verdict.reason)
    return reasons


def test_default_chain() -> None:
    chain = build_chain(held_out=[("essay", ESSAY)])
    chain.show("Write a poem about the sea.")
    assert [some.name for some in chain.cheap] == NAMES
    assert [some.name for some in chain.remembering] == ["exact", "near", "novelty", "diversity"]
    texts = [
        STORY,
        STORY.upper(),
        STORY.replace("small fox", "young fox"),
        ESSAY,
        CODE,
        "Too short.",
        "Write a poem about the sea!",
        f"{STORY} Ask ann@firm.org.",
    ]
    reasons = [reason.split(" of ")[0] for reason in accept(chain, texts)]
    assert reasons == [
        "",
        "exact: as an accepted row",
        "near: 0.91",
        "contamination: 13 words in a row",
        "language: code",
        "length: too few words",
        "novelty: close to a text",
        "personal: email",
    ]


def test_first_rejection_wins_and_cheap_figures_are_kept() -> None:
    recorder = Recorder()
    chain = build_chain(extra=[recorder])
    verdict = chain.judge(row("ha ha ha ha ha ha", finish_reason="length"))
    assert verdict.reason == "finish: length"
    assert verdict.scores["repetition.top_2gram"] > 0.2 and verdict.scores["length.words"] == 6.0
    assert recorder.asked == []  # what costs is not asked about rejected rows
    assert chain.judge(STORY).scores["recorder"] == 1.0


def test_flag_and_reject() -> None:
    flag, reject = Verdict("flag", "a: x", {"a": 1.0}), Verdict("reject", "b: y", {"b": 2.0})
    assert combine([flag, Verdict("flag", "c: z")]) == Verdict("flag", "a: x", {"a": 1.0})
    assert combine([flag, reject]) == Verdict("reject", "b: y", {"a": 1.0, "b": 2.0})
    assert combine([]) == Verdict("pass")


def test_masking_comes_first() -> None:
    config = FiltersConfig.model_validate({"personal": {"action": "mask"}})
    chain = build_chain(config)
    clean = chain.clean(row(f"{STORY} Ask ann@firm.org."))
    assert clean.text.endswith("Ask [EMAIL].") and chain.judge(clean).outcome == "pass"
    assert FilterChain().clean(clean) is clean


def test_filters_can_be_turned_off() -> None:
    chain = build_chain(FiltersConfig.model_validate({**OFF, "length": {"min_words": 2}}), classifier=harmful)
    assert [some.name for some in chain.cheap] == ["length"] and not chain.costly and not chain.remembering
    model = {"max_classifier": 0.5, "classifier": {"model": "m", "unsafe": ["toxic"]}}
    asking = FiltersConfig.model_validate({"safety": model})
    assert build_chain(asking, classifier=harmful).judge(STORY).reason == "safety_classifier: harmful"
    with pytest.raises(ConfigError, match=r"filters\.safety\.classifier: it must be loaded and handed in"):
        build_chain(asking)


def test_a_text_brings_its_hashes_along() -> None:
    """A judged text from another process is to the filters that remember what it was; its words are not cut again."""
    config = FiltersConfig.model_validate({**OFF, "exact": {}, "near": {}, "novelty": {}, "diversity": {}})
    texts = [STORY, ESSAY, STORY.replace("fox", "cat"), "Only four words here."]
    for some in map(Text, texts):
        some.hashes(4)
        sent = pickle.loads(pickle.dumps(some))
        assert (sent.raw, sent.size) == (some.raw, some.size) and "words" not in vars(sent)
        assert sent.hashes(5).tolist() == Text(some.raw).hashes(5).tolist() and sent.words == some.words
    sent_row = pickle.loads(pickle.dumps(Text.of(row(STORY))))
    assert (sent_row.id, sent_row.finish_reason) == (row(STORY).id, "stop")
    one, other = build_chain(config), build_chain(config)
    for some in map(Text, texts):
        some.hashes(1)
        sent = pickle.loads(pickle.dumps(some))
        assert other.judge_in_order(sent) == one.judge_in_order(some.raw)
        one.remember(some.raw)
        other.remember(sent)


def test_verdicts_depend_on_order_alone() -> None:
    """The same rows in the same order, in a fresh chain: the same verdicts, figures included."""
    texts = [" ".join(random_words(seed % 7, 60 + seed % 3)) for seed in range(30)]

    def judged() -> list[Verdict]:
        chain = build_chain()
        result = []
        for number, text in enumerate(texts):
            result.append(chain.judge_in_order(row(text, item=number)))
            if result[-1].outcome == "pass":
                chain.remember(row(text, item=number))
        return result

    assert judged() == judged()
    assert {verdict.outcome for verdict in judged()} == {"pass", "reject"}


# --- QualityFilter -----------------------------------------------------------------------------------------------


def test_quality_filter() -> None:
    perplexities = {STORY: 20.0, ESSAY: 90.0, CODE: math.nan}
    quality = QualityFilter(
        min_length=10,
        max_perplexity=50.0,
        diversity_threshold=0.5,
        perplexity=lambda texts: [perplexities.get(text, 1.0) for text in texts],
    )
    assert quality.passes(STORY)
    assert not quality.passes(ESSAY) and quality.judge(ESSAY).reason == "perplexity: too high"
    assert quality.judge(CODE).reason == "perplexity: not finite"
    assert quality.judge("Too short.").reason == "length: too few words"
    assert quality.judge("again and again " * 20).reason == "diversity: repetitive"
    assert quality.passes(STORY)  # asking changes nothing
    quality.remember(STORY)
    assert not quality.passes(STORY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_length": -1}, "min_length=-1"),
        ({"diversity_threshold": 1.5}, "diversity_threshold=1.5"),
        ({"max_perplexity": 0.5, "perplexity": len}, "max_perplexity=0.5"),
        ({"max_perplexity": math.nan, "perplexity": len}, "max_perplexity=nan"),
        ({"max_perplexity": 50.0}, "hand in `perplexity`"),
    ],
)
def test_quality_filter_faults(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QualityFilter(**arguments)  # type: ignore[arg-type]


# --- config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        ({"length": {"min_words": 9, "max_words": 3}}, "length", "max_words=3 is less than min_words=9"),
        ({"length": {"min_word": 9}}, "length.min_word", "Extra inputs"),
        ({"format": {"required": ["ok", "("]}}, "format.required", r"[1]='(' is no regular expression"),
        ({"format": {"tags": ["<a>"]}}, "format.tags", "without brackets"),
        ({"format": {"json_keys": ["a"]}}, "format", "needs json_text: required"),
        ({"format": {"stray_tags": "required"}}, "format", "name the wanted tags"),
        ({"language": {"allow": ["xx"]}}, "language.allow.0", "Input should be"),
        ({"repetition": {"lines": 1.5}}, "repetition.lines", "less than or equal to 1"),
        ({"near": {"jaccard": 0.0}}, "near.jaccard", "greater than 0"),
        ({"contamination": {"ngram": 6}}, "contamination", "short_words=8 exceeds ngram=6"),
        ({"safety": {"max_classifier": 0.01}}, "safety", "max_classifier=0.01 needs a model to measure it"),
        ({"safety": {"classifier": {"model": "m", "unsafe": ["x"]}}}, "safety", "rejects nothing without a limit"),
        ({"safety": {"max_classifier": 0.5, "classifier": {"model": "m"}}}, "safety.classifier.unsafe", "required"),
        ({"nonsense": {}}, "nonsense", "Extra inputs"),
    ],
)
def test_config_faults_name_their_path(data: dict[str, object], path: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        FiltersConfig.model_validate(data)
    (fault,) = caught.value.errors()
    assert ".".join(map(str, fault["loc"])) == path and message in fault["msg"]


def test_defaults_are_those_of_the_sources() -> None:
    config = FiltersConfig()
    assert config.repetition and config.near and config.novelty and config.contamination and config.language
    assert (config.repetition.top_2gram, config.repetition.duplicate_10gram) == (0.2, 0.1)
    assert (config.near.jaccard, config.novelty.max_rouge, config.contamination.ngram) == (0.7, 0.7, 13)
    assert config.language.min_confidence == 0.65
