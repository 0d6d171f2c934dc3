"""What the `auto` settings of a config need to know about this machine, found without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hardware:
    """The machine that a config is resolved for."""

    cpus: int
    """Cores this process may use (affinity and container limit respected)."""
    amx_bf16: bool = False
    """The processor multiplies bf16 matrices in hardware tiles (Intel AMX)."""


def detect_hardware() -> Hardware:
    """Describe the machine this runs on."""
    return Hardware(cpus=usable_cpus(), amx_bf16="amx_bf16" in _cpu_flags())


def usable_cpus() -> int:
    """Cores this process may use: its affinity mask, cut by the cgroup's quota (rounded up)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = _cgroup_quota()
    return max(1, cores if quota is None else min(cores, quota))


def _cgroup_quota() -> int | None:
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no cgroup v2 here: no quota known
        return None
    return None if limit == "max" else -(-int(limit) // int(period))


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())
