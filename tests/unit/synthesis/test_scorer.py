"""A text's perplexity is a function of the text: the same bits in any batch; and what it should be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from nexus_ray.config.filters import PerplexityFilter
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.filters.likelihood import Perplexity, freeze_perplexity
from nexus_ray.synthesis.scorer import ModelScorer, model_scorer
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.synthesis.filters.samples import ESSAY, STORY, random_words

TEXTS = [STORY, ESSAY, "To be, or not to be.", *(" ".join(random_words(seed, 5 + seed)) for seed in range(12))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return tiny_tokenizer(folder)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ModelScorer:
    return model_scorer(PerplexityFilter(model=str(folder), max_tokens=96))


def test_same_bits_in_any_batch(scorer: ModelScorer) -> None:
    alone = [scorer([text])[0] for text in TEXTS]
    assert scorer(TEXTS) == alone
    assert scorer(TEXTS[::-1]) == alone[::-1]
    assert scorer([TEXTS[2]] * 9 + [STORY]) == [alone[2]] * 9 + [alone[0]]
    assert len(set(alone)) == len(alone)


def test_same_bits_in_another_copy(folder: Path, scorer: ModelScorer) -> None:
    again = model_scorer(PerplexityFilter(model=str(folder), max_tokens=96))
    assert again(TEXTS) == scorer(TEXTS)
    assert (again.fingerprint, again.tokenizer) == (scorer.fingerprint, scorer.tokenizer)
    other = model_scorer(PerplexityFilter(model=str(folder), max_tokens=64))
    assert other.fingerprint != scorer.fingerprint and other([STORY]) != scorer([STORY])


def test_perplexity_is_what_the_model_says(folder: Path, scorer: ModelScorer) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXTS[2], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = math.exp(model(input_ids=ids, labels=ids).loss.item())
    assert scorer([TEXTS[2]])[0] == pytest.approx(expected, rel=1e-5)


def test_too_short_is_no_number(scorer: ModelScorer) -> None:
    assert all(map(math.isnan, scorer(["", "a"])))


def test_as_a_filter(scorer: ModelScorer) -> None:
    real = [" ".join(random_words(seed, 60)) for seed in range(40)]
    anchor = freeze_perplexity([("d", text) for text in real], scorer)
    assert anchor.model == scorer.fingerprint and anchor.passages["d"] == 40
    some = Perplexity(scorer, PerplexityFilter(low=0.4, high=0.6), anchor=anchor)
    verdicts = some.judge_many(real)
    assert verdicts == [some.judge(text) for text in real]
    assert sum(verdict.outcome == "pass" for verdict in verdicts) == 8


def test_faults(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"filters\.perplexity\.model=null"):
        model_scorer(PerplexityFilter())
    with pytest.raises(ConfigError, match="exceeds the 128 tokens"):
        model_scorer(PerplexityFilter(model=str(folder)))
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"filters\.perplexity\.model=.*no tokenizer"):
        model_scorer(PerplexityFilter(model=str(tmp_path), max_tokens=96))
