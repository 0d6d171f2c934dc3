"""The first process of the sandbox: builds its root, gives up every privilege, starts the program and reaps.

It sees the host until `build_root` has run. Invariant: the program is started only after every step has succeeded.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nexus_ray.synthesis.jail import linux, seccomp

USER = 1000
"""User and group of the program, as it sees them."""
BASE = "/tmp"
"""Where the new root is put together, in a mount namespace that nobody else sees."""
DEVICES = ("null", "zero", "urandom")
WORK = "/sandbox"


@dataclass(frozen=True)
class Job:
    """What the supervisor is asked to run; the fields travel as JSON."""

    program: str
    tests: str
    mark: str
    """Secret that the driver prints behind the last output."""
    driver: str
    """Source of `jail.driver`."""
    python: str
    """The interpreter's real path."""
    visible: list[list[str]]
    """Pairs (path on this machine, path inside): what is bound read-only."""
    parent: int
    """Process id of who waits for the result."""
    isolate: bool
    wall_seconds: float
    memory_bytes: int
    work_bytes: int
    output_bytes: int
    processes: int
    files: int


def build_root(job: Job, *, uid: int, gid: int) -> None:
    """A root of the interpreter, three devices and an empty work folder; nothing else of the host can be named."""
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", BASE, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=0755")
    os.mkdir(f"{BASE}/old")
    linux.pivot_root(BASE, f"{BASE}/old")
    os.chdir("/")
    for source, target in job.visible:
        _bind(f"/old{source}", target)
        linux.make_read_only(target, linux.ATTR_NOSUID | linux.ATTR_NODEV)
    for name in DEVICES:
        _bind(f"/old/dev/{name}", f"/dev/{name}")
    os.mkdir(WORK)
    options = f"size={job.work_bytes},nr_inodes=4096,mode=0700,uid={uid},gid={gid}"
    linux.mount("tmpfs", WORK, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC, options)
    if not os.path.exists("/tmp"):  # it does where the interpreter lies in it
        os.symlink(WORK, "/tmp")
    linux.unmount("/old")
    os.rmdir("/old")
    linux.make_read_only("/", recursive=False)
    os.chdir(WORK)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    linux.mount(source, target, None, linux.MS_BIND | linux.MS_REC)


def give_up_privileges(*, as_root: bool) -> None:
    """No capability, no way to gain one, and under root another user."""
    linux.drop_bounding_set()
    if as_root:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    linux.drop_capabilities()
    linux.hide_memory()


def set_limits(job: Job, *, others: int) -> None:
    """Limits of the program and what it starts; `others` processes of the same user are ours."""
    seconds = int(job.wall_seconds) + 1
    limits = {
        resource.RLIMIT_AS: job.memory_bytes,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: job.work_bytes,
        resource.RLIMIT_NOFILE: job.files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if job.isolate:  # without a user namespace it would count every process of this user on the machine
        limits[resource.RLIMIT_NPROC] = job.processes + others
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def run(job: Job, *, as_root: bool, output: int, report: int, go: int) -> None:
    """Body of the first process; never returns. What happened goes to `report` as one line of JSON."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # default signals do not reach a namespace's first process
    try:
        if job.isolate:
            linux.unshare(linux.CLONE_NEWNS, "new mount namespace")
            socket.sethostname("sandbox")
            build_root(job, uid=USER, gid=USER)
            give_up_privileges(as_root=as_root)
        else:
            os.setpgid(0, 0)
            linux.adopt_orphans()
        linux.die_with_parent()
        os.write(report, b"ready\n")
        if os.read(go, 1) != b"g":  # the supervisor is gone
            os._exit(1)
        said = _watch(job, *_start(job, others=1 if as_root else 2, output=output, report=report))
    except OSError as error:
        os.write(report, _line({"refused": str(error)}))
    else:
        os.write(report, _line(said))
    finally:
        os._exit(0)


def _line(said: Mapping[str, object]) -> bytes:
    return json.dumps(said).encode() + b"\n"


def _start(job: Job, *, others: int, output: int, report: int) -> tuple[int, int]:
    """Process id of the program, and the writing end of its standard input."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(read)
        os.close(output)
        return child, write
    try:
        if job.isolate:
            os.setsid()
        for source, target in ((read, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        linux.die_with_parent()
        set_limits(job, others=others)
        if job.isolate:
            linux.install_filter(seccomp.build_filter(platform.machine()))
        # -I would ignore PYTHONHASHSEED, and the order of a set must not decide a verdict
        flags = ["-s", "-S", "-P", "-B", "-X", "utf8"]
        os.execve(job.python, [job.python, *flags, "-c", job.driver], {"PYTHONHASHSEED": "0"})
    except OSError as error:
        os.write(report, _line({"refused": f"start of {job.python}: {error}"}))
    finally:  # all descriptors but the first three close by themselves when the interpreter starts
        os._exit(127)


def _watch(job: Job, child: int, feed: int) -> dict[str, int]:
    """Wait for the program, then end and count what it left behind."""
    with contextlib.suppress(BrokenPipeError), open(feed, "w", encoding="utf-8") as stream:
        json.dump({"program": job.program, "tests": job.tests, "mark": job.mark}, stream)
    while True:
        pid, status = os.wait()
        if pid == child:
            return {"status": os.waitstatus_to_exitcode(status), "left": _end_the_rest(job.isolate)}


def _end_the_rest(isolated: bool) -> int:
    if isolated and os.getpid() == 1:  # -1 means everybody: only ever inside a process namespace
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    else:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    left = 0
    while True:
        try:
            _, status = os.wait()
        except ChildProcessError:
            return left
        left += os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, as this process numbers them; none where the kernel does not tell."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found
