"""Every committed config loads; what the demo resolves to is reviewed as a diff."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nexus_ray.config import Hardware, load_config, resolve, to_yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "stages" in (yaml.safe_load(p.read_text()) or {}))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_committed_configs_load(path: Path) -> None:
    config = load_config(path)
    assert resolve(config, Hardware(cpus=2)).name == config.name


def test_there_are_configs() -> None:
    assert {"demo.yaml", "roadmap-hub.yaml"} <= {path.name for path in CONFIGS}


def test_the_demo_resolves_as_reviewed(golden: Callable[[str, str], None]) -> None:
    config = load_config(ROOT / "configs/demo.yaml", ["storage=s3://bucket/runs"])
    golden("demo.resolved.yaml", to_yaml(resolve(config, Hardware(cpus=2))))


def test_the_demo_keeps_what_scripts_rely_on() -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    assert config.storage == "runs"
    assert not any("training.token_budget" in stage.override for stage in config.stages)
