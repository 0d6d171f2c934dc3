"""Prior and perplexity: labelled texts, frozen quantiles, and verdicts that depend on row and file alone.

The anchor is real text that every Python carries: the topics of its `help()`, prose about the language.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from pydantic import ValidationError

from nexus_ray.config.filters import FiltersConfig, PerplexityFilter, PriorFilter, SafetyFilter
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.filters import QualityFilter, build_chain
from nexus_ray.synthesis.filters.anchor import ALL, STEPS, Anchor, frozen, load_anchor, passages, save_anchor
from nexus_ray.synthesis.filters.chain import references, remembering_chain
from nexus_ray.synthesis.filters.likelihood import Perplexity, Prior, freeze_perplexity, freeze_prior
from nexus_ray.synthesis.filters.text import Text
from nexus_ray.synthesis.rows import Prompt, Row
from tests.unit.synthesis.filters.samples import STORY, random_words

PIECES = [piece for text in topics.values() for piece in passages(text, 120) if len(Text(piece).words) >= 60]
random.Random(0).shuffle(PIECES)
LEARNT, SEEN, HELD_OUT = PIECES[::3], PIECES[1::3], PIECES[2::3]
"""Passages dealt out at random: what the letter model learns from, the rest of the anchor, and unseen text."""
ANCHOR = [("manual", piece) for piece in [*LEARNT, *SEEN]]
FRENCH = (
    "Il était une fois une petite fille de village, la plus jolie qu'on eût su voir. Sa mère en était folle, et sa "
    "grand-mère plus folle encore. Cette bonne femme lui fit faire un petit chaperon rouge, qui lui seyait si bien que "
    "partout on l'appelait le petit chaperon rouge."
)
NOISE = " ".join(random_words(1, 80))
COMMON = "the of the a to the is in the of " * 8
ODD = [
    (FRENCH, "mean below the anchor's"),
    (NOISE, "mean below the anchor's"),
    (COMMON, "mean above the anchor's"),
    ("the statement " * 40, "above the anchor's"),
]


class Letters:
    """A language model that needs no weights: letter pairs counted in a text; it counts what it is asked."""

    tokenizer = "letters"

    def __init__(self, text: str, fingerprint: str = "pairs of letters") -> None:
        self.fingerprint = fingerprint
        self.calls: list[int] = []
        self._pairs, self._letters = Counter(pairwise(text)), Counter(text)

    def __call__(self, texts: Sequence[str]) -> list[float]:
        self.calls.append(len(texts))
        return [self._perplexity(text) for text in texts]

    def _perplexity(self, text: str) -> float:
        bits = [math.log((self._pairs[a, b] + 0.1) / (self._letters[a] + 20.0)) for a, b in pairwise(text)]
        return math.exp(-math.fsum(bits) / len(bits)) if bits else math.nan


@pytest.fixture(scope="module")
def prior() -> Anchor:
    return freeze_prior(ANCHOR, passage_words=120)


@pytest.fixture(scope="module")
def scorer() -> Letters:
    return Letters("".join(LEARNT))


@pytest.fixture(scope="module")
def perplexity(scorer: Letters) -> Anchor:
    return freeze_perplexity([("manual", text) for text in SEEN], scorer, passage_words=120)


def row(text: str, domain: str) -> Row:
    return Row(text, "r", 0, Prompt("ask"), domain=domain)


# --- the prior ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "finding"), ODD)
def test_odd_texts_are_rejected(prior: Anchor, text: str, finding: str) -> None:
    verdict = Prior(prior).judge(text)
    assert verdict.reason.startswith("prior: ") and finding in verdict.reason
    assert set(verdict.scores) == {"prior.mean", "prior.std"}


def test_real_text_passes_as_often_as_the_levels_say(prior: Anchor) -> None:
    """Tails of 2 % on both sides of two figures reject about 8 %."""
    rejected = sum(Prior(prior).judge(text).outcome == "reject" for text in HELD_OUT)
    assert len(HELD_OUT) > 150 and 0.02 < rejected / len(HELD_OUT) < 0.13
    wide = Prior(prior, PriorFilter(low=0.005, high=0.995))
    assert sum(wide.judge(text).outcome == "reject" for text in HELD_OUT) < rejected


def test_a_document_is_measured_without_itself() -> None:
    """A word that one document alone uses is as strange there as in a new text."""
    documents = [("d", f"{'the cat sat on the mat and ' * 20} {f'name{n} ' * (10 + n % 21)}") for n in range(60)]
    anchor = freeze_prior(documents, passage_words=500)
    some = Prior(anchor)
    assert some.judge(documents[8][1].replace("name8", "another")).outcome == "pass"
    assert some.judge(documents[8][1].replace("name8", "cat")).outcome == "reject"
    assert anchor.documents == {"d": 60, ALL: 60} and anchor.passages == anchor.documents


def test_short_texts_pass(prior: Anchor) -> None:
    assert Prior(prior).judge(" ".join(NOISE.split()[:19])).scores == {}
    assert Prior(prior).judge(" ".join(NOISE.split()[:20])).outcome == "reject"


def test_bounds_are_of_the_domain() -> None:
    """Stories are strange among manuals and the other way round; an unknown domain is held against both together."""
    rng = random.Random(0)
    words = STORY.split()
    stories = [("stories", " ".join(rng.choices(words, k=100))) for _ in range(100)]
    anchor = freeze_prior([*stories, *ANCHOR], passage_words=100)
    some = Prior(anchor)
    probes = [" ".join(rng.choices(words, k=100)) for _ in range(50)]
    rejected = {
        name: sum(some.judge(row(probe, name)).outcome == "reject" for probe in probes)
        for name in ("stories", "manual")
    }
    assert rejected["stories"] <= 10 and rejected["manual"] >= 45
    assert all(some.judge(row(probe, "other")) == some.judge(probe) for probe in probes)
    assert anchor.passages[ALL] == anchor.passages["stories"] + anchor.passages["manual"]


# --- perplexity --------------------------------------------------------------------------------------------------


def test_both_tails_of_perplexity(perplexity: Anchor, scorer: Letters) -> None:
    some = Perplexity(scorer, anchor=perplexity)
    assert some.judge(FRENCH).reason == "perplexity: above the anchor's"
    assert some.judge(COMMON).reason == "perplexity: below the anchor's"
    rejected = sum(some.judge(text).outcome == "reject" for text in HELD_OUT)
    assert 0.02 < rejected / len(HELD_OUT) < 0.18  # tails of 5 % each
    one_sided = Perplexity(scorer, PerplexityFilter(low=None), anchor=perplexity)
    assert one_sided.judge(COMMON).outcome == "pass"


def test_absolute_bounds(perplexity: Anchor, scorer: Letters) -> None:
    value = scorer([STORY])[0]
    above, below = PerplexityFilter(max_perplexity=value - 0.1), PerplexityFilter(min_perplexity=value + 0.1)
    assert Perplexity(scorer, above).judge(STORY).reason == "perplexity: too high"
    assert Perplexity(scorer, below).judge(STORY).reason == "perplexity: too low"
    inside = PerplexityFilter(max_perplexity=value)
    assert Perplexity(scorer, inside).judge(STORY).scores == {"perplexity": value}
    both = PerplexityFilter(max_perplexity=1e9)
    assert Perplexity(scorer, both, anchor=perplexity).judge(FRENCH).reason == "perplexity: above the anchor's"
    assert Perplexity(lambda texts: [math.nan], above).judge(STORY).reason == "perplexity: not finite"


def test_verdicts_do_not_depend_on_neighbours(perplexity: Anchor, scorer: Letters) -> None:
    """Any order, any batch, one by one: the same verdicts; the scorer is asked once for a batch."""
    chain = build_chain(
        FiltersConfig.model_validate({**dict.fromkeys(FiltersConfig.model_fields), "length": {}, "perplexity": {}}),
        perplexity=perplexity,
        scorer=scorer,
    )
    texts = [*HELD_OUT[:30], FRENCH, "Too short.", NOISE, COMMON]
    alone = [chain.judge(text) for text in texts]
    scorer.calls.clear()
    assert chain.judge_many(texts) == alone
    assert scorer.calls == [len(texts) - 1]  # the short one was rejected before
    assert chain.judge_many(texts[::-1]) == alone[::-1]
    assert {verdict.outcome for verdict in alone} == {"pass", "reject"}
    assert chain.judge_many([]) == []


def test_quality_filter_takes_a_scorer(scorer: Letters) -> None:
    limit = scorer([STORY])[0] + 1.0
    quality = QualityFilter(min_length=10, max_perplexity=limit, diversity_threshold=0.3, perplexity=scorer)
    assert quality.passes(STORY)
    assert quality.judge(NOISE).reason == "perplexity: too high"


# --- the file ----------------------------------------------------------------------------------------------------


def test_file_keeps_everything(tmp_path: Path, prior: Anchor, perplexity: Anchor) -> None:
    storage = Storage(str(tmp_path))
    for anchor in (prior, perplexity):
        save_anchor(anchor, storage, "a", f"{anchor.measure}.json")
        loaded = load_anchor(storage, "a", f"{anchor.measure}.json", measure=anchor.measure)
        assert loaded == replace(anchor) and loaded.fingerprint == anchor.fingerprint
    data = json.loads((tmp_path / "a" / "perplexity.json").read_text())
    assert data["model"] == "pairs of letters" and data["tokenizer"] == "letters"
    assert (
        data["documents"] == {"manual": len(SEEN), "": len(SEEN)}
        and len(data["quantiles"][""]["perplexity"]) == STEPS + 1
    )
    assert Prior(load_anchor(storage, "a", "prior.json", measure="prior")).judge(FRENCH) == Prior(prior).judge(FRENCH)


def test_quantiles_are_those_of_the_passages(perplexity: Anchor, scorer: Letters) -> None:
    pieces = [one for text in SEEN for one in passages(text, 120)]
    values = scorer(pieces)
    assert perplexity.passages["manual"] == len(pieces)
    assert perplexity.bound("manual", "perplexity", 0.05) == pytest.approx(float(np.quantile(values, 0.05)), rel=1e-12)
    assert perplexity.bound("", "perplexity", 1.0) == max(values) and perplexity.bound("", "perplexity", None) is None
    left, between, right = (perplexity.bound("", "perplexity", level) for level in (0.05, 0.0525, 0.055))
    assert left is not None and right is not None and between == pytest.approx((left + right) / 2)


def test_frozen_once(tmp_path: Path, prior: Anchor) -> None:
    """Other rows, another time: the first file stays."""
    storage, made = Storage(str(tmp_path)), []

    def make() -> Anchor:
        made.append(1)
        return prior

    first = frozen(storage, "prior.json", measure="prior", make=make)
    assert frozen(storage, "prior.json", measure="prior", make=make) == first and made == [1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be used"),
        (lambda text: text.replace('"total": ', '"total": 1'), "its fingerprint is not that of its content"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "fingerprint"),
        (lambda text: "[]", "cannot be used"),
        (lambda text: text.replace('"model"', '"modell"'), "cannot be used"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, prior: Anchor, damage: object, message: str) -> None:
    storage = Storage(str(tmp_path))
    save_anchor(prior, storage, "prior.json")
    storage.write_text(damage(storage.read_text("prior.json")), "prior.json")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        load_anchor(storage, "prior.json", measure="prior")


def test_what_does_not_fit_is_refused(tmp_path: Path, prior: Anchor, perplexity: Anchor, scorer: Letters) -> None:
    storage = Storage(str(tmp_path))
    save_anchor(prior, storage, "prior.json")
    with pytest.raises(DataError, match="holds quantiles of prior, not of perplexity"):
        load_anchor(storage, "prior.json", measure="perplexity")
    with pytest.raises(DataError, match="is not there"):
        load_anchor(storage, "none.json", measure="prior")
    with pytest.raises(DataError, match="whose figures do not compare"):
        Perplexity(Letters("abc", "another"), anchor=perplexity)
    with pytest.raises(DataError, match="whose figures do not compare"):
        Perplexity(lambda texts: [1.0], anchor=perplexity)
    with pytest.raises(DataError, match="freeze the prior again"):
        Prior(perplexity)
    with pytest.raises(ConfigError, match="there is no bound"):
        Perplexity(scorer)
    with pytest.raises(ConfigError, match=r"too few for tails of 0\.0001, which need 10000"):
        Prior(prior, PriorFilter(low=0.0001))
    with pytest.raises(DataError, match="no passage long enough"):
        freeze_prior([("d", "too short")])
    with pytest.raises(DataError, match="1 passages is no finite number"):
        freeze_perplexity([("d", STORY)], Broken())


class Broken:
    fingerprint = tokenizer = "broken"

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return [math.nan] * len(texts)


# --- in the chain ------------------------------------------------------------------------------------------------


def test_place_in_the_chain(tmp_path: Path, prior: Anchor, perplexity: Anchor, scorer: Letters) -> None:
    storage = Storage(str(tmp_path))
    save_anchor(prior, storage, "prior.json")
    save_anchor(perplexity, storage, "perplexity.json")
    config = FiltersConfig.model_validate(
        {
            "prior": {"reference": f"{tmp_path}/prior.json"},
            "perplexity": {"reference": f"{tmp_path}/perplexity.json"},
        }
    )
    asking = {"max_classifier": 0.5, "classifier": {"model": "m", "unsafe": ["toxic"]}}
    safe = config.model_copy(update={"safety": SafetyFilter.model_validate(asking)})
    chain = build_chain(safe, scorer=scorer, classifier=lambda texts: [0.0] * len(texts))
    assert chain.cheap[-1].name == "prior" and [some.name for some in chain.costly] == [
        "safety_classifier",
        "perplexity",
    ]
    assert references(config) == {"prior": prior.fingerprint, "perplexity": perplexity.fingerprint}
    alone = remembering_chain(config)  # needs neither file nor model
    assert not alone.cheap and not alone.costly and len(alone.remembering) == 4
    scorer.calls.clear()
    assert chain.judge(NOISE).outcome == "reject" and scorer.calls == []  # the prior was enough


def test_chain_says_what_it_lacks(scorer: Letters) -> None:
    with pytest.raises(ConfigError, match=r"filters\.prior\.reference=null"):
        build_chain(FiltersConfig.model_validate({"prior": {}}))
    with pytest.raises(ConfigError, match=r"filters\.perplexity\.reference=null"):
        build_chain(FiltersConfig.model_validate({"perplexity": {}}), scorer=scorer)
    with pytest.raises(ConfigError, match="a model must measure it"):
        build_chain(FiltersConfig.model_validate({"perplexity": {"max_perplexity": 50.0}}))
    assert build_chain(FiltersConfig.model_validate({"perplexity": {"max_perplexity": 50.0}}), scorer=scorer).costly


@pytest.mark.parametrize(
    ("section", "data", "message"),
    [
        ("prior", {"low": 0.9, "high": 0.1}, "low=0.9 is not less than high=0.1"),
        ("perplexity", {"min_perplexity": 9.0, "max_perplexity": 3.0}, "min_perplexity=9.0 is not less"),
        ("perplexity", {"max_perplexity": 0.5}, "greater than or equal to 1"),
    ],
)
def test_config_faults(section: str, data: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        FiltersConfig.model_validate({section: data})
    assert message in str(caught.value)


def test_passages() -> None:
    assert list(passages("a b\nc  d e", 2)) == ["a b", "c  d"]
    assert list(passages("a b", 5)) == ["a b"] and list(passages("", 5)) == []
