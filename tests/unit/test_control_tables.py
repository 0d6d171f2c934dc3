"""The tables of the forgetting budget, from made-up records with known answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nexus_ray.evaluate.scores import DomainScore, scores_to_bytes
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


SAMPLE, WHOLE = 1.5, 1.6
"""Bits per byte of English before training: of the sample of the evaluations, and of all that is held out."""
REPLAY = {"r05": 0.05, "r07": 0.075, "r10": 0.1, "r13": 0.125, "r25": 0.25, "control": 0.12}


def start_scores() -> bytes:
    """A `start.npz` in which English has `SAMPLE` bits per byte."""
    score = DomainScore(np.array([SAMPLE * 100 * np.log(2)]), np.array([30]), np.array([100]))
    return scores_to_bytes({"english": score})


def write_run(storage: Path, arm: str, seed: int, forgotten: float, new: float, peak: float) -> dict[str, Any]:
    folder = storage / f"control-{arm}-s{seed}"
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "start.npz").write_bytes(start_scores())
    (folder / "run.json").write_text(json.dumps({"outcome": "done"}))
    lines = [
        {"step": step, "train/replay_fraction": REPLAY[arm], "eval/bits_per_byte/english": SAMPLE + lost}
        for step, lost in ((1, peak), (2, forgotten))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if arm == "control":
        action = {"kind": "replay", "step": 1, "replay_ratio": 0.2, "lr_factor": 1.0, "reason": "it forgets"}
        log = [{"step": 1, "forgetting": {"english": peak}, "action": None}]
        log += [{**log[0], "action": action}, {"step": 2, "forgetting": {"english": forgotten}, "action": None}]
        (folder / "control.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    bits = {"base": {"english": WHOLE, "french": 4.0}, "french": {"english": WHOLE + forgotten, "french": new}}
    return {"name": folder.name, "arm": arm, "seed": seed, "outcome": "done", "bits_per_byte": bits}


ENDS = {"r05": (0.5, 1.9), "r10": (0.35, 1.91), "r25": (0.2, 1.96), "control": (0.33, 1.92)}
"""By arm: forgotten by seed 0 (each seed forgets 0.01 more), and the new score."""


def made_up(tables: ModuleType, storage: Path, ends: dict[str, tuple[float, float]]) -> Any:
    """The cells of a grid of three seeds."""
    runs = [
        write_run(storage, arm, seed, lost + 0.01 * seed, new, 0.6)
        for arm, (lost, new) in ends.items()
        for seed in (0, 1, 2)
    ]
    (storage / "control-grid").mkdir()
    (storage / "control-grid" / "results.json").write_text(json.dumps({"runs": runs}))
    return tables.load(storage)


def test_bound_overshoot_cost_and_the_best_fixed_arm(tables: ModuleType, tmp_path: Path) -> None:
    cells = made_up(tables, tmp_path, ENDS)
    assert tables.bound(cells) == 0.36
    text = tables.tables(cells)
    assert "Bound: 0.360 bits per byte. Best fixed arm that holds it: r10. Stopped: none." in text
    row = next(line for line in text.splitlines() if line.startswith("| control | 0.34"))
    assert "-0.0200" in row and "0.0100" in row and "0.2400" in row and row.endswith("| 12.0% | 1.0 |")
    assert text.count("it forgets") == 3


def test_the_peak_of_every_arm_is_counted_from_the_first_model_s_score_of_the_same_sample(
    tables: ModuleType, tmp_path: Path
) -> None:
    """Controlled or not, and whatever all held-out text scored: the same evaluations give the same peak."""
    cells = made_up(tables, tmp_path, ENDS)
    assert {round(max(cell.during), 9) for cell in cells} == {0.6}
    rows = [line for line in tables.tables(cells).splitlines() if line.startswith(("| r05 | 0 ", "| control | 0 "))]
    assert [row.split(" | ")[4] for row in rows if row.count("|") == 8] == ["0.2400", "0.2400"]


def test_between_the_fixed_arms_the_curve_is_straight_in_the_logarithm_of_the_ratio(
    tables: ModuleType, tmp_path: Path
) -> None:
    fixed = [cell for cell in made_up(tables, tmp_path, ENDS) if cell.arm != "control" and cell.seed == 0]
    assert tables.on_curve(fixed, 0.35) == pytest.approx((0.1, 1.91))
    assert tables.on_curve(fixed, 0.425) == pytest.approx((0.1 / 2**0.5, 1.905)), "half way from r05 to r10"
    assert tables.on_curve(fixed, 0.5) == pytest.approx((0.05, 1.9))
    assert all(np.isnan(tables.on_curve(fixed, beyond)).all() for beyond in (0.19, 0.51))


def test_the_controlled_arm_is_compared_at_the_bound_and_at_what_it_forgot(tables: ModuleType, tmp_path: Path) -> None:
    cells = made_up(tables, tmp_path, ENDS | {"r07": (0.4, 1.9), "r13": (0.33, 1.93)})
    text = tables.tables(cells)
    bound = next(line for line in text.splitlines() if line.startswith("| control | the bound |"))
    same = next(line for line in text.splitlines() if line.startswith("| control | as much |"))
    assert same.startswith("| control | as much | 12.5% [12.5%, 12.5%]") and "| 1.9300 [" in same
    assert "| -0.0100 [" in same and "| 0.0073 [" in bound, "1.92 less the mean of 1.908, 1.91 and 1.92"


def test_the_grid_loads_and_its_last_arms_are_controlled() -> None:
    grid, runs = load_grid(FOLDER / "grid.yaml")
    assert grid.baseline == "r10" and len(runs) == 21
    assert {cell.arm: cell.config.continual.on_forgetting for cell in runs} == {
        "r05": "warn",
        "r07": "warn",
        "r10": "warn",
        "r13": "warn",
        "r25": "warn",
        "control": "control",
        "eager": "control",
    }
