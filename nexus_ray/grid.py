"""A grid of runs, arms x seeds, one after the other: `nexus-ray grid GRID.yaml`.

    name: replay                    # runs are called replay-ARM-sSEED
    base: run.yaml                  # beside the grid file
    seeds: [0, 1, 2]
    common: {training.token_budget: 2000000}
    arms:
      none: {continual.replay_ratio: 0.0}
      five: {continual.replay_ratio: 0.05}
    baseline: none                  # optional: figures are also given as differences to this arm, seed by seed

`product: {path: [values]}` in place of `arms` makes an arm of every combination. Invariant: nothing starts before
every config of the grid is sound; a finished run is never run again; a failed one does not keep the others from
running. Results are collected from the runs' own records into `<storage>/<name>-grid/results.json`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from nexus_ray.config import RunConfig, detect_hardware, fingerprint, parse_config, resolve
from nexus_ray.config.source import override_texts, read_yaml
from nexus_ray.config.tree import Name, Section
from nexus_ray.errors import ConfigError, Interrupted
from nexus_ray.storage import Storage

Overrides = dict[str, Any]
"""Config values by dotted path."""


class GridConfig(Section):
    """What a grid file says."""

    name: Name
    base: str
    """Config file of a run, relative to the grid file."""
    arms: dict[Name, Overrides] = Field(default_factory=dict)
    """Config values of each arm."""
    product: dict[str, list[Any]] = Field(default_factory=dict)
    """Values of each path, all combinations of which are arms."""
    seeds: list[int] = Field(default=[0], min_length=1)
    common: Overrides = Field(default_factory=dict)
    """Config values of all runs."""
    baseline: str | None = None
    """Arm that the others are compared with, seed by seed."""

    @model_validator(mode="after")
    def _one_kind_of_arms(self) -> GridConfig:
        if bool(self.arms) == bool(self.product):
            raise ValueError("give either arms or product, and not an empty one")
        if self.product and len(self.all_arms()) < math.prod(map(len, self.product.values())):
            raise ValueError("product: two combinations would go by the same name; list them under arms")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} names a seed twice")
        fixed = {"name", "seed"} & {path for arm in (self.common, self.product, *self.arms.values()) for path in arm}
        if fixed:
            raise ValueError(f"{' and '.join(sorted(fixed))} of a run follow from arm and seed; use `seeds` and `name`")
        if self.baseline is not None and self.baseline not in self.all_arms():
            raise ValueError(f"baseline={self.baseline!r} is none of the arms: {', '.join(self.all_arms())}")
        return self

    def all_arms(self) -> dict[str, Overrides]:
        """Config values by arm, in order."""
        if self.arms:
            return dict(self.arms)
        combinations = itertools.product(*self.product.values())
        return {
            "-".join(_label(path, value) for path, value in zip(self.product, values, strict=True)): dict(
                zip(self.product, values, strict=True)
            )
            for values in combinations
        }


@dataclass(frozen=True)
class GridRun:
    """One cell of the grid."""

    arm: str
    seed: int
    config: RunConfig
    fingerprint: str

    @property
    def folder(self) -> Storage:
        return Storage(self.config.storage).child(self.config.name)

    def record(self) -> dict[str, Any]:
        """The run's `run.json`; empty before it starts."""
        return self.folder.read_json("run.json") if self.folder.exists("run.json") else {}

    @property
    def done(self) -> bool:
        record = self.record()
        return record.get("outcome") == "done" and record.get("fingerprint") == self.fingerprint


def run_grid(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    dry_run: bool = False,
    say: Callable[[str], None] = print,
    run: Callable[[RunConfig], Any] | None = None,
    session: Callable[[RunConfig], AbstractContextManager[Any]] | None = None,
) -> int:
    """Run what is not done yet of a grid file, in order. Returns 0, or 1 if a run failed.

    `overrides` (`path=value`) apply to every run; `only` names the arms to run. `run` and `session` are what runs a
    config and what connects to Ray (default: the roadmap, inside one Ray session for the whole grid).

    Raises:
        ConfigError: the grid file or any run's config is faulty; all faults are listed and nothing has started.
        Interrupted: a run was asked to stop; the grid stops with it.
    """
    grid, runs = load_grid(path, overrides)
    unknown = sorted(set(only) - {cell.arm for cell in runs})
    if unknown:
        raise ConfigError(f"{path}: no arm {', '.join(unknown)}; arms are {', '.join(grid.all_arms())}")
    chosen = [cell for cell in runs if not only or cell.arm in only]
    waiting = [cell for cell in chosen if not cell.done]
    say(f"grid {grid.name}: {len(chosen)} runs, {len(chosen) - len(waiting)} of them done")
    if dry_run:
        for cell in chosen:
            say(f"  {cell.config.name}  {cell.fingerprint}  {'done' if cell.done else 'to run'}")
        return 0
    failures: dict[str, str] = {}
    if waiting:
        session = session or _ray_session()
        with session(max((cell.config for cell in waiting), key=_cpus)):
            _run_all(waiting, grid, runs, failures, say=say, run=run or _roadmap(), session=session)
    say(f"results: {_collect(grid, runs, failures)}")
    for name, error in failures.items():
        say(f"failed: {name}: {error}")
    return 1 if failures else 0


