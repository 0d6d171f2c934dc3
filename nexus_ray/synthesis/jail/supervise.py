"""Supervises one sandboxed program: makes its namespaces, keeps time, counts memory and output, ends everything.

Runs as a fresh process (a new user namespace needs a process without threads) with a `Job` as JSON on standard input,
and prints `{outcome, reason, seconds, output}`. Invariant: when it has ended, for whatever reason, so has the sandbox;
its first process dies with this one, and the kernel ends all others of that process namespace with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

from nexus_ray.synthesis.jail import inside, linux

NOBODY = 65534
"""The host's user that root's sandboxes run as."""
NAMESPACES = {
    "user": linux.CLONE_NEWUSER,
    "process": linux.CLONE_NEWPID,
    "network": linux.CLONE_NEWNET,
    "ipc": linux.CLONE_NEWIPC,
    "host name": linux.CLONE_NEWUTS,
    "cgroup": linux.CLONE_NEWCGROUP,
}
"""In the order in which they are made; the mount namespace follows in the first process inside."""
TICK_S = 0.05
"""Time between two looks at memory."""


def main() -> None:
    """Entry point: job on standard input, result on standard output, both JSON."""
    job = inside.Job(**json.load(sys.stdin))
    _follow(job.parent)
    try:
        result = _supervise(job)
    except OSError as error:
        result = {"outcome": "refused", "reason": str(error), "seconds": 0.0, "output": ""}
    print(json.dumps(result))


def _follow(parent: int) -> None:
    linux.die_with_parent()
    if os.getppid() != parent:
        os._exit(1)


def _supervise(job: inside.Job) -> dict[str, Any]:
    as_root = os.geteuid() == 0
    if job.isolate:
        _enter_namespaces(as_root=as_root)
        _follow(job.parent)  # new credentials may have undone it
    output, output_end = os.pipe()
    report, report_end = os.pipe()
    go_end, go = os.pipe()
    first = os.fork()
    if not first:
        for descriptor in (output, report, go):
            os.close(descriptor)
        inside.run(job, as_root=as_root and job.isolate, output=output_end, report=report_end, go=go_end)
    for descriptor in (output_end, report_end, go_end):
        os.close(descriptor)
    watch = Watch(job, first, output, report)
    try:
        ready = os.read(report, 4096)
        if ready == b"ready\n":
            os.write(go, b"g")
            watch.until_end()
        else:
            watch.hear(ready)
    finally:
        watch.end()
    return watch.result()


class Watch:
    """What is known of a running program, and the end of it."""

    def __init__(self, job: inside.Job, first: int, output: int, report: int) -> None:
        self.job = job
        self.first = first
        self.output, self.report = output, report
        self.started = time.monotonic()
        self.seconds = 0.0
        self.printed = bytearray()
        self.said: dict[str, Any] = {}
        self.stopped: tuple[str, str] | None = None
        """Outcome and reason, if it was this process that ended the program."""

    def until_end(self) -> None:
        """Returns when the program has ended or must be ended."""
        self.started = time.monotonic()
        poll = select.poll()
        poll.register(self.output, select.POLLIN)
        poll.register(self.report, select.POLLIN)
        looked = 0.0
        while not self.said and not self.stopped:
            now = time.monotonic() - self.started
            if now >= self.job.wall_seconds:
                self.stopped = "timeout", f"no end after {self.job.wall_seconds:g} s"
            elif now - looked >= TICK_S:
                looked = now
                self._check_memory()
            for descriptor, _ in poll.poll(1000 * min(TICK_S, max(self.job.wall_seconds - now, 0.001))):
                if descriptor == self.report:
                    self.hear(os.read(self.report, 4096))
                elif not self._read_output():
                    poll.unregister(self.output)

    def hear(self, line: bytes) -> None:
        self.said = json.loads(line.partition(b"\n")[0]) if line else {"lost": True}

    def _read_output(self) -> bool:
        """Whether there may be more to read."""
        data = os.read(self.output, 65536)
        self.printed += data[: self.job.output_bytes + 256 - len(self.printed)]
        if len(self.printed) > self.job.output_bytes + 128 and not self.stopped:
            self.stopped = "killed", f"printed more than {self.job.output_bytes} bytes"
        return bool(data)

    def _check_memory(self) -> None:
        used = sum(_resident(pid) for pid in inside.descendants(self.first))
        if used > self.job.memory_bytes:
            self.stopped = "memory", f"{used // 2**20} MiB in use, {self.job.memory_bytes // 2**20} allowed"

    def end(self) -> None:
        """End all that runs, wait until it is gone, and read what was still in the pipe."""
        self.seconds = time.monotonic() - self.started
        with contextlib.suppress(ProcessLookupError):
            (os.kill if self.job.isolate else os.killpg)(self.first, signal.SIGKILL)
        os.waitpid(self.first, 0)  # of a process namespace's first: returns when the namespace is empty
        os.set_blocking(self.output, False)
        with contextlib.suppress(BlockingIOError):
            while self._read_output():
                pass

    def result(self) -> dict[str, Any]:
        outcome, reason, output = self._outcome()
        left = self.said.get("left", 0)
        if left:
            note = f"{left} process{'es' if left > 1 else ''} left running, ended"
            reason = f"{reason}; {note}" if reason else note
        tail = output.decode(errors="replace")[-4096:]
        return {"outcome": outcome, "reason": reason, "seconds": round(self.seconds, 3), "output": tail}

    def _outcome(self) -> tuple[str, str, bytes]:
        started, mark, word = bytes(self.printed).rpartition(f"\n{self.job.mark}".encode())
        if not mark:
            started, word = word, b""
        output = started.removeprefix(f"{self.job.mark}\n".encode())
        if "refused" in self.said:
            return "refused", self.said["refused"], b""
        if self.stopped:
            return *self.stopped, output
        status = self.said.get("status")
        if output is started and status is not None:
            return "refused", f"the interpreter did not start (exit code {status}): {_last_line(output)}", b""
        if status is None:
            return "killed", "the sandbox was ended from outside, by the system's memory limit perhaps", output
        if status < 0:
            if -status == signal.SIGXCPU:
                return "timeout", "used up its processor time", output
            return "killed", f"ended by {signal.Signals(-status).name}", output
        if status or not word:
            return "failed", f"ended with exit code {status} before its tests did", output
        for name, reason in (("passed", ""), ("memory", "an allocation was refused"), ("failed", "")):
            if word.startswith(name.encode()):
                return name, reason, output
        return "failed", "its last words were overwritten", output


def _last_line(output: bytes) -> str:
    return output.decode(errors="replace").strip().rpartition("\n")[2][:300]


def _resident(pid: int) -> int:
    """Bytes of memory of a process, shared pages divided among their users; 0 if it has just ended or not yet begun.

    What is still a copy of our own first process may not be looked at, and holds nothing of the program's.
    """
    gone = (FileNotFoundError, ProcessLookupError, PermissionError)
    with contextlib.suppress(*gone), open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _enter_namespaces(*, as_root: bool) -> None:
    """Move this process into new namespaces; the process namespace takes effect for its children.

    Root's sandboxes run as `nobody`: the kernel exempts root from the limit on processes. A helper outside writes the
    map of users, because root has no right to name another user from inside.
    """
    me, user, group = os.getpid(), os.geteuid(), os.getegid()
    ready, ready_end = os.pipe()
    answer, answer_end = os.pipe()
    helper = os.fork()
    if not helper:
        os.close(ready_end)
        if os.read(ready, 1) == b"g":
            os.write(answer_end, _write_maps(me, user, group, as_root=as_root).encode())
        os._exit(0)
    os.close(answer_end)
    try:
        for name, flag in NAMESPACES.items():
            linux.unshare(flag, f"new {name} namespace")
            if flag == linux.CLONE_NEWUSER:
                os.write(ready_end, b"g")
                failed = os.read(answer, 4096).decode()
                if failed:
                    raise OSError(1, f"map of users: {failed}")
    finally:
        os.close(ready_end)
        os.waitpid(helper, 0)
    linux.hide_memory()


def _write_maps(pid: int, user: int, group: int, *, as_root: bool) -> str:
    """Why the maps could not be written; empty if they were."""
    inner = inside.USER
    try:
        if not as_root:
            _write(f"/proc/{pid}/setgroups", "deny")
        _write(f"/proc/{pid}/uid_map", f"0 0 1\n{inner} {NOBODY} 1" if as_root else f"{inner} {user} 1")
        _write(f"/proc/{pid}/gid_map", f"0 0 1\n{inner} {NOBODY} 1" if as_root else f"{inner} {group} 1")
    except OSError as error:
        return str(error)
    return ""


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
