"""The configuration of a run: the typed tree and its loader. Imports neither torch nor ray."""

from __future__ import annotations

from nexus_ray.config.hardware import Hardware, detect_hardware
from nexus_ray.config.load import (
    fingerprint,
    json_schema,
    load_config,
    parse_config,
    resolve,
    stage_config,
    to_yaml,
)
from nexus_ray.config.tree import *  # noqa: F403
from nexus_ray.config.tree import RunConfig, StageConfig

__all__ = [
    "Hardware",
    "RunConfig",
    "StageConfig",
    "detect_hardware",
    "fingerprint",
    "json_schema",
    "load_config",
    "parse_config",
    "resolve",
    "stage_config",
    "to_yaml",
]
