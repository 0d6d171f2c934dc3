"""One life of a server: its process, its health, what may be shown of what it prints.

What a server prints may hold prompts and keys. Invariant: it is shown only from before the server was healthy, when
nobody had asked it anything, and without whatever looks like a key; later only names of errors are.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from nexus_ray.config.generators import looks_like_key
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.jail import bare_command

_log = logging.getLogger(__name__)
HOST = "127.0.0.1"
PORTS = range(20000, 32768)
"""Above those of Ray's workers, below those that Linux gives to outgoing connections, which could take one away."""
GRACE_S = 10.0
"""Time for a server to end when asked to."""
PROBE_S = 5.0
"""Longest time of one look at a server's health."""
DEAF = 0
MARK = "NEXUS_RAY_SERVER"
"""Variable in the environment of all that belongs to one life of a server."""
TAIL_LINES = 30
_LINE = 2048
_ERROR_NAME = re.compile(r"\b[A-Z][A-Za-z]{2,40}(?:Error|Exception)\b", re.ASCII)
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.ASCII)


@dataclass(frozen=True)
class Launch:
    """What is started, and how it is known to be healthy."""

    name: str
    """How errors call it: `vllm Qwen/Qwen3-8B`."""
    command: tuple[str, ...]
    port: int
    health: str = "/health"
    key: str | None = field(default=None, repr=False)
    """What callers must show it."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Set in addition to this process's own."""
    log: Path | None = None


class Process:
    """One life of a server."""

    def __init__(self, launch: Launch) -> None:
        self._secrets = secrets_of({**os.environ, **launch.environment}, launch.key)
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._show = True
        log = open_private(launch.log) if launch.log is not None else None
        self._mark = secrets.token_hex(16)
        self._keeper = subprocess.Popen(
            [*bare_command("keeper"), str(os.getpid()), str(GRACE_S), *launch.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **launch.environment, MARK: self._mark},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(log,), name="server-output", daemon=True)
        self._reader.start()

    def ended(self) -> str:
        """How it ended; empty while it runs."""
        code = self._keeper.poll()
        if code is None:
            return ""
        if 128 < code < 128 + signal.NSIG or code < 0:
            return f"was ended by {signal.Signals(code - 128 if code > 0 else -code).name}"
        return f"ended with exit code {code}"

    def forget(self) -> None:
        """From now on it may print prompts: show nothing of it any more."""
        self._show = False
        self._lines.clear()

    def last_words(self) -> str:
        """The end of what it printed before anybody asked it anything, without secrets."""
        self._reader.join(1.0 if self._keeper.poll() is not None else 0.0)
        if not self._lines:
            return "It printed nothing"
        return redact("The last it printed:\n  " + "\n  ".join(list(self._lines)), self._secrets)

    def error_names(self) -> str:
        """Names of the exceptions it printed last: short identifiers."""
        self._reader.join(1.0 if self._keeper.poll() is not None else 0.0)
        names = dict.fromkeys(name for text in list(self._lines) for name in _ERROR_NAME.findall(text))
        return f" (errors it named last: {', '.join(list(names)[-4:])})" if names else ""

    def stop(self) -> None:
        """End it and all that it started."""
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        try:
            self._keeper.wait(3 * GRACE_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        if self._keeper.returncode < 0:  # somebody killed it, and what the server had started goes on without it
            _end_marked(f"{MARK}={self._mark}".encode())
        self._reader.join(1.0)

    def _read(self, log: BinaryIO | None) -> None:
        """Take all it prints, or it would stand still before a full pipe."""
        output = self._keeper.stdout
        assert output is not None
        with output, log or contextlib.nullcontext():
            while line := output.readline(_LINE):
                if log is not None and not _written(line, log):
                    log = None
                text = line.decode(errors="replace").rstrip()
                self._lines.extend([text] if self._show else _ERROR_NAME.findall(text))


def _end_marked(variable: bytes) -> None:
    """End all processes that have this in their environment; a few milliseconds for the whole machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if variable in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def probe(launch: Launch) -> int | None:
    """Status of the server's word on its health, DEAF if nobody listens, None if it says nothing. Never goes through a
    proxy."""
    connection = http.client.HTTPConnection(HOST, launch.port, timeout=PROBE_S)
    headers = {"Authorization": f"Bearer {launch.key}"} if launch.key else {}
    try:
        connection.request("GET", launch.health, headers=headers)
        return connection.getresponse().status
    except ConnectionRefusedError:
        return DEAF
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def free_port() -> int:
    """A port of the loopback that nobody listens on. Raises ConfigError after 100 that are taken."""
    for _ in range(100):
        port = PORTS[secrets.randbelow(len(PORTS))]
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((HOST, port))
            return port
    raise ConfigError(f"no free port among {PORTS.start}-{PORTS.stop - 1} on {HOST} in 100 tries; end some servers")


def open_private(path: Path) -> BinaryIO:
    """A file to append to that nobody else can read."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0)


def secrets_of(environment: Mapping[str, str], key: str | None) -> frozenset[str]:
    """Values of environment variables that are named or look like keys, and `key`."""
    named = {value for name, value in environment.items() if _SECRET_NAME.search(name.upper()) and len(value) >= 8}
    return frozenset(
        named | {value for value in environment.values() if looks_like_key(value)} | ({key} if key else set())
    )


def redact(text: str, hidden: frozenset[str]) -> str:
    """The text without those secrets and without any other word that looks like one."""
    for secret in sorted(hidden, key=len, reverse=True):
        text = text.replace(secret, "***")
    return re.sub(r"[^\s'\"=,:;()\[\]{}]+", lambda word: "***" if looks_like_key(word[0]) else word[0], text)


def _written(line: bytes, log: BinaryIO) -> bool:
    try:
        log.write(line)
    except OSError as error:
        _log.warning("a server's log cannot be written (%s); its output is no longer kept", error.strerror)
        return False
    return True
