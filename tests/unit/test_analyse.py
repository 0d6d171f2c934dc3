"""The experiments' tables: figures with known answers, and whole pages from made-up records."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from nexus_ray.evaluate.scores import DomainScore, scores_to_bytes

SCRIPT = Path(__file__).resolve().parents[2] / "configs" / "experiments" / "analyse.py"


@pytest.fixture(scope="module")
def analyse() -> ModuleType:
    spec = importlib.util.spec_from_file_location("analyse", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["analyse"] = module
    spec.loader.exec_module(module)
    return module


def score(loss: float, *, seed: int = 0) -> DomainScore:
    """Two hundred documents of ten tokens whose mean loss is `loss`; the same documents are hard for every model."""
    noise = np.random.default_rng(seed).normal(0, 0.5, 200)
    nll = 10 * (loss + noise - noise.mean())
    return DomainScore(nll, np.full(200, 10), np.full(200, 30))


def write_grid(storage: Path, grid: str, runs: list[tuple[str, int, dict[str, Any], float, float]]) -> None:
    """Records of finished runs (arm, seed, config values, old loss, new loss) that start from an old loss of 4."""
    entries = [{"name": "unfinished", "arm": "x", "seed": 0, "outcome": "pending"}]
    for arm, seed, values, old, new in runs:
        folder = storage / f"{grid}-{arm}-s{seed}"
        stage = folder / "stages" / "00-french"
        for place, scores in ((folder / "base", (4.0, 6.0)), (stage, (old, new))):
            place.mkdir(parents=True)
            content = {"english": score(scores[0]), "french": score(scores[1], seed=1)}
            (place / "evaluation.npz").write_bytes(scores_to_bytes(content))
        record = {
            "commit": "c0ffee",
            "dirty": False,
            "fingerprint": f"print-{arm}",
            "stages": [{"index": 0, "name": "french"}],
        }
        (folder / "run.json").write_text(json.dumps(record))
        config = {
            "continual": {"replay_ratio": values.get("replay", 0.0), "warmup_steps": values.get("warmup", 5)},
            "training": {
                "learning_rate": values.get("peak", 1.5e-3),
                "schedule": {"kind": values.get("kind", "cosine")},
                "token_budget": 1_024_000,
                "global_batch_tokens": 2048,
            },
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"train/loss": 9.0 - s}) + "\n" for s in range(3)))
        entries.append({"name": folder.name, "arm": arm, "seed": seed, "outcome": "done"})
    (storage / f"{grid}-grid").mkdir()
    (storage / f"{grid}-grid" / "results.json").write_text(json.dumps({"runs": entries}))


def test_kendall_tau(analyse: ModuleType) -> None:
    assert analyse.kendall_tau([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert analyse.kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert analyse.kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert analyse.kendall_tau([1], [1]) == 0


def test_t_interval(analyse: ModuleType) -> None:
    low, high = analyse.t_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2) and (high - low) / 2 == pytest.approx(4.303 / math.sqrt(3))


def test_the_published_shares(analyse: ModuleType) -> None:
    shares = [f"{analyse.published(ratio)[0]:.0%}" for ratio in (0.0, 0.01, 0.05, 0.25)]
    assert shares == ["0%", "53%", "71%", "88%"]
    assert [round(analyse.published(ratio)[1], 2) for ratio in (0.01, 0.05, 0.25)] == [0.01, 0.01, 0.05]


def test_pairing_makes_differences_sharp(analyse: ModuleType) -> None:
    one, other = analyse.losses([score(4.0), score(4.1)], "english")
    assert one[0] == pytest.approx(4.0) and len(one) == 1 + analyse.SAMPLES
    assert float(np.ptp((other - one)[1:])) < 1e-9 < float(np.ptp(one[1:]))


def test_replay_table(analyse: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        (arm, seed, {"replay": ratio}, old + seed / 100, new)
        for arm, ratio, old, new in (("r00", 0.0, 6.0, 3.0), ("r05", 0.05, 4.5, 3.02), ("control", 0.0, 3.9, 6.0))
        for seed in range(3)
    ]
    write_grid(tmp_path, "replay", runs)
    analyse.main(["replay", str(tmp_path)])
    page = capsys.readouterr().out
    means = next(line for line in page.splitlines() if line.startswith("| 5% |"))
    # F = 0.50, 0.51, 0.52 of 2.00, 2.01, 2.02; against the control 0.60 of 2.10 in every seed; cost 0.02
    assert "| 0.510 [0.485, 0.535] (0.500 to 0.520) | 74.6%" in means and "| 71.4% [71.4%, 71.4%]" in means
    assert "| 71% |" in means and "| 0.0200 [0.0200, 0.0200] (0.0200 to 0.0200) | 0.01 |" in means
    assert "| 0 | -1.00 | -0.1000 [-0.1000, -0.1000] | no |" in page
    assert "commit c0ffee" in page and "r05 seed 1 print-r05" in page and "200 documents, 2,000 tokens" in page
    assert "nan" not in page


def test_an_unfinished_replay_grid(analyse: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_grid(tmp_path, "replay", [("r00", 0, {}, 6.0, 3.0), ("r01", 0, {"replay": 0.01}, 5.0, 3.0)])
    analyse.main(["replay", str(tmp_path)])
    page = capsys.readouterr().out
    assert "| 1% | 1.000 | 50.0% | – | – | 53% |" in page and "| 0 | -1.00 | – | – |" in page and "nan" not in page


def test_rewarm_table(analyse: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms: list[tuple[str, dict[str, Any], float, float]] = [
        ("peak10", {}, 6.0, 3.0),
        ("peak05", {"peak": 7.5e-4}, 5.5, 3.2),
        ("peak20", {"peak": 3e-3}, 6.5, 2.9),
        ("constant-minimum", {"peak": 1.5e-4, "kind": "constant", "warmup": 0}, 5.0, 3.5),
        ("warmup00", {"warmup": 0}, 6.01, 3.01),
    ]
    runs = [(arm, seed, values, old, new) for arm, values, old, new in arms for seed in range(2)]
    write_grid(tmp_path, "rewarm", runs)
    analyse.main(["rewarm", str(tmp_path)])
    page = capsys.readouterr().out
    assert "tau of the peak over constant-minimum, peak05, peak10, peak20" in page
    assert "| 1 | +1.00 | -1.00 | constant-minimum | constant-minimum | 1.0% | 3.3% |" in page
    assert "| peak20 | 0.003 | 5 | 6.500 [6.500, 6.500] (6.500 to 6.500) |" in page and "| 9.00 " in page


def test_nothing_finished(analyse: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_grid(tmp_path, "rewarm", [])
    analyse.main(["rewarm", str(tmp_path)])
    assert "no run of this grid is finished yet" in capsys.readouterr().out
