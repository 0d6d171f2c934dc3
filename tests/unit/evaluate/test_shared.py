"""Whose scores of the base model are whose: the key holds all that they depend on, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.corpora.prepare import PreparedData, PreparedDomain
from nexus_ray.errors import ConfigError, TrainingError
from nexus_ray.evaluate.shared import FILES, RESULT, base_folder, fetch
from nexus_ray.jobs import base_scores, score_ahead
from nexus_ray.storage import Storage
from nexus_ray.train.loop import StageJob
from tests.roadmaps import tiny_roadmap
from tests.shards import random_documents, write_manifest


def prepared(folder: Path, *, seed: int = 0) -> PreparedData:
    domains = {}
    for place, name in enumerate(("north", "south")):
        made = write_manifest(folder / f"{name}-{seed}", name, random_documents(8, seed=seed + place), split="held_out")
        domains[name] = PreparedDomain(name, Storage(str(folder)), made, made, None, None, "made up")
    return PreparedData(Storage(str(folder)), "tok", 320, 0, domains)


SAME: list[dict[str, Any]] = [
    {"training__learning_rate": 1.0e-3},
    {"continual__replay_ratio": 0.5},
    {"continual__use_lora": True},
    {"name": "other"},
]
OTHER: list[dict[str, Any]] = [
    {"seed": 1},  # other weights from scratch
    {"model__architecture__num_layers": 3},
    {"evaluation__max_tokens": 1000},
    {"evaluation__during_tokens": 400},
    {"evaluation__every_steps": None},
    {"training__seq_len": 16, "training__global_batch_tokens": 128},
    {"training__precision": "bf16"},
    {"cluster__num_workers": 2},
    {"continual__use_osft": True},
    {"report__temperature": 0.5},
]


@pytest.mark.parametrize("changes", [*SAME, *OTHER], ids=str)
def test_runs_share_scores_if_they_start_alike(tmp_path: Path, changes: dict[str, Any]) -> None:
    data = prepared(tmp_path)
    one, other = tiny_roadmap(tmp_path), tiny_roadmap(tmp_path, **changes)
    assert (base_folder(one, data) == base_folder(other, data)) == (changes in SAME)


def test_other_held_out_text_or_another_tokenizer_is_scored_anew(tmp_path: Path) -> None:
    config, data = tiny_roadmap(tmp_path), prepared(tmp_path)
    places = {base_folder(config, each).uri for each in (data, prepared(tmp_path, seed=5))}
    assert len(places | {base_folder(config, replace(data, tokenizer_fingerprint="x")).uri}) == 3


def test_seeds_share_the_scores_of_the_same_weights_unless_text_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexus_ray.evaluate.shared.model_fingerprint", lambda model, **named: "the same")
    data = prepared(tmp_path)
    for temperature, shares in ((0.0, True), (0.5, False)):
        seeds = (tiny_roadmap(tmp_path, seed=seed, report__temperature=temperature) for seed in (0, 1))
        assert len({base_folder(config, data).uri for config in seeds}) == (1 if shares else 2)


def test_what_was_scored_is_fetched_and_half_of_it_is_not(tmp_path: Path) -> None:
    shared, run = (Storage(str(tmp_path / name)) for name in ("shared", "run"))
    for name in FILES[:2]:
        shared.write_bytes(name.encode(), name)
    assert fetch(shared, run) is None and not run.list()
    shared.write_json({"parameters": 3}, RESULT)
    assert fetch(shared, run) == {"parameters": 3}
    assert run.list() == sorted(FILES[:2]) and run.read_bytes(FILES[0]) == FILES[0].encode()


def test_a_first_model_is_scored_once_and_one_whose_scoring_failed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fit` takes the place of the workers alone."""
    config, data, said, fits = tiny_roadmap(tmp_path, name="one"), prepared(tmp_path), [], []

    def fit(job: StageJob) -> dict[str, Any]:
        fits.append(job.run.name)
        job.hooks.folder.write_bytes(b"scores", FILES[0])  # type: ignore[attr-defined]
        if len(fits) == 1:
            raise TrainingError("a worker died")
        return {"parameters": 3}

    monkeypatch.setattr("nexus_ray.jobs.fit", fit)
    monkeypatch.setattr("nexus_ray.jobs.check_prepared", lambda data, rule, progress: data)
    study, run = (Storage(str(tmp_path / name)) for name in ("s-study", "run"))
    with monkeypatch.context() as short, pytest.raises(ConfigError, match="exceeds the 4 positions"):
        short.setattr("nexus_ray.models.build.context_length", lambda model: 4)
        score_ahead(config, data, run=study, say=said.append)
    assert not fits, "no worker starts for what is refused"
    with pytest.raises(TrainingError):
        score_ahead(config, data, run=study, say=said.append)
    assert not score_ahead(config, data, run=study, say=said.append, wanted=lambda: False)
    assert score_ahead(config, data, run=study, say=said.append)
    assert not score_ahead(config, data, run=study, say=said.append)
    found = base_scores(config, data, run=run, folder=run.child("base"), say=said.append)
    assert found == {"name": "base", "index": -1, "parameters": 3} and fits == ["s-study", "s-study"]
    assert run.child("base").read_bytes(FILES[0]) == b"scores" and "scored before" in said[-1]
