"""Generated Python runs here: in namespaces of its own, without network, host files, environment or time to waste.

A program gets an interpreter and its standard library (read-only), an empty work folder in memory, three devices and
nothing else: new user, mount, process, network, ipc, host-name and cgroup namespaces, a seccomp filter, no capability,
limits on processor time, memory, files and processes. Works for root (programs run as `nobody`) and for any user that
may make user namespaces. Invariant: a program runs isolated or not at all, unless `isolation: none` says otherwise.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import secrets
import subprocess
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nexus_ray.config.validators import SandboxConfig
from nexus_ray.errors import SynthesisError
from nexus_ray.synthesis.jail import bare_command, inside, seccomp, view

Outcome = Literal["passed", "failed", "timeout", "memory", "killed", "refused"]
_GRACE_S = 20.0
"""Time for the supervisor to start and to clean up, beyond the program's own."""


@dataclass(frozen=True)
class Result:
    """What became of a program."""

    outcome: Outcome
    """`passed`: it and its tests ran to their end. `failed`: an exception, or an early exit. `timeout`, `memory`: that
    limit. `killed`: by a signal or for printing too much. `refused`: it was not run; `reason` says why."""
    reason: str
    """For `timeout`, `memory`, `killed` and `refused`; also whether processes were left behind."""
    seconds: float
    """From the program's start to its end."""
    output: str
    """The last 4096 characters that it printed; then, if the tests asked for it, a line `checks N`."""


@dataclass(frozen=True)
class Probe:
    """What this machine offers."""

    isolated: bool
    reason: str
    """Why not, and what would help; empty if it does."""
    seconds: float
    """What an empty program costs, its surroundings included."""


class Sandbox:
    """Runs programs under the limits of a config. Safe to use from several threads."""

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self.config = config or SandboxConfig()
        if self.config.isolation == "none":
            warnings.warn(
                "sandbox.isolation=none: generated code runs with the rights of this process and with network; use it "
                "only on a machine that is thrown away, or remove the line",
                RuntimeWarning,
                stacklevel=2,
            )

    def run(self, program: str, tests: str = "") -> Result:
        """Run a program and then its tests, which see all names of the program and may import it as `solution`.

        Functions `test...` that need no argument, classes `Test...`, unittest's cases and main guards are run too, as
        `jail.driver` says. Never raises for what the program does.
        """
        if self.config.isolation == "none":
            with tempfile.TemporaryDirectory(prefix="nexus-ray-program-") as folder:
                return _supervised(self._job(program, tests), folder)
        if not seccomp.supported():
            return Result("refused", f"no seccomp filter for {platform.machine()} machines", 0.0, "")
        return _supervised(self._job(program, tests), "/")

    def _job(self, program: str, tests: str) -> inside.Job:
        config = self.config
        return inside.Job(
            program=program,
            tests=tests,
            mark=secrets.token_hex(16),
            driver=_driver_source(),
            python=view.interpreter(),
            visible=view.visible_paths(),
            parent=os.getpid(),
            isolate=config.isolation == "required",
            wall_seconds=config.wall_seconds,
            memory_bytes=config.memory_mb * 2**20,
            work_bytes=config.work_mb * 2**20,
            output_bytes=config.output_kb * 2**10,
            processes=config.processes,
            files=config.files,
        )


@functools.cache
def probe() -> Probe:
    """Whether programs can be isolated here, found out by running an empty one; asked once per process."""
    result = Sandbox(SandboxConfig()).run("")
    if result.outcome == "passed":
        return Probe(True, "", result.seconds)
    reason = result.reason or result.output.strip() or result.outcome
    return Probe(False, f"{reason}{_hint()}", result.seconds)


def require_sandbox(config: SandboxConfig) -> Sandbox:
    """A sandbox that has been tried. Raises SynthesisError with the reason and the way out if there is none."""
    if config.isolation == "required" and not probe().isolated:
        raise SynthesisError(
            f"sandbox.isolation=required, but programs cannot be isolated on this machine: {probe().reason}; or leave "
            f"out the python_code validator, or set sandbox.isolation=none on a machine that is thrown away"
        )
    return Sandbox(config)


def _supervised(job: inside.Job, folder: str) -> Result:
    try:
        done = subprocess.run(
            bare_command("supervise"),
            input=json.dumps(asdict(job)).encode(),
            capture_output=True,
            env={},
            cwd=folder,
            start_new_session=True,
            timeout=job.wall_seconds + _GRACE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Result("timeout", "the supervisor did not answer and was ended", job.wall_seconds + _GRACE_S, "")
    if done.returncode or not done.stdout:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return Result("refused", f"the supervisor ended with exit code {done.returncode}: {last}", 0.0, "")
    return Result(**json.loads(done.stdout))


@functools.cache
def _driver_source() -> str:
    return (Path(__file__).parent / "jail" / "driver.py").read_text(encoding="utf-8")


def _hint() -> str:
    """Settings of this machine that are known to forbid namespaces."""
    known = {
        "kernel/unprivileged_userns_clone": "0",
        "kernel/apparmor_restrict_unprivileged_userns": "1",
        "user/max_user_namespaces": "0",
    }
    found = []
    for name, bad in known.items():
        path = Path("/proc/sys", name)
        if path.exists() and path.read_text().strip() == bad:
            found.append(f"{name.replace('/', '.')}={bad}")
    if found:
        return f" ({', '.join(found)} forbids it; change that with sysctl)"
    return " (in a container: allow user namespaces, as with --security-opt seccomp=unconfined, or run privileged)"
