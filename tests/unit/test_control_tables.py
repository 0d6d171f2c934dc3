"""The tables of the forgetting budget, from made-up records with known answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nexus_ray.grid import load_grid

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "experiments" / "control"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("control_tables", FOLDER / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["control_tables"] = module
    spec.loader.exec_module(module)
    return module


def write_run(storage: Path, arm: str, seed: int, forgotten: float, new: float, peak: float) -> dict[str, Any]:
    folder = storage / f"control-{arm}-s{seed}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"outcome": "done"}))
    lines = [
        {"step": step, "train/replay_fraction": 0.1, "eval/bits_per_byte/english": 1.6 + lost}
        for step, lost in ((1, peak), (2, forgotten))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if arm == "control":
        action = {"kind": "replay", "step": 1, "replay_ratio": 0.2, "lr_factor": 1.0, "reason": "it forgets"}
        log = [{"step": 1, "forgetting": {"english": peak}, "action": None}]
        log += [{**log[0], "action": action}, {"step": 2, "forgetting": {"english": forgotten}, "action": None}]
        (folder / "control.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    bits = {"base": {"english": 1.6, "french": 4.0}, "french": {"english": 1.6 + forgotten, "french": new}}
    return {"name": folder.name, "arm": arm, "seed": seed, "outcome": "done", "bits_per_byte": bits}


def test_bound_overshoot_cost_and_the_best_fixed_arm(tables: ModuleType, tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path, arm, seed, lost + 0.01 * seed, new, 0.6)
        for arm, lost, new in (("r05", 0.5, 1.9), ("r10", 0.35, 1.91), ("r25", 0.2, 1.96), ("control", 0.33, 1.92))
        for seed in (0, 1, 2)
    ]
    (tmp_path / "control-grid").mkdir()
    (tmp_path / "control-grid" / "results.json").write_text(json.dumps({"runs": runs}))
    cells = tables.load(tmp_path)
    assert tables.bound(cells) == 0.36
    text = tables.tables(cells)
    assert "Bound: 0.360 bits per byte. Best fixed arm that holds it: r10. Stopped: none." in text
    row = next(line for line in text.splitlines() if line.startswith("| control | 0.34"))
    assert "-0.0200" in row and "0.0100" in row and "0.2400" in row and row.endswith("| 10.0% | 1.0 |")
    assert text.count("it forgets") == 3


def test_the_grid_loads_and_only_its_last_arm_is_controlled() -> None:
    grid, runs = load_grid(FOLDER / "grid.yaml")
    assert grid.baseline == "r10" and len(runs) == 12
    assert {cell.arm: cell.config.continual.on_forgetting for cell in runs} == {
        "r05": "warn",
        "r10": "warn",
        "r25": "warn",
        "control": "control",
    }
