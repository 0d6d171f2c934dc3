"""Every committed config loads; what the demo resolves to is reviewed as a diff."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nexus_ray.config import Hardware, load_config, resolve, to_yaml
from nexus_ray.study.load import load_study

ROOT = Path(__file__).resolve().parents[2]
FILES = {path: yaml.safe_load(path.read_text()) or {} for path in sorted((ROOT / "configs").rglob("*.yaml"))}
CONFIGS = [path for path, data in FILES.items() if "stages" in data]
STUDIES = [path for path, data in FILES.items() if "space" in data]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_committed_configs_load(path: Path) -> None:
    config = load_config(path)
    assert resolve(config, Hardware(cpus=2)).name == config.name


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(ROOT)))
def test_committed_studies_load(path: Path) -> None:
    study = load_study(path, hardware=Hardware(cpus=2))
    assert study.config.name == study.folder.name.removesuffix("-study")


def test_there_are_configs() -> None:
    assert {"study.yaml", "full.yaml", "noise.yaml", "fit.yaml", "held_out.yaml"} <= {path.name for path in STUDIES}
    assert {"demo.yaml", "roadmap-hub.yaml"} <= {path.name for path in CONFIGS}


def test_the_demo_resolves_as_reviewed(golden: Callable[[str, str], None]) -> None:
    config = load_config(ROOT / "configs/demo.yaml", ["storage=s3://bucket/runs"])
    golden("demo.resolved.yaml", to_yaml(resolve(config, Hardware(cpus=2))))


def test_the_demo_keeps_what_scripts_rely_on() -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    assert config.storage == "runs"
    assert not any("training.token_budget" in stage.override for stage in config.stages)
