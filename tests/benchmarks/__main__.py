"""`python -m tests.benchmarks [NAME ...] [--quick] [--out FOLDER]`: run benchmarks, print tables, write records.

Give the machine to it alone: a neighbour on the same cores spoils the figures. All of them take about half an hour.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nexus_ray.config import detect_hardware
from nexus_ray.record import source_commit, versions
from nexus_ray.session import quiet_environment
from tests.benchmarks.figures import table, write_record

NAMES = ("quickstart", "stream", "tax", "precision", "cost", "teachers", "generation", "filters")
MODULES = {"filters": "filtering"}
"""Where a benchmark lies in a module of another name."""
RESULTS = Path(__file__).parent / "results"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones, of {', '.join(NAMES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its figures mean nothing")
    parser.add_argument("--out", type=Path, help=f"folder of the records (default: {RESULTS}; quick: none is kept)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a benchmark's setting")
    found = parser.parse_args(arguments)
    unknown = [name for name in found.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    found.names = [name for name in NAMES if name in (found.names or NAMES)]
    return found


def load(name: str) -> Any:
    """The module of a benchmark."""
    return importlib.import_module(f"tests.benchmarks.{MODULES.get(name, name)}")


def settings_of(module: Any, *, quick: bool, changes: Sequence[str]) -> dict[str, Any]:
    """A benchmark's settings with `key=value` changes; keys of other benchmarks are left to those."""
    settings = dict(module.QUICK if quick else module.SETTINGS)
    for change in changes:
        key, _, value = change.partition("=")
        if key in settings:
            settings[key] = json.loads(value)
    return settings


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    commit, dirty = source_commit()
    here = detect_hardware()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    load = Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else None
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": versions(),
        "hardware": {"processor": model, "cpus": here.cpus, "amx_bf16": here.amx_bf16, "load_before": load},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(sys.argv[1:] if arguments is None else arguments)
    quiet_environment()
    missed = 0
    for name in asked.names:
        module = load(name)
        settings = settings_of(module, quick=asked.quick, changes=asked.set)
        before = machine()
        place = Path(tempfile.mkdtemp(prefix=f"nexus-bench-{name}-"))
        began = time.monotonic()
        try:
            outcome = module.run(place, **settings)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        outcome.notes.append(f"took {time.monotonic() - began:.0f} s; load before: {before['hardware']['load_before']}")
        print(table(outcome), flush=True)
        folder = asked.out or (None if asked.quick else RESULTS)
        if folder is not None:
            path = write_record(outcome, what=name, folder=folder, machine=before, settings=settings)
            print(f"record: {path}", flush=True)
        missed += sum(not bar.met for bar in outcome.bars)
    return 1 if missed and not asked.quick else 0


if __name__ == "__main__":
    sys.exit(main())
