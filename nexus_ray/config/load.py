"""Loads, resolves and fingerprints configs. Every fault of a config is reported at once, by dotted path.

Invariant: what `resolve` returns holds no `auto`, depends on no working directory, and loads again to itself
through `to_yaml`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from nexus_ray.config.checks import RUN_CHECKS, STAGE_CHECKS, override_problem
from nexus_ray.config.faults import Fault, collect, touches, validate
from nexus_ray.config.hardware import Hardware
from nexus_ray.config.source import Data, apply_overrides, copy_data, read_yaml
from nexus_ray.config.tree import FilesSource, RunConfig, SynthesisSource
from nexus_ray.config.validators import is_rubric_path

AUTO_PATHS = ("training.precision", "training.zero_stage", "cluster.cpus_per_worker")
"""Settings whose default depends on the machine or on each other; `resolve` makes them explicit."""

NO_INFLUENCE = (
    "name",
    "storage",
    "tracking",
    "report",
    "cluster.address",
    "cluster.worker_start_timeout_s",
    "cluster.num_workers",
    "cluster.cpus_per_worker",
    "training.checkpoint",
    "training.max_restarts",
    "synthesis",
)
"""Paths that change no row and no update of a run, and so no fingerprint. Worker and thread counts change rounding
only: a run may go on with others, and `run.json` and every line of the metrics say with which. What a synthesis job
wrote counts by its domain's source, which is held to a prefix of the ledger."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in a YAML file, with `path=value` overrides applied.

    Raises ConfigError that lists every fault: syntax, unknown keys, values, and rules between fields.
    """
    return parse_config(read_yaml(Path(path)), overrides, where=str(path))


def parse_config(data: Data, overrides: Sequence[str] = (), *, where: str = "config") -> RunConfig:
    """The config of plain nested data; `where` names it in errors. Raises ConfigError as `load_config` does."""
    return validate(apply_overrides(data, overrides), (*RUN_CHECKS, _stages_fit), where=where)


def stage_config(config: RunConfig, stage_index: int) -> RunConfig:
    """The config as stage `stage_index` sees it: its `override` values in place. The stages themselves stay."""
    stage = config.stages[stage_index]
    if not stage.override:
        return config
    return validate(_with_overrides(config, stage_index), STAGE_CHECKS, where=f"stage {stage_index} ({stage.name})")


def _with_overrides(config: RunConfig, stage_index: int) -> Data:
    data = config.model_dump(mode="json")
    for path, value in config.stages[stage_index].override.items():
        if override_problem(path) is None:
            _set(data, path, copy_data(value))
    return data


def _stages_fit(config: RunConfig) -> Iterator[Fault]:
    """Faults that appear only once a stage's overrides are in place, by the path of the override."""
    for index, stage in enumerate(config.stages):
        if stage.override:
            _, faults = collect(_with_overrides(config, index), STAGE_CHECKS)
            for fault in faults:
                if touches((fault.path, *fault.related), stage.override):
                    yield Fault(f"stages.{index}.override.{fault.path}", fault.message)


def resolve(config: RunConfig, hardware: Hardware) -> RunConfig:
    """The config with every `auto` explicit (per stage where an override changes it) and local paths absolute."""
    data = config.model_dump(mode="json")
    resolved = _autos(config, hardware)
    for path, value in resolved.items():
        _set(data, path, value)
    for index in range(len(config.stages)):
        override = data["stages"][index]["override"]
        for path, value in _autos(stage_config(config, index), hardware).items():
            if path in override or value != resolved[path]:
                override[path] = value
    _absolute_paths(data)
    return validate(data, RUN_CHECKS, where="resolved config")


