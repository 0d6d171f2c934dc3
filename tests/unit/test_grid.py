"""The grid runner: expansion, validation before anything starts, resuming, failures, results."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from nexus_ray.cli import main
from nexus_ray.config import RunConfig, fingerprint
from nexus_ray.errors import ConfigError, DataError, Interrupted
from nexus_ray.grid import load_grid, run_grid
from nexus_ray.storage import Storage

BASE = {
    "name": "base",
    "domains": {"old": {"source": {"kind": "stdlib"}}, "new": {"source": {"kind": "stdlib"}}},
    "stages": [{"name": "one", "domains": {"old": 1}}, {"name": "two", "domains": {"new": 1}}],
}


def _write(folder: Path, **changes: Any) -> Path:
    (folder / "run.yaml").write_text(yaml.safe_dump({**BASE, "storage": str(folder / "runs")}))
    grid = {
        "name": "g",
        "base": "run.yaml",
        "seeds": [0, 1],
        "arms": {"none": {"continual.replay_ratio": 0.0}, "some": {"training.learning_rate": 3.0e-5}},
        **changes,
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump({key: value for key, value in grid.items() if value is not None}))
    return folder / "grid.yaml"


class Runner:
    """Stands in for the roadmap: leaves a run record, or fails as told."""

    def __init__(self, failing: dict[str, Exception] | None = None) -> None:
        self.failing, self.ran = failing or {}, []

    def __call__(self, config: RunConfig) -> None:
        self.ran.append(config.name)
        folder = Storage(config.storage).child(config.name)
        record = {"fingerprint": fingerprint(config), "outcome": "running"}
        folder.write_json(record, "run.json")
        if config.name in self.failing:
            folder.write_json({**record, "outcome": "failed"}, "run.json")
            raise self.failing[config.name]
        value = 2.0 + config.seed + (0.5 if config.continual.replay_ratio == 0.0 else 0.0)
        scores = {
            "domains": ["old", "new"],
            "stages": ["base", "one", "two"],
            "bits_per_byte": [[8.0, 8.0], [1.0, 7.0], [value, 1.5]],
            "loss": [[5.0, 5.0], [1.0, 4.0], [1.5, 1.0]],
            "forgetting": {"per_domain": {"old": value - 1}, "mean": value - 1, "max": value - 1, "anchors": {}},
            "backward_transfer": 1 - value,
            "forward_transfer": {},
        }
        folder.write_json(scores, "scores.json")
        folder.write_json({**record, "outcome": "done"}, "run.json")


def _run(path: Path, runner: Runner, **arguments: Any) -> tuple[int, list[str]]:
    said: list[str] = []
    code = run_grid(path, run=runner, session=lambda _: nullcontext(), say=said.append, **arguments)
    return code, said


def _results(path: Path) -> list[dict[str, Any]]:
    return json.loads((path.parent / "runs" / "g-grid" / "results.json").read_text())["runs"]


ALL = ["g-none-s0", "g-none-s1", "g-some-s0", "g-some-s1"]


def test_runs_arm_by_arm_and_skips_what_is_done(tmp_path: Path) -> None:
    path = _write(tmp_path, baseline="none")
    runner = Runner()
    assert _run(path, runner)[0] == 0
    assert runner.ran == ALL
    before = (tmp_path / "runs" / "g-grid" / "results.json").read_bytes()
    again = Runner()
    code, said = _run(path, again)
    assert (code, again.ran) == (0, [])
    assert said[0] == "grid g: 4 runs, 4 of them done"
    assert (tmp_path / "runs" / "g-grid" / "results.json").read_bytes() == before


def test_results_hold_figures_and_paired_differences(tmp_path: Path) -> None:
    path = _write(tmp_path, baseline="none")
    _run(path, Runner())
    results = _results(path)
    assert [(r["arm"], r["seed"], r["outcome"]) for r in results] == [
        ("none", 0, "done"),
        ("none", 1, "done"),
        ("some", 0, "done"),
        ("some", 1, "done"),
    ]
    assert results[3]["bits_per_byte"]["two"] == {"old": 3.0, "new": 1.5}
    assert results[3]["forgetting"]["mean"] == 2.0
    assert results[3]["versus_baseline"] == {"old": -0.5, "new": 0.0}
    assert len({r["fingerprint"] for r in results}) == 4


def test_a_failing_run_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    path = _write(tmp_path)
    runner = Runner({"g-none-s1": DataError("shard torn"), "g-some-s0": RuntimeError("bug")})
    code, said = _run(path, runner)
    assert (code, runner.ran) == (1, ALL)
    assert "failed: g-none-s1: DataError: shard torn" in said
    failed = {r["name"]: r["error"] for r in _results(path) if r["outcome"] == "failed"}
    assert failed == {"g-none-s1": "DataError: shard torn", "g-some-s0": "RuntimeError: bug"}
    again = Runner()
    assert _run(path, again)[0] == 0
    assert again.ran == ["g-none-s1", "g-some-s0"]
    assert {r["outcome"] for r in _results(path)} == {"done"}


def test_an_interruption_ends_the_grid(tmp_path: Path) -> None:
    path = _write(tmp_path)
    runner = Runner({"g-none-s1": Interrupted("stopped with a checkpoint")})
    with pytest.raises(Interrupted):
        _run(path, runner)
    assert runner.ran == ALL[:2]
    assert [r["outcome"] for r in _results(path)][2:] == ["pending", "pending"]


def test_only_runs_the_arms_named(tmp_path: Path) -> None:
    path = _write(tmp_path)
    runner = Runner()
    _run(path, runner, only=["some"])
    assert runner.ran == ALL[2:]
    with pytest.raises(ConfigError, match="no arm more; arms are none, some"):
        _run(path, runner, only=["more"])


def test_the_command_line_takes_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path)
    assert main(["grid", str(path), "--dry-run", "--only", "some"]) == 0
    printed = capsys.readouterr().out
    assert "g-some-s1" in printed and "g-none-s1" not in printed
    assert main(["grid", str(path), "--dry-run", "--only", "none,more"]) == 2


def test_values_reach_the_configs(tmp_path: Path) -> None:
    common = {"training.weight_decay": 1.0e-05, "continual.replay_ratio": 0.25}
    path = _write(tmp_path, common=common)
    _, runs = load_grid(path, ["training.seq_len=128"])
    assert [cell.config.name for cell in runs] == ALL
    assert [cell.config.seed for cell in runs] == [0, 1, 0, 1]
    assert [cell.config.continual.replay_ratio for cell in runs] == [0.0, 0.0, 0.25, 0.25]
    assert {cell.config.training.weight_decay for cell in runs} == {1.0e-05}
    assert runs[2].config.training.learning_rate == 3.0e-5
    assert {cell.config.training.seq_len for cell in runs} == {128}


def test_product_makes_an_arm_of_every_combination(tmp_path: Path) -> None:
    product = {"continual.replay_ratio": [0.0, 0.05], "continual.warmup_steps": [1, 20]}
    path = _write(tmp_path, arms=None, product=product, seeds=[3])
    _, runs = load_grid(path)
    assert [cell.arm for cell in runs] == [
        "replay_ratio-0.0-warmup_steps-1",
        "replay_ratio-0.0-warmup_steps-20",
        "replay_ratio-0.05-warmup_steps-1",
        "replay_ratio-0.05-warmup_steps-20",
    ]
    assert runs[2].config.continual.replay_ratio == 0.05
    assert runs[2].config.continual.warmup_steps == 1


def test_all_faults_of_all_arms_are_reported_before_anything_runs(tmp_path: Path) -> None:
    arms = {"good": {}, "bad": {"continual.replay_ratio": 1.5}, "worse": {"training.no_such_key": 1}}
    runner = Runner()
    with pytest.raises(ConfigError) as error:
        _run(_write(tmp_path, arms=arms), runner)
    for part in ("arm bad", "continual.replay_ratio", "arm worse", "training.no_such_key"):
        assert part in str(error.value)
    assert str(error.value).count("replay_ratio") < 4
    assert runner.ran == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": None}, "give either arms or product"),
        ({"arms": None, "product": {"storage": ["a b", "a+b"]}}, "would go by the same name"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"baseline": "nobody"}, "baseline='nobody' is none of the arms: none, some"),
        ({"arms": {"a": {"seed": 3}}}, "seed of a run follow from arm and seed"),
        ({"extra": 1}, "extra"),
        ({"base": "missing.yaml"}, r"missing\.yaml does not exist"),
    ],
)
def test_faulty_grid_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_grid(_write(tmp_path, **changes))


def test_overrides_of_name_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path)
    with pytest.raises(ConfigError, match="seed=3: name and seed of a grid's runs stand in"):
        load_grid(path, ["seed=3"])
    _run(path, Runner())
    with pytest.raises(ConfigError, match="g-none-s0 holds a run of another config"):
        load_grid(path, ["training.seq_len=128"])


def test_dry_run_lists_and_starts_nothing(tmp_path: Path) -> None:
    runner = Runner()
    code, said = _run(_write(tmp_path), runner, dry_run=True)
    assert (code, runner.ran) == (0, [])
    assert [line.split()[0] for line in said[1:]] == ALL
    assert not (tmp_path / "runs").exists()
