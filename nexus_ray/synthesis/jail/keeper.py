"""Keeps one server: starts it, and ends it, and all that it started, with its owner.

Runs as a fresh process, given the owner's process id, seconds of grace and the server's command. Invariant: once the
owner closes our standard input, or is gone for whatever reason (SIGKILL too), so are soon the server and its
descendants; if this process is killed instead, the kernel ends the server. A signal on the parent's death alone
(PR_SET_PDEATHSIG) would not do for the owner: it goes by the thread that started a process, and threads come and go.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

from nexus_ray.synthesis.jail import inside, linux

TICK_S = 0.1
KILL_S = 10.0
"""Longest time that processes which were sent SIGKILL are waited for."""


def main() -> None:
    """Entry point. Ends with 0 if the end was asked for; else as the server did, 128 added to the number of a signal
    that ended it."""
    owner, grace_s, command = int(sys.argv[3]), float(sys.argv[4]), sys.argv[5:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    linux.adopt_orphans()
    kept = Kept(command)
    try:
        alone = kept.until_end(owner)
    except SystemExit:
        alone = False
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    kept.end(owner, 0.0 if alone else grace_s)
    code = kept.code if alone and kept.code is not None else 0
    sys.exit(code if code >= 0 else 128 - code)


class Kept:
    """The server and what descends from it."""

    def __init__(self, command: list[str]) -> None:
        me = os.getpid()
        self.code: int | None = None
        """How the server ended: its exit code, or a signal's number, negative."""
        self.pid = os.fork()
        if not self.pid:
            _become(command, me)

    def until_end(self, owner: int) -> bool:
        """Whether the server ended by itself; else the owner wants it ended, or is gone."""
        while not self._reap():
            asked = select.select([0], [], [], TICK_S)[0]
            if (asked and not os.read(0, 4096)) or os.getppid() != owner:
                return False
        return True

    def end(self, owner: int, grace_s: float) -> None:
        """Ask all to end, wait up to `grace_s` if there is still an owner, then make them."""
        self._signal(signal.SIGTERM)
        until = time.monotonic() + grace_s
        while self._left() and time.monotonic() < until and os.getppid() == owner:
            time.sleep(0.02)
        until = time.monotonic() + KILL_S
        while self._left() and time.monotonic() < until:
            self._signal(signal.SIGKILL)
            time.sleep(0.02)

    def _left(self) -> list[int]:
        """Processes that still run; orphans have become children of this one, whatever their group."""
        self._reap()
        return inside.descendants(os.getpid())

    def _signal(self, number: int) -> None:
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def _reap(self) -> bool:
        """Collect those that have ended; whether the server is among them."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self.pid:
                    self.code = os.waitstatus_to_exitcode(found[1])
        return self.code is not None


def _become(command: list[str], keeper: int) -> None:
    """Turn this new process into the server: a session of its own, an empty standard input, default signals."""
    try:
        os.setsid()
        linux.die_with_parent()
        if os.getppid() != keeper:
            os._exit(1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]} cannot be started: {error.strerror}\n".encode())
    os._exit(127)


if __name__ == "__main__":
    main()
