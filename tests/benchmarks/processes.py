"""CPU time and peak memory of a Ray session's processes, read from /proc while they live."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

_TICKS = os.sysconf("SC_CLK_TCK")


def descendants(root: int | None = None) -> dict[int, float]:
    """CPU seconds so far of every process below `root` (default: this one)."""
    children: dict[int, list[int]] = {}
    cpu: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:  # it has just ended
                continue
            fields = text[text.rindex(")") + 2 :].split()
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            cpu[int(entry.name)] = (int(fields[11]) + int(fields[12])) / _TICKS
    found: dict[int, float] = {}
    todo = list(children.get(root or os.getpid(), []))
    while todo:
        pid = todo.pop()
        found[pid] = cpu[pid]
        todo += children.get(pid, [])
    return found


def title(pid: int) -> str:
    """What a process is: `RayTrainWorker`, `raylet`, `python ...`; empty if it has gone."""
    try:
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    first = words[0].split(" ")[0]
    if first.startswith("ray::"):
        return first.removeprefix("ray::").split(".")[0]
    script = next((word for word in words[1:] if word.endswith(".py")), "")
    return Path(script or first).name


class Watch:
    """Peak resident memory in bytes of every process below this one, by what it does; sampled ten times a second.

    A process of Ray's changes its title with its work and counts for each one it had.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        """Private and mapped memory together, as the kernel's high-water mark has it."""
        self.private: dict[str, float] = {}
        """Memory that belongs to the process alone (no shared object store, no files)."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.1):
            for pid in descendants():
                self._look(pid)

    def _look(self, pid: int) -> None:
        try:
            lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
        except OSError:
            return
        values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM", "RssAnon"))}
        name = title(pid)
        if name and "VmHWM" in values:
            self.peaks[name] = max(self.peaks.get(name, 0), int(values["VmHWM"]) * 1024)
            self.private[name] = max(self.private.get(name, 0), int(values["RssAnon"]) * 1024)
