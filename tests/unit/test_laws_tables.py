"""The tables of the laws: a world with a known law, measured at the settings of the experiment's own study files."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nexus_ray.config import Hardware
from nexus_ray.study.load import Study, load_study, run_tokens
from tests.study_views import law_truth

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "experiments" / "laws"
STEP = 2048
"""Tokens of an optimizer step."""


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("laws_tables", FOLDER / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["laws_tables"] = module
    spec.loader.exec_module(module)
    return module


def studies() -> list[Study]:
    return [load_study(FOLDER / f"{name}.yaml", hardware=Hardware(cpus=2)) for name in ("fit", "held_out")]


def write(storage: Path, study: Study) -> None:
    """Results of a study in which every trial has finished."""
    trials: list[dict[str, Any]] = []
    for point in study.space.grid():
        for seed in study.config.seeds:
            tokens = study.budget(point)
            new, lost = law_truth(tokens, float(point.params["continual.replay_ratio"]))  # type: ignore[arg-type]
            figures = {"new": -new * (1 + 1e-3 * seed), "forgetting": lost, "tokens": tokens, "seed": seed}
            trials.append({"params": dict(point.params), "status": "finished", **figures})
    (folder := storage / f"{study.config.name}-study").mkdir()
    (folder / "results.json").write_text(json.dumps({"trials": trials}))


def test_the_fit_and_the_held_out_runs_are_what_they_say() -> None:
    fit, held = studies()
    sizes = {}
    for study in (fit, held):
        for point in study.space.grid():
            config = study.config_of(point, 0)
            steps = run_tokens(config) // STEP
            assert config.continual.warmup_steps == max(1, steps // 100) and config.data.fraction == 1.0
            sizes.setdefault(study.config.name, set()).add((run_tokens(config), config.continual.replay_ratio))
    assert {tokens for tokens, _ in sizes["laws"]} == {256_000, 512_000} and len(sizes["laws"]) == 12
    assert {tokens for tokens, _ in sizes["laws-held-out"]} == {1_024_000} and len(sizes["laws-held-out"]) == 3
    seen = {ratio for _, ratio in sizes["laws"]}
    assert not seen & {ratio for _, ratio in sizes["laws-held-out"]}


def test_predictions_stand_beside_what_was_measured(tables: ModuleType, tmp_path: Path) -> None:
    assert "has 0 finished runs" in tables.tables(tmp_path)
    fit, held = studies()
    write(tmp_path, fit)
    alone = tables.tables(tmp_path)
    assert "fitted: 24 runs" in alone and "held out: 0 runs" in alone and "Mean relative error" not in alone
    write(tmp_path, held)
    text = tables.tables(tmp_path)
    assert text.count("| parameter | value | 95 % | determined by the data |") == 2
    errors = dict(re.findall(r"Mean relative error of (\w+): ([\d.]+)%", text))
    assert float(errors["new"]) < 5 and float(errors["forgetting"]) < 15
    for ratio in ("0.5%", "3.0%", "15.0%"):
        assert text.count(f"| 1,024,000 | {ratio} |") == 3, "measured, and predicted of both"
    assert text.count("| this one |\n") == 2, "one form of each quantity is chosen"
    assert re.search(r"\| 1,024,000 \| 0.6 \| [\d.]+% \| \[", text) and "2 times the longest fitted budget" in text