def load_grid(path: Path, overrides: Sequence[str] = ()) -> tuple[GridConfig, list[GridRun]]:
    """The grid and its runs, arm by arm. Raises ConfigError listing all faults of all runs."""
    try:
        grid = GridConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ConfigError(f"{path}:\n  " + "\n  ".join(line.removeprefix(": ") for line in lines)) from None
    fixed = [text for text in overrides if text.partition("=")[0].strip() in ("name", "seed")]
    if fixed:
        raise ConfigError(
            f"{fixed[0]}: name and seed of a grid's runs stand in {path} (name, seeds); change them there"
        )
    base = read_yaml(path.parent / grid.base)
    hardware, runs, faults = detect_hardware(), [], []
    for arm, values in grid.all_arms().items():
        for seed in grid.seeds:
            name = f"{grid.name}-{arm}-s{seed}"
            settings = [*override_texts({**grid.common, **values}), *overrides, f"name={name}", f"seed={seed}"]
            try:
                config = resolve(parse_config(base, settings, where=f"{path}, arm {arm}"), hardware)
            except ConfigError as error:
                faults.append(str(error))
                break  # the other seeds have the same faults
            runs.append(GridRun(arm, seed, config, fingerprint(config)))
    faults += [
        _foreign(cell) for cell in runs if cell.record().get("fingerprint", cell.fingerprint) != cell.fingerprint
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    return grid, runs


def _run_all(
    waiting: Sequence[GridRun],
    grid: GridConfig,
    runs: Sequence[GridRun],
    failures: dict[str, str],
    *,
    say: Callable[[str], None],
    run: Callable[[RunConfig], Any],
    session: Callable[[RunConfig], AbstractContextManager[Any]],
) -> None:
    """Run the cells in turn; `failures` gets the error of each that fails, by name."""
    for number, cell in enumerate(waiting, start=1):
        say(f"[{number}/{len(waiting)}] {cell.config.name}")
        try:
            with session(cell.config):  # inside the grid's own session: only checks that the run fits
                run(cell.config)
        except Interrupted:
            _collect(grid, runs, failures)
            raise
        except Exception as error:  # whatever kills one run, the next is independent of it; it is recorded and shown
            failures[cell.config.name] = f"{type(error).__name__}: {error}"
            say(f"{cell.config.name} failed: {error}")
        _collect(grid, runs, failures)


def _collect(grid: GridConfig, runs: Sequence[GridRun], failures: dict[str, str]) -> str:
    """Write `results.json` from the runs' records; returns where it is."""
    entries = [_entry(cell, failures.get(cell.config.name)) for cell in runs]
    if grid.baseline is not None:
        against = {entry["seed"]: entry for entry in entries if entry["arm"] == grid.baseline}
        for entry in entries:
            entry["versus_baseline"] = _difference(entry, against.get(entry["seed"]))
    folder = Storage(runs[0].config.storage).child(f"{grid.name}-grid")
    folder.write_json({"name": grid.name, "baseline": grid.baseline, "runs": entries}, "results.json")
    return folder.path("results.json")


def _entry(cell: GridRun, failure: str | None) -> dict[str, Any]:
    """What is known of one run: figures by stage and domain, forgetting, transfer."""
    record = cell.record()
    outcome = "failed" if failure else record.get("outcome", "pending")
    entry = {
        "name": cell.config.name,
        "arm": cell.arm,
        "seed": cell.seed,
        "fingerprint": cell.fingerprint,
        "outcome": outcome,
        "error": failure or record.get("error"),
    }
    if not cell.folder.exists("scores.json"):
        return entry
    scores = cell.folder.read_json("scores.json")
    for figure in ("bits_per_byte", "loss"):
        rows = (dict(zip(scores["domains"], row, strict=True)) for row in scores[figure])
        entry[figure] = dict(zip(scores["stages"], rows, strict=True))
    return {**entry, **{key: scores.get(key) for key in ("forgetting", "backward_transfer", "forward_transfer")}}


def _difference(entry: dict[str, Any], baseline: dict[str, Any] | None) -> dict[str, float] | None:
    """Bits per byte of each domain after the last stage, less the baseline's of the same seed; None if either lacks."""
    if baseline is None or any(
        part["outcome"] != "done" or not part.get("bits_per_byte") for part in (entry, baseline)
    ):
        return None
    own, other = (list(part["bits_per_byte"].values())[-1] for part in (entry, baseline))
    shared = (domain for domain in own if own[domain] is not None and other.get(domain) is not None)
    return {domain: own[domain] - other[domain] for domain in shared}


def _foreign(cell: GridRun) -> str:
    return (
        f"{cell.folder.uri} holds a run of another config (fingerprint {cell.record().get('fingerprint')}, this one is "
        f"{cell.fingerprint}); give the grid another name, or delete that folder"
    )


def _label(path: str, value: Any) -> str:
    """A short name for one setting: `replay_ratio-0.05`."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", f"{path.rpartition('.')[2]}-{value}").strip("-.")


def _cpus(config: RunConfig) -> int:
    from nexus_ray.session import stage_demands

    return max(demand.cpus for demand in stage_demands(config))


def _ray_session() -> Callable[[RunConfig], AbstractContextManager[Any]]:
    from nexus_ray.session import ray_session

    return ray_session


def _roadmap() -> Callable[[RunConfig], Any]:
    from nexus_ray.report.page import write_report
    from nexus_ray.roadmap import run_roadmap

    return lambda config: run_roadmap(config, report=write_report)
