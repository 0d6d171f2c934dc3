"""Whose scores of the base model are whose: the key holds all that they depend on, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.corpora.prepare import PreparedData, PreparedDomain
from nexus_ray.evaluate.shared import FILES, base_folder, fetch, keep
from nexus_ray.storage import Storage
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


def test_what_was_kept_is_fetched_and_half_of_it_is_not(tmp_path: Path) -> None:
    shared, one, two = (Storage(str(tmp_path / name)) for name in ("shared", "one", "two"))
    for name in FILES[:2]:
        one.write_bytes(name.encode(), name)
        shared.write_bytes(b"half", name)
    assert fetch(shared, two) is None and not two.list()
    keep(shared, one, {"parameters": 3})
    assert fetch(shared, two) == {"parameters": 3}
    assert two.list() == sorted(FILES[:2]) and two.read_bytes(FILES[0]) == FILES[0].encode()
