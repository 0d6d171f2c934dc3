"""nexus-ray: teach a language model new material without losing the old, on one Ray cluster.

The public names are loaded on first use, so that `import nexus_ray` costs neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ContinualConfig": "nexus_ray.config.tree",
    "Curriculum": "nexus_ray.config.tree",
    "RunConfig": "nexus_ray.config.tree",
    "load_config": "nexus_ray.config.load",
    "SyntheticPipeline": "nexus_ray.synthesis.pipeline",
    "QualityFilter": "nexus_ray.synthesis.filters.quality",
    "FactChecker": "nexus_ray.synthesis.validators.facts",
    "synthesize": "nexus_ray.synthesis.job",
    "prepare": "nexus_ray.corpora.prepare",
    "run_roadmap": "nexus_ray.roadmap",
    "evaluate_run": "nexus_ray.roadmap",
    "write_report": "nexus_ray.report.page",
    "compare_runs": "nexus_ray.report.compare",
    "run_doctor": "nexus_ray.doctor",
    "run_grid": "nexus_ray.grid",
}
"""Name -> module that defines it. One function per verb: `train` is `run_roadmap` of a config with one stage."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nexus_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
