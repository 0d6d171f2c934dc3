"""`nexus-ray doctor`: checks what a run needs on this machine, and says the remedy for whatever is missing.

A check reports, it never repairs. Exit code 0 if nothing that stops a run is wrong, else 1.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from nexus_ray.config import HubSource, RunConfig, detect_hardware
from nexus_ray.errors import ConfigError

Level = Literal["ok", "note", "fail"]

TESTED = {
    "ray": "2.60.",
    "deepspeed": "0.19.",
    "torch": "2.",
    "transformers": "5.",
    "datasets": "5.",
    "pyarrow": "2",
    "pydantic": "2.",
}
"""Package -> start of the versions it was tested with."""
MIN_DISK_BYTES = 5 << 30
MIN_SHM_BYTES = 1 << 30
HUB_TIMEOUT_S = 3.0
MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "fail": "[red]FAIL[/red]"}


@dataclass(frozen=True)
class Finding:
    """Outcome of one check; `remedy` says what to do, and is empty when all is well."""

    subject: str
    level: Level
    found: str
    remedy: str = ""


def run_doctor(config: RunConfig | None = None, *, deep: bool = False, console: Console | None = None) -> int:
    """Print every check; returns 0, or 1 if one failed. `deep` also starts Ray and runs a task."""
    console = console or Console()
    table = Table("check", "", "found", "remedy", title="nexus-ray doctor")
    findings = list(examine(config, deep=deep))
    for item in findings:
        table.add_row(item.subject, MARKS[item.level], item.found, item.remedy)
    console.print(table)
    failed = [item.subject for item in findings if item.level == "fail"]
    console.print(f"{len(failed)} to mend: {', '.join(failed)}" if failed else "ready")
    return 1 if failed else 0


def examine(config: RunConfig | None = None, *, deep: bool = False) -> Iterator[Finding]:
    """Every check in turn. A check that breaks is itself a failed check: the doctor sees all patients."""
    checks: list[Callable[[], Finding]] = [check_python, *(lambda n=name: check_package(n) for name in TESTED)]
    checks += [check_torch, check_device, check_ray, check_deepspeed, check_compiler]
    checks += [check_shared_memory, lambda: check_storage(config), lambda: check_disk(config)]
    checks += [lambda: check_hub(config)]
    if deep:
        checks.append(check_ray_starts)
    for check in checks:
        try:
            yield check()
        except Exception as error:  # reported, not swallowed: the finding carries it
            name = getattr(check, "__name__", "check").removeprefix("check_")
            yield Finding(name, "fail", f"{type(error).__name__}: {error}", "reinstall with `make clean && make test`")


def check_python() -> Finding:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.prefix == sys.base_prefix and "CI" not in os.environ:
        return Finding("python", "note", found, "this is not a virtual environment; `make demo` makes one in .venv")
    return Finding("python", "ok", found)


def check_package(name: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "fail", "not installed", "pip install -c constraints.txt -e .")
    if not found.startswith(TESTED[name]):
        return Finding(name, "note", found, f"tested with {TESTED[name]}*: pip install -c constraints.txt -e .")
    return Finding(name, "ok", found)


def check_torch() -> Finding:
    torch: Any = importlib.import_module("torch")
    hardware = detect_hardware()
    found = f"{torch.get_num_threads()} threads, {hardware.cpus} usable cores"
    if torch.get_num_threads() > hardware.cpus:
        return Finding(
            "cpu threads", "note", found, f"set OMP_NUM_THREADS={hardware.cpus}; more threads than cores are slower"
        )
    return Finding("cpu threads", "ok", found)


def check_device() -> Finding:
    torch: Any = importlib.import_module("torch")
    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        return Finding("device", "ok", f"{torch.cuda.device_count()} x {', '.join(names)}; bf16 by default")
    if detect_hardware().amx_bf16:
        return Finding("device", "ok", "CPU with AMX; bf16 by default")
    if Path("/proc/driver/nvidia/version").exists():
        return Finding(
            "device", "note", "a GPU is there, but torch cannot use it", "install a CUDA build of torch for this driver"
        )
    return Finding("device", "ok", "CPU without AMX; fp32 by default")


def check_ray() -> Finding:
    for module in ("ray", "ray.data", "ray.train.torch", "ray.tune"):
        importlib.import_module(module)
    try:
        importlib.import_module("aiohttp")
        importlib.import_module("ray.job_submission")
    except ImportError as error:
        remedy = 'pip install -c constraints.txt "ray[default,data,train,tune]"'
        return Finding("ray parts", "fail", f"the minimal Ray is installed ({error})", remedy)
    address = os.environ.get("RAY_ADDRESS")
    return Finding("ray parts", "ok", f"$RAY_ADDRESS={address}" if address else "a local head will be started")


def check_ray_starts() -> Finding:
    """Start a local head, run one task, stop it (seconds)."""
    ray: Any = importlib.import_module("ray")
    if ray.is_initialized():
        return Finding("ray start", "ok", "already running")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        answer = ray.get(ray.remote(_forty_two).remote(), timeout=60)
    finally:
        ray.shutdown()
    return Finding("ray start", "ok", f"a head started and a task answered {answer}")


def _forty_two() -> int:
    return 42


def check_deepspeed() -> Finding:
    try:
        with _silent_logs():
            importlib.import_module("deepspeed")
    except Exception as error:
        remedy = "pip install -c constraints.txt deepspeed (on a GPU machine it also wants CUDA_HOME or no nvcc at all)"
        return Finding("deepspeed import", "fail", f"{type(error).__name__}: {error}", remedy)
    return Finding("deepspeed import", "ok", "imports")


@contextmanager
def _silent_logs() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def check_compiler() -> Finding:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        return Finding(
            "c++ compiler",
            "note",
            "none found",
            "needed only by training.compile and offload_optimizer: apt-get install g++",
        )
    return Finding("c++ compiler", "ok", compiler)


def check_shared_memory() -> Finding:
    if not Path("/dev/shm").is_dir():
        return Finding("shared memory", "note", "no /dev/shm", "Ray's object store will lie on disk and be slow")
    size = shutil.disk_usage("/dev/shm").total
    found = f"/dev/shm has {size / 2**30:.1f} GiB"
    if size < MIN_SHM_BYTES:
        remedy = "give the container more: docker run --shm-size=2g (Kubernetes: an emptyDir of medium Memory)"
        return Finding("shared memory", "note", found, remedy)
    return Finding("shared memory", "ok", found)


def check_storage(config: RunConfig | None) -> Finding:
    from nexus_ray.storage import Storage

    storage = Storage(config.storage if config else "runs")
    try:
        storage.check_writable()
    except ConfigError as error:
        return Finding("storage", "fail", str(error), "see the message")
    return Finding("storage", "ok", f"{storage.uri} is writable")


def check_disk(config: RunConfig | None) -> Finding:
    from nexus_ray.storage import Storage

    storage = Storage(config.storage if config else "runs")
    if not storage.is_local:
        return Finding("disk", "ok", f"{storage.uri} is an object store")
    folder = next(path for path in (storage.local_path, *storage.local_path.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**30:.0f} GiB free at {folder}"
    if free < MIN_DISK_BYTES:
        return Finding("disk", "fail", found, "free some space, or set storage to a larger disk (5 GiB carry the demo)")
    return Finding("disk", "ok", found)


def check_hub(config: RunConfig | None) -> Finding:
    """Whether the Hugging Face hub answers; a failure only if the config reads from it."""
    names = _hub_users(config)
    if os.environ.get("HF_HUB_OFFLINE") not in (None, "", "0"):
        reachable, found = False, "HF_HUB_OFFLINE is set"
    else:
        reachable, found = _answers(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if reachable:
        return Finding("hub", "ok", found)
    if not names:
        return Finding("hub", "note", found, "needed only by sources of kind hub and by hub models")
    remedy = f"{', '.join(names)} need it: check the network or proxy, or use kind: files, or a local model folder"
    return Finding("hub", "fail", found, remedy)


def _hub_users(config: RunConfig | None) -> list[str]:
    if config is None:
        return []
    users = [f"domains.{name}" for name, domain in config.domains.items() if isinstance(domain.source, HubSource)]
    if config.model.source != "scratch" and not Path(config.model.source).exists():
        users.append("model.source")
    return users


def _answers(url: str) -> tuple[bool, str]:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:  # an answer, if a grumpy one
        return True, f"{url} answers"
    except (OSError, ValueError) as error:
        return False, f"{url} does not answer ({getattr(error, 'reason', error)})"
    return True, f"{url} answers"
