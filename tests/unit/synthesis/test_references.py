"""Quantiles frozen from a job's anchor domain: made once, shared, part of what a ledger is bound to."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus_ray.config.filters import FiltersConfig
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.filters.chain import build_chain, references
from nexus_ray.synthesis.references import reference_scorer, with_references
from tests.corpus import WORDS
from tests.tiny import tiny_model, tiny_tokenizer


def documents() -> list[tuple[str, str]]:
    chosen = random.Random(0)
    return [(f"{number:04}", " ".join(chosen.choices(WORDS, k=60))) for number in range(120)]


class Texts:
    """Documents, and how often they were read."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> Iterator[tuple[str, str]]:
        self.reads += 1
        return iter(documents())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    tiny_model().save_pretrained(place)
    shutil.copytree(tiny_tokenizer(tmp_path / "tokenizer"), place, dirs_exist_ok=True)
    return place


def test_prior_and_perplexity_are_frozen_once_and_then_judge(tmp_path: Path, model: Path) -> None:
    perplexity = {"model": str(model), "max_tokens": 64}
    filters = FiltersConfig.model_validate({"prior": {}, "perplexity": perplexity, "language": None})
    texts, shared = Texts(), Storage(str(tmp_path / "anchors"))
    first = with_references(filters, anchor="real", texts=texts, fingerprint="f", shared=shared)
    assert texts.reads == 2 and len([name for name in shared.list() if name.endswith(".json")]) == 2
    again = with_references(filters, anchor="real", texts=texts, fingerprint="f", shared=shared)
    assert again == first and texts.reads == 2
    other = with_references(filters, anchor="real", texts=texts, fingerprint="g", shared=shared)
    assert other != first and texts.reads == 4
    assert set(references(first)) == {"prior", "perplexity"}
    chain = build_chain(first, scorer=reference_scorer(first))
    real = [chain.judge(text) for _, text in documents()[:20]]
    odd = chain.judge(" ".join(f"zq{number}x" for number in range(60)))
    assert sum(verdict.outcome == "pass" for verdict in real) > 10
    assert odd.outcome == "reject" and odd.reason.startswith("prior")


def test_what_is_missing_is_named(tmp_path: Path, model: Path) -> None:
    shared = Storage(str(tmp_path / "anchors"))
    for section, message in (
        ({"prior": {}}, "filters.prior is held against real text, and no domain of it is named; set `anchor`"),
        ({"perplexity": {"model": str(model), "max_tokens": 64}}, "filters.perplexity is held against real text"),
        ({"perplexity": {}}, "filters.perplexity.model is missing"),
    ):
        filters = FiltersConfig.model_validate(section)
        with pytest.raises(ConfigError, match=message):
            with_references(filters, anchor=None, texts=Texts(), fingerprint="", shared=shared)
    bounds = FiltersConfig.model_validate({"perplexity": {"model": str(model), "max_perplexity": 1e6}})
    assert with_references(bounds, anchor=None, texts=Texts(), fingerprint="", shared=shared) == bounds
