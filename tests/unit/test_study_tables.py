"""The tables of the search, from made-up results with known answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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
    return {"point": point, "seed": seed, "status": status, "params": {"a.b": point}, "tokens": 10, **figures}


def write(storage: Path, name: str, trials: list[Any]) -> None:
    (folder := storage / f"{name}-study").mkdir(parents=True)
    spans = {"to_first_step_s": {"median": 9.0, "most": 12.0}}
    study = {"tokens": 320, "share_of_full_budgets": 0.32, "seconds_besides_training": spans, "trials": trials}
    (folder / "results.json").write_text(json.dumps(study))


def test_the_winner_is_measured_against_the_grid_in_units_of_the_noise(tables: ModuleType, tmp_path: Path) -> None:
    write(
        tmp_path,
        "study",
        [trial("one", -2.0), trial("two", -2.1, status="paused"), trial("four", None, status="planned")],
    )
    assert "no winner yet" in tables.tables(tmp_path)
    write(tmp_path, "full", [trial("one", -2.0), trial("two", -1.98), trial("three", -1.5, lost=0.7)])
    write(tmp_path, "noise", [trial("n", -2.0 + shift, seed=seed) for seed, shift in enumerate((-0.02, 0.0, 0.02))])
    text = tables.tables(tmp_path)
    assert "The winner is one, the grid's best two; gap 0.0200, 0.50 of the noise of 0.0400." in text
    assert "study: 3 trials, 320 tokens, 32.0% of their full budgets" in text
    assert (
        "| b two | 0 | paused | 10 | -2.1000 | 0.1000 | 2.0000 |" in text and "| to_first_step_s | 9.0 | 12.0 |" in text
    )


def test_one_seed_is_no_noise(tables: ModuleType) -> None:
    assert tables.noise([trial("one", -2.0)]) is None