def _autos(config: RunConfig, hardware: Hardware) -> dict[str, Any]:
    training, cluster = config.training, config.cluster
    precision: str = training.precision
    if precision == "auto":
        needs_fp32 = training.zero_stage == 0
        precision = "bf16" if (cluster.use_gpu or hardware.amx_bf16) and not needs_fp32 else "fp32"
    zero: int | str = training.zero_stage
    if zero == "auto":
        zero = 1 if precision == "bf16" or training.offload_optimizer else 0
    per_gpu_worker = 4
    cpus = cluster.cpus_per_worker
    if cpus is None:
        cpus = per_gpu_worker if cluster.use_gpu else max(1, hardware.cpus // cluster.num_workers)
    return dict(zip(AUTO_PATHS, (precision, zero, cpus), strict=True))


def _absolute_paths(data: Data) -> None:
    data["storage"] = _absolute(data["storage"])
    for domain in data["domains"].values():
        if domain["source"]["kind"] == "files":
            domain["source"]["paths"] = [_absolute(path) for path in domain["source"]["paths"]]
    for name, domain in data["domains"].items():
        if domain["source"]["kind"] == "synthesis":
            ledger = domain["source"]["ledger"] or f"{data['storage']}/{data['name']}/synthesis/{name}"
            domain["source"]["ledger"] = _absolute(ledger)
    for job in data["synthesis"].values():
        job["recipe"] = _absolute(job["recipe"])
        classifier = (job["filters"]["safety"] or {"classifier": None})["classifier"]
        for section in (job["generator"], job["judge"], job["filters"]["perplexity"], classifier):
            if section is not None and _is_local_model(section.get("model")):
                section["model"] = _absolute(section["model"])
        for key in ("against", "borrow"):
            job[key] = [_absolute(folder) for folder in job[key]]
        _absolute_references(job)
    model = data["model"]
    model["init_from"] = model["init_from"] and _absolute(model["init_from"])
    template = model["tokenizer"]["chat_template"]
    if template not in (None, "default"):
        model["tokenizer"]["chat_template"] = _absolute(template)
    for section in (model, model["tokenizer"]):
        if _is_local_model(section["source"]):
            section["source"] = _absolute(section["source"])


def _absolute_references(job: Data) -> None:
    """Files that a job's verdicts refer to."""
    filters = job["filters"]
    for section in (filters["prior"], filters["perplexity"]):
        if section is not None and section["reference"] is not None:
            section["reference"] = _absolute(section["reference"])
    for benchmark in (filters["contamination"] or {"benchmarks": {}})["benchmarks"].values():
        benchmark["paths"] = [_absolute(path) for path in benchmark["paths"]]
    for judge in (one for one in job["validators"] if one["kind"] == "judge"):
        if is_rubric_path(judge["rubric"]):
            judge["rubric"] = _absolute(judge["rubric"])
        if judge["golden"] != "default":
            judge["golden"] = _absolute(judge["golden"])


def _is_local_model(source: str | None) -> bool:
    if source is None or source in ("scratch", "train", "model", "wheel"):
        return False
    return Path(source).is_dir() or source.endswith(".gguf")


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def fingerprint(config: RunConfig) -> str:
    """12 hex digits that change with every setting that changes the numbers, and with no other.

    Local corpora count by their file names alone, ledgers by the prefix that is read: what they hold is in the
    manifests' own fingerprints, so that a moved folder or a job's temporary copy of it stays the same run.
    """
    data = config.model_dump(mode="json")
    for path in NO_INFLUENCE:
        _drop(data, path)
    for stage in data["stages"]:
        stage["override"] = {p: v for p, v in stage["override"].items() if not _within(p, NO_INFLUENCE)}
    for name, domain in config.domains.items():
        if isinstance(domain.source, FilesSource):
            data["domains"][name]["source"]["paths"] = [p.rstrip("/").rpartition("/")[2] for p in domain.source.paths]
        if isinstance(domain.source, SynthesisSource):
            data["domains"][name]["source"].pop("ledger")
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def to_yaml(config: RunConfig) -> str:
    """The config as YAML that loads to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, with the docstrings as descriptions, for editors that complete and check YAML."""
    schema = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "nexus-ray run"}


def _within(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def _set(data: Data, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        data = data[part]
    data[last] = value


def _drop(data: Data, path: str) -> None:
    *parents, last = path.split(".")
    for part in parents:
        data = data[part]
    data.pop(last, None)
