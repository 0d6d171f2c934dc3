"""A server on the loopback that this process owns: started, watched, started again when it dies, ended.

A thread of its own does all that, so that the server outlives any event loop. Invariant: `up` is true only while the
server has said that it can write; once `stop` has returned, or this process is gone in whatever way, nothing of it runs
(see `jail.keeper`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Literal

from nexus_ray.errors import SynthesisError
from nexus_ray.synthesis.generators.server_process import DEAF, HOST, Launch, Process, probe

POLL_S = 0.1
PROBE_EVERY_S = 2.0
SICK_PROBES = 2
"""A server that was healthy and says so often in a row that it is not (vLLM: 503 when its engine has died, PR 24897)
or does not even listen, is dead, although its process is not."""
SILENT_S = 300.0
"""So is one that says nothing for so long. vLLM under a burst has been seen to need more than 10 s (ray#54070)."""
LISTEN_S = 1.0
_State = Literal["new", "starting", "up", "failed", "stopped"]


class Server:
    """One server; `with Server(...) as server: server.start()` or `stop` at the end. Safe to use from any thread."""

    def __init__(self, launch: Launch, *, start_timeout_s: float, max_restarts: int) -> None:
        self.launch = launch
        self.restarts = 0
        """Times that it was started again."""
        self._start_timeout_s = start_timeout_s
        self._max_restarts = max_restarts
        self._state: _State = "new"
        self._error = ""
        self._stopping = threading.Event()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Server({self.launch.name}, {HOST}:{self.launch.port}, {self._state})"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def up(self) -> bool:
        """Whether it can be asked now."""
        return self._state == "up"

    def begin(self) -> None:
        """Have it started, without waiting for it; again does nothing."""
        with self._guard:
            if self._thread is None and not self._stopping.is_set():
                self._state = "starting"
                self._thread = threading.Thread(target=self._work, name=f"server-{self.launch.port}", daemon=True)
                self._thread.start()

    def start(self) -> None:
        """Have it started and wait until it is healthy. Raises SynthesisError with the end of what it printed."""
        self.begin()
        while not self._settled():
            time.sleep(POLL_S)

    async def until_up(self) -> None:
        """`start`, for code in an event loop."""
        self.begin()
        while not self._settled():
            await asyncio.sleep(POLL_S)

    async def check(self) -> None:
        """After a call that failed: if nobody listens any more, it is not `up`, before its own thread has noticed."""
        try:
            async with asyncio.timeout(LISTEN_S):
                _, writer = await asyncio.open_connection(HOST, self.launch.port)
            writer.close()
        except TimeoutError:
            return  # it listens, and is slow
        except OSError:
            self._become("starting", only_from="up")

    def stop(self) -> None:
        """End it and all that it started; returns when nothing is left. It cannot be started again."""
        self._stopping.set()
        with self._guard:
            thread, self._state = self._thread, "failed" if self._error else "stopped"
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _settled(self) -> bool:
        if self._state == "failed":
            raise SynthesisError(self._error)
        if self._state == "stopped":
            raise SynthesisError(f"{self.launch.name}: the server was stopped; make a new generator to go on")
        return self.up

    # --- the server's own thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        fault, was_up = "", False
        while not self._stopping.is_set():
            fault, healthy = self._live()
            was_up = was_up or healthy
            self._become("starting")
            if not was_up or self.restarts >= self._max_restarts:
                break
            self.restarts += not self._stopping.is_set()
        if fault and not self._stopping.is_set():
            again = f"; it had been started {self.restarts} more times, max_restarts={self._max_restarts}"
            self._error = f"{self.launch.name}: {fault}{again if was_up else ''}"
            self._become("failed")

    def _live(self) -> tuple[str, bool]:
        """One life of the server: what ended it, empty if it is to be stopped; and whether it ever was healthy."""
        try:
            process = Process(self.launch)
        except OSError as error:
            return f"no process could be started for the server ({error.strerror})", False
        try:
            if fault := self._until_healthy(process):
                return fault, False
            self._become("up")
            return self._while_healthy(process), True
        finally:
            process.stop()

    def _become(self, state: _State, *, only_from: _State | None = None) -> None:
        with self._guard:
            if not self._stopping.is_set() and only_from in (None, self._state):
                self._state = state

    def _until_healthy(self, process: Process) -> str:
        """Why it is not; empty if it is, or if it is to be stopped."""
        give_up = time.monotonic() + self._start_timeout_s
        while not self._stopping.wait(POLL_S):
            if ended := process.ended():
                return f"the server {ended} before it was healthy. {process.last_words()}"
            if probe(self.launch) in range(200, 300) and not process.ended():
                return ""
            if time.monotonic() >= give_up:
                return (
                    f"the server was not healthy after start_timeout_s={self._start_timeout_s:g} "
                    f"(GET {self.launch.health}); raise that if it only needs longer. {process.last_words()}"
                )
        return ""

    def _while_healthy(self, process: Process) -> str:
        """What ended it; empty if it is to be stopped."""
        process.forget()
        sick, heard = 0, time.monotonic()
        next_probe = heard + PROBE_EVERY_S
        while not self._stopping.wait(POLL_S):
            if ended := process.ended():
                return f"the server {ended} while it was in use{process.error_names()}; {self._where_to_look()}"
            if time.monotonic() < next_probe:
                continue
            status = probe(self.launch)
            now = time.monotonic()
            heard, next_probe = now if status is not None else heard, now + PROBE_EVERY_S
            sick = sick + 1 if status == DEAF or (status or 0) >= 500 else 0
            if sick >= SICK_PROBES or now - heard > SILENT_S:
                said = f"has said nothing for {SILENT_S:g} s" if not sick else f"says {status}"
                said = "no longer listens" if status == DEAF else said
                return f"the server {said} (GET {self.launch.health}){process.error_names()}; {self._where_to_look()}"
            if not sick and status is not None:
                self._become("up")
        return ""

    def _where_to_look(self) -> str:
        if self.launch.log is not None:
            return f"what it printed is in {self.launch.log}"
        return "set `log` to a file to keep what it prints (there may be prompts in it)"
