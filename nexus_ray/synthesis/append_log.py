"""An append-only list of JSON objects that a crash cannot spoil: one line each, with a checksum at its end.

On a local disk a log is `<name>.jsonl`, written under a lock; each line goes to the system at once (the death of the
process loses nothing) and is synced in groups (a power cut loses at most the last group). In an object store, which
has no append, it is a folder `<name>/` of numbered segments, one per group. Invariant: a crash within a write can only
leave a last line without its line break; readers pass over it, the next writer cuts it off. Any other bad line was
damaged later, and is an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
import zlib
from collections.abc import Iterator, Mapping
from io import FileIO
from types import TracebackType
from typing import Any

from nexus_ray.errors import DataError
from nexus_ray.storage import Storage

GROUP_LINES = 16
"""Lines that may wait for one sync together."""
GROUP_S = 1.0
"""Longest that a line waits for its sync while others follow, in seconds."""
LOCK_S = 5.0
"""How long an opener waits for the log's present writer, in seconds."""


def encode_line(value: Mapping[str, Any]) -> bytes:
    """One line of a log: the object with a last key `crc`, the CRC-32 of all before it. Half surrogate pairs pass."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    data = text.encode("utf-8", "surrogatepass")
    return data[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(data)


def decode_line(line: bytes) -> dict[str, Any]:
    """The inverse, without the line break. Raises ValueError if the checksum does not fit."""
    body, _, tail = line.rpartition(b',"crc":"')
    data = body + b"}"
    if tail != b'%08x"}' % zlib.crc32(data):
        raise ValueError("its checksum does not fit")
    value = json.loads(data.decode("utf-8", "surrogatepass"))
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    return value


LOST = "an answer in it is asked for again"
"""What it means for the synthesis ledger to lose a line."""


def read_log(folder: Storage, name: str, *, lost: str = LOST) -> Iterator[dict[str, Any]]:
    """All whole lines in order; none if there is no such log. Raises DataError naming the file and line, and what its
    loss means (`lost`)."""
    if folder.is_local:
        if folder.exists(f"{name}.jsonl"):
            yield from _lines(folder, f"{name}.jsonl", lost)
        return
    before: tuple[str, int] | None = None
    for segment in _segments(folder, name):
        session, number = _session(segment), int(segment.removesuffix(".jsonl").rpartition("-")[2])
        expected = before[1] + 1 if before and before[0] == session else 0
        if number != expected:
            raise DataError(
                f"{folder.path(name)} lacks segment {session}-{expected:06d}.jsonl: it was deleted or not copied; "
                f"restore it, or delete the segments of that session behind it: what they held is lost, and {lost}"
            )
        before = session, number
        yield from _lines(folder, f"{name}/{segment}", lost)


def _lines(folder: Storage, file: str, lost: str) -> Iterator[dict[str, Any]]:
    whole, _, _ = folder.read_bytes(file).rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else ()):
        try:
            yield decode_line(line)
        except ValueError as error:
            raise DataError(
                f"{folder.path(file)}, line {number + 1}, is damaged ({error}); restore the file, or delete that line: "
                f"what it held is lost, and {lost}"
            ) from None


def _segments(folder: Storage, name: str) -> list[str]:
    return [file for file in folder.list(name) if file.endswith(".jsonl")]


def _session(segment: str) -> str:
    """`<epoch>-<nonce>` of `<epoch>-<nonce>-<number>.jsonl`; a later opener's sorts behind."""
    return segment.rpartition("-")[0]


class LogWriter:
    """The one writer of a log, as a context manager. Not for several threads at once.

    On a local disk a lock keeps others out, which the kernel frees when the holder dies. In an object store, where a
    dead machine would leave its lock for ever, the latest opener wins: an earlier one finds out at its next write,
    before that write, and raises DataError. What both wrote is read.
    """

    def __init__(self, folder: Storage, name: str, *, lock_s: float = LOCK_S) -> None:
        self._folder = folder
        self._name = name
        self._lock_s = lock_s
        self._stack = contextlib.ExitStack()
        self._file: FileIO | None = None
        self._waiting: list[bytes] = []
        self._oldest = 0.0
        self._session = ""
        self._number = 0
        self._is_open = False

    def __enter__(self) -> LogWriter:
        if self._folder.is_local:
            lock = self._folder.lock(f"locks/{self._name.replace('/', '-')}", self._lock_s)
            self._stack.enter_context(lock)
            self._file = self._stack.enter_context(self._folder.open_append(f"{self._name}.jsonl"))
            self._cut_torn_line(self._file)
        else:
            last = max(map(_session, _segments(self._folder, self._name)), default="000000-")
            self._session = f"{int(last.partition('-')[0]) + 1:06d}-{secrets.token_hex(4)}"
            self._put(b"")
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._is_open:
                self.flush()
        finally:
            self._close()

    def _close(self) -> None:
        self._is_open = False
        self._stack.close()

    def _cut_torn_line(self, file: FileIO) -> None:
        data = self._folder.read_bytes(f"{self._name}.jsonl")
        if (whole := data.rfind(b"\n") + 1) < len(data):
            with self._folder.write_errors():
                file.truncate(whole)
                os.fsync(file.fileno())

    def write(self, value: Mapping[str, Any]) -> None:
        """Add a line. It counts once it is synced: by `flush`, by leaving the context, or with its group.

        Raises ConfigError if the storage cannot be written (the log is closed then), DataError if another writer took
        over.
        """
        if not self._is_open:
            raise DataError(f"{self._name} of {self._folder.uri} is closed, after an error or at its end; open it anew")
        line = encode_line(value)
        if not self._waiting:
            self._oldest = time.monotonic()
        self._waiting.append(line)
        if self._file is not None:
            self._append(self._file, line)
        if len(self._waiting) >= GROUP_LINES or time.monotonic() - self._oldest >= GROUP_S:
            self.flush()

    def flush(self) -> None:
        """Make all lines written so far safe against a power cut."""
        if not self._waiting:
            return
        try:
            if self._file is None:
                self._put(b"".join(self._waiting))
            else:
                with self._folder.write_errors():
                    os.fsync(self._file.fileno())
        except BaseException:
            self._close()
            raise
        self._waiting = []

    def _append(self, file: FileIO, line: bytes) -> None:
        try:
            with self._folder.write_errors():
                while line:
                    line = line[file.write(line) :]
        except BaseException:
            self._close()  # half a line may stand at the end: nothing may follow it
            raise

    def _put(self, data: bytes) -> None:
        newest = max(map(_session, _segments(self._folder, self._name)), default="")
        if newest > self._session:
            raise DataError(
                f"{self._folder.path(self._name)} was taken over by a later writer ({newest}); this process is no "
                f"longer wanted, let the other one go on"
            )
        self._folder.write_bytes(data, self._name, f"{self._session}-{self._number:06d}.jsonl")
        self._number += 1
