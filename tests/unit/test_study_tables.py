"""The tables of the search, from made-up results with known answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from nexus_ray.config import Hardware
from nexus_ray.study.load import load_study
from nexus_ray.study.records import Point

FILE = Path(__file__).resolve().parents[2] / "configs" / "experiments" / "study" / "tables.py"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_tables", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_tables"] = module
    spec.loader.exec_module(module)
    return module


def trial(point: str, new: float | None, *, seed: int = 0, lost: float = 0.1, status: str = "finished") -> Any:
    figures = {"new": new, "forgetting": new and lost, "cost": new and 2e15}
    return {
        "point": point,
        "seed": seed,
        "status": status,
        "params": {"a.b": point},
        "steps": 1,
        "tokens": 10,
        **figures,
    }


def write(storage: Path, name: str, trials: list[Any], front: list[str] | None = None) -> None:
    (folder := storage / f"{name}-study").mkdir(parents=True)
    spans = {"to_first_step_s": {"median": 9.0, "most": 12.0}}
    clock = {"first_to_last_event": 1500.0, "with_a_turn": 1440.0}
    study = {"tokens": 320, "share_of_full_budgets": 0.32, "seconds": clock, "seconds_besides_training": spans}
    (folder / "results.json").write_text(json.dumps({**study, "front": front or [], "trials": trials}))


def test_the_winner_is_measured_against_the_grid_in_units_of_the_noise(tables: ModuleType, tmp_path: Path) -> None:
    write(
        tmp_path,
        "study",
        [trial("one", -2.0), trial("two", -2.1, status="paused"), trial("four", None, status="planned")],
    )
    assert "no winner yet" in tables.tables(tmp_path)
    write(tmp_path, "full", [trial("one", -2.0), trial("two", -1.98), trial("three", -1.5, lost=0.7)])
    (full := tmp_path / "full-study" / "results.json").write_text(full.read_text().replace("320", "1000"))
    write(tmp_path, "noise", [trial("n", -2.0 + shift, seed=seed) for seed, shift in enumerate((-0.02, 0.0, 0.02))])
    text = tables.tables(tmp_path)
    assert "The winner is one, the grid's best two; gap 0.0200, 0.50 of the noise of 0.0400." in text
    assert "Early stopping took 32.0% of the grid's tokens." in text
    assert "study: 3 trials, 320 tokens, 32.0% of their full budgets; 25.0 minutes from first to last event" in text
    assert "24.0 of them with a trial at work" in text
    assert (
        "| b two | 0 | paused | 10 | -2.1000 | 0.1000 | 2.0000 |" in text and "| to_first_step_s | 9.0 | 12.0 |" in text
    )


def test_one_seed_is_no_noise(tables: ModuleType) -> None:
    assert tables.noise([trial("one", -2.0)]) is None


FULL = {"method": "full", "continual.replay_ratio": 0.05, "continual.warmup_steps": 5}
LORA = {**FULL, "method": "lora", "continual.lora_rank": 32}


def test_the_front_has_intervals_once_its_points_ran_with_more_seeds(tables: ModuleType, tmp_path: Path) -> None:
    whole = [{**trial(Point(p).id, new), "params": p} for p, new in ((FULL, -2.0), (LORA, -2.2))]
    whole[1]["forgetting"] = 0.05
    ids = [entry["point"] for entry in whole]
    write(tmp_path, "full", [*whole, trial("beaten", -2.5)], front=ids)
    assert f"| {ids[0]} | method full, replay_ratio 0.05, warmup_steps 5 | 1 | -2.000 |" in tables.tables(tmp_path)
    more = [
        {**trial("x", entry["new"] + shift, seed=seed, lost=entry["forgetting"]), "params": {"point": f"p{name}"}}
        for name, entry in zip(ids, whole, strict=True)
        for seed, shift in ((1, -0.01), (2, 0.01))
    ]
    gone = {**more[0], "params": {"point": "pgone"}}
    write(tmp_path, "front", [*more, gone, {**more[0], "seed": 3, "status": "running"}])
    text = tables.tables(tmp_path)
    assert f"| {ids[0]} | method full, replay_ratio 0.05, warmup_steps 5 | 3 | -2.000 [-2.025, -1.975] |" in text
    assert "| 2.0000 | yes, 100% |" in text and "pgone" not in text.partition("front of the full grid")[2]


def test_the_study_of_the_front_loads_and_runs_its_points(tables: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"run full\.yaml first"):
        tables.front_study(tmp_path)
    whole = [{**trial(Point(p).id, -2.0), "params": p} for p in (FULL, LORA)]
    write(tmp_path, "full", whole, front=[entry["point"] for entry in whole])
    (replay := tmp_path / "replay").mkdir()
    (replay / "run.yaml").write_text((FILE.parents[1] / "replay" / "run.yaml").read_text())
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "front.yaml").write_text(text := tables.front_study(tmp_path))
    options = yaml.safe_load(text)["space"]["point"]["options"]
    assert list(options) == [f"p{entry['point']}" for entry in whole]
    study = load_study(tmp_path / "study" / "front.yaml", hardware=Hardware(cpus=2))
    full = load_study(FILE.parent / "full.yaml", hardware=Hardware(cpus=2))
    for point, params in zip(study.space.grid(), (FULL, LORA), strict=True):
        ours, theirs = study.config_of(point, 1), full.config_of(Point(params), 1)
        assert ours.model_copy(update={"name": theirs.name}) == theirs
