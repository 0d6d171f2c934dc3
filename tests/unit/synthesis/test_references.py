"""What a ledger is bound to besides settings: quantiles of a job's anchor domain, made once and shared; contents."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config.filters import FiltersConfig
from nexus_ray.config.validators import JudgeConfig
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.filters.chain import build_chain, references
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.references import reference_scorer, verdict_settings, with_references
from nexus_ray.synthesis.setup import open_job
from tests.corpus import WORDS
from tests.jobs import job_config
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


# --- contents, not names -----------------------------------------------------------------------------------------

RUBRICS = Path(__file__).resolve().parents[3] / "configs/prompts/rubrics"


def judge_in(folder: Path) -> JudgeConfig:
    shutil.copytree(RUBRICS, folder, dirs_exist_ok=True)
    return JudgeConfig(rubric=str(folder / "stories.yaml"), golden=str(folder / "stories.jsonl"))


def settings_of(judge: JudgeConfig) -> dict[str, Any]:
    return verdict_settings(FiltersConfig(), [judge])


def test_a_judge_counts_by_what_its_files_hold(tmp_path: Path) -> None:
    judge = judge_in(tmp_path / "one")
    before = settings_of(judge)
    assert before == settings_of(judge_in(tmp_path / "moved")), "where it lies decides nothing"
    assert json.loads(json.dumps(before)) == before and str(tmp_path) not in json.dumps(before)
    rubric, golden = Path(judge.rubric), Path(judge.golden)
    for file, old, new in ((rubric, "repeats itself, or", "is dull, or"), (golden, "A hungry fox", "A thin fox")):
        text = file.read_text()
        changed = text.replace(old, new) if old in text else text.replace("grandmother", "grandfather")
        assert changed != text
        file.write_text(changed)
        assert settings_of(judge) != before
        file.write_text(text)
    rubric.write_text("# another comment\n" + rubric.read_text())
    assert settings_of(judge) == before
    assert settings_of(judge.model_copy(update={"min_recall": 0.6})) != before
    assert settings_of(JudgeConfig()) != before


def test_a_reference_model_counts_by_its_weights_and_vocabulary(tmp_path: Path, model: Path) -> None:
    def settings(place: Path, **bounds: float) -> dict[str, Any]:
        section = {"model": str(place), "max_tokens": 64, "max_perplexity": 1e6, **bounds}
        return verdict_settings(FiltersConfig.model_validate({"perplexity": section}), [])

    before = settings(model)
    assert set(before["references"]) == {"perplexity.model"}
    moved = shutil.copytree(model, tmp_path / "moved")
    assert settings(moved) == before and settings(moved, max_perplexity=1e5) != before
    trained = tiny_model()
    trained.get_input_embeddings().weight.data.add_(0.5)
    trained.save_pretrained(model)
    assert settings(model) != before


def test_a_benchmark_and_quantiles_count_by_their_content(tmp_path: Path, model: Path) -> None:
    (tmp_path / "bench.txt").write_text("a question that must stay unseen by all")
    contamination = {"benchmarks": {"b": {"paths": [str(tmp_path / "bench.txt")]}}}
    section = {"model": str(model), "max_tokens": 64}
    filters = FiltersConfig.model_validate({"contamination": contamination, "perplexity": section})
    shared = Storage(str(tmp_path / "anchors"))
    ready = with_references(filters, anchor="real", texts=Texts(), fingerprint="f", shared=shared)
    found = verdict_settings(ready, [])
    assert set(found["references"]) == {"benchmarks", "perplexity"} and str(tmp_path) not in json.dumps(found)
    (tmp_path / "bench.txt").write_text("another question that must stay unseen by all")
    assert verdict_settings(ready, []) != found


def test_another_rubric_under_the_old_name_is_another_job(tmp_path: Path) -> None:
    judge = judge_in(tmp_path / "rubrics")
    section = {"kind": "openai", "model": "j", "base_url": "http://127.0.0.1:9/v1"}
    config = job_config(
        tmp_path,
        "http://127.0.0.1:9",
        judge=section,
        validators=[judge.model_dump(exclude_defaults=True) | {"kind": "judge"}],
    )
    spec = open_job(config, "sentences", {})
    Ledger(spec.ledger, spec.job).plan(spec.requests())
    Ledger(spec.ledger, open_job(config, "sentences", {}).job)
    rubric = Path(judge.rubric)
    rubric.write_text(rubric.read_text().replace("it is a whole story,", "it is a funny story,"))
    with pytest.raises(ConfigError, match="made with other settings: filters"):
        Ledger(spec.ledger, open_job(config, "sentences", {}).job)
