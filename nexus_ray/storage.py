"""A folder on a local disk or in an object store, with atomic writes and locks.

Invariant: a reader sees a file whole or not at all. Paths of the operating system's own become absolute, so that a
`Storage` means the same folder in every process; only the URI is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

MIN_FREE_BYTES = 256 * 2**20
"""Less free disk than this and a run is refused at the start."""
_POLL_S = 0.1


class Storage:
    """A folder, named by a path (`runs`, `/data/runs`) or a URI (`s3://bucket/runs`). It need not exist yet."""

    def __init__(self, uri: str) -> None:
        uri = uri.removeprefix("file://")
        self.is_local = "://" not in uri
        self.uri = str(Path(uri).expanduser().absolute()) if self.is_local else uri.rstrip("/")
        self._opened: tuple[FileSystem, str] | None = None

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return type(self), (self.uri,)

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.uri.rpartition("/")[2]

    @property
    def local_path(self) -> Path:
        """The folder on this machine; only for local storage."""
        if not self.is_local:
            raise ConfigError(f"{self.uri} is no folder of this machine; download it first, or use a local storage")
        return Path(self.uri)

    @property
    def filesystem(self) -> FileSystem:
        """The pyarrow filesystem, made at first use. Raises ConfigError for a URI that pyarrow cannot open."""
        return self._open()[0]

    def _open(self) -> tuple[FileSystem, str]:
        if self._opened is None:
            from pyarrow.fs import FileSystem, LocalFileSystem

            if self.is_local:
                self._opened = LocalFileSystem(), self.uri
            else:
                try:
                    filesystem, base = FileSystem.from_uri(self.uri)
                except (OSError, ValueError, NotImplementedError) as error:
                    raise ConfigError(
                        f"{self.uri} cannot be opened: {error}; use a local path, or a URI that pyarrow knows "
                        f"(s3://, gs://, abfs://) with its credentials in place"
                    ) from None
                self._opened = filesystem, base
        return self._opened

    def child(self, *parts: str) -> Storage:
        """The folder `parts` inside this one."""
        return type(self)("/".join((self.uri, *parts)))

    def path(self, *parts: str) -> str:
        """Path of `parts` for `self.filesystem`."""
        return "/".join((self._open()[1], *parts))

    # --- reading ---------------------------------------------------------------------------------------------

    def exists(self, *parts: str) -> bool:
        """Whether there is a file or folder of that name."""
        if self.is_local:
            return os.path.exists(os.path.join(self.uri, *parts))
        return self.filesystem.get_file_info(self.path(*parts)).type.name != "NotFound"

    def size(self, *parts: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        if self.is_local:
            return os.path.getsize(os.path.join(self.uri, *parts))
        info = self.filesystem.get_file_info(self.path(*parts))
        if not info.is_file:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path(*parts))
        return int(info.size)

    def list(self, *parts: str) -> list[str]:
        """Sorted names of the files and folders directly inside; none if the folder is missing."""
        if self.is_local:
            folder = os.path.join(self.uri, *parts)
            return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        from pyarrow.fs import FileSelector

        infos = self.filesystem.get_file_info(FileSelector(self.path(*parts), allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def read_bytes(self, *parts: str) -> bytes:
        """Content of a file. Raises FileNotFoundError."""
        if self.is_local:
            return Path(self.uri, *parts).read_bytes()
        with self.filesystem.open_input_stream(self.path(*parts), compression=None) as stream:
            return stream.read()

    def read_text(self, *parts: str) -> str:
        return self.read_bytes(*parts).decode()

    def read_json(self, *parts: str) -> Any:
        """Parsed content. Raises ValueError if it is no JSON."""
        return json.loads(self.read_bytes(*parts))

    # --- writing ---------------------------------------------------------------------------------------------

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Put a file in place at once: written beside, synced and renamed; in an object store, one put.

        Raises ConfigError with the system's reason if the storage cannot be written.
        """
        with self.write_errors():
            if not self.is_local:
                with self.filesystem.open_output_stream(self.path(*parts), compression=None) as stream:
                    stream.write(data)
                return
            target = Path(self.uri, *parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
            try:
                with open(beside, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(beside, target)
            finally:
                beside.unlink(missing_ok=True)
            _sync_folder(target.parent)

    def write_text(self, data: str, *parts: str) -> None:
        self.write_bytes(data.encode(), *parts)

    def write_json(self, data: Any, *parts: str) -> None:
        """Indented JSON with a final newline; NaN and infinity are refused (ValueError), they are no JSON."""
        self.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", *parts)

    def append_line(self, line: str, *parts: str) -> None:
        """Add one line to a file: a single append on a local disk, read and put in an object store."""
        data = (line.rstrip("\n") + "\n").encode()
        with self.write_errors():
            if not self.is_local:
                before = self.read_bytes(*parts) if self.exists(*parts) else b""
                self.write_bytes(before + data, *parts)
                return
            target = Path(self.uri, *parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "ab", buffering=0) as file:
                file.write(data)

    def open_append(self, *parts: str) -> FileIO:
        """A file opened to add to its end, unbuffered; made, and its folder synced, if missing.

        Raises ConfigError in an object store, which has no append.
        """
        target = self.local_path.joinpath(*parts)
        with self.write_errors():
            target.parent.mkdir(parents=True, exist_ok=True)
            is_new = not target.exists()
            file = FileIO(target, "ab")
            if is_new:
                _sync_folder(target.parent)
            return file

    def upload(self, local: Path, *parts: str) -> None:
        """Copy a local file or tree to `parts`."""
        from pyarrow.fs import LocalFileSystem

        with self.write_errors():
            self._copy(LocalFileSystem(), str(local.absolute()), self.filesystem, self.path(*parts))

    def download(self, local: Path, *parts: str) -> None:
        """Copy the file or tree at `parts` to `local`. Raises FileNotFoundError."""
        from pyarrow.fs import LocalFileSystem

        self._copy(self.filesystem, self.path(*parts), LocalFileSystem(), str(local.absolute()))

    @staticmethod
    def _copy(source: FileSystem, source_path: str, target: FileSystem, target_path: str) -> None:
        from pyarrow.fs import copy_files

        if source.get_file_info(source_path).is_file:
            target.create_dir(target_path.rpartition("/")[0], recursive=True)
        copy_files(source_path, target_path, source_filesystem=source, destination_filesystem=target)

    def delete(self, *parts: str) -> None:
        """Remove a file or tree; a missing one is fine."""
        if self.is_local:
            target = Path(self.uri, *parts)
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
            return
        info = self.filesystem.get_file_info(self.path(*parts))
        if info.type.name == "Directory":
            self.filesystem.delete_dir(info.path)
        elif info.type.name != "NotFound":
            self.filesystem.delete_file(info.path)

    # --- errors, checks and locks ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def write_errors(self) -> Iterator[None]:
        """Turn an OSError of the block into a ConfigError that names `storage`, the reason and the way out."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                way_out = "free some space, or set storage to a folder on a larger disk"
            else:
                way_out = "set storage to a folder that this user can write"
            reason = error.strerror or error
            raise ConfigError(f"storage: {self.uri} cannot be written ({reason}); {way_out}") from error

    def check_writable(self) -> None:
        """Raise ConfigError unless a file can be written here and the disk has room left."""
        probe = f".write-check-{os.getpid()}-{secrets.token_hex(4)}"
        self.write_bytes(b"nexus-ray\n", probe)
        self.delete(probe)
        if self.is_local:
            free = shutil.disk_usage(self.uri).free
            if free < MIN_FREE_BYTES:
                raise ConfigError(
                    f"storage: {self.uri} has {free / 2**20:.0f} MiB of free disk, less than "
                    f"{MIN_FREE_BYTES // 2**20} MiB; free some space, or set storage to a folder on a larger disk"
                )

    @contextlib.contextmanager
    def lock(self, name: str, timeout_s: float = 3600.0) -> Iterator[None]:
        """Hold the lock `<name>.lock` of this folder: one builder at a time, also across processes.

        On a local disk the kernel frees it when its holder dies. In an object store it is a file with the holder's
        host and process, taken over when that process is gone from this host. Raises DataError after `timeout_s`.
        """
        file = f"{name}.lock"
        with self._local_lock(file, timeout_s) if self.is_local else self._object_lock(file, timeout_s):
            yield

    @contextlib.contextmanager
    def _local_lock(self, file: str, timeout_s: float) -> Iterator[None]:
        target = Path(self.uri, file)
        with self.write_errors():
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(target, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait(lambda: _try_flock(descriptor), timeout_s, lambda: self._held_by(file))
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(_owner()).encode())
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _object_lock(self, file: str, timeout_s: float) -> Iterator[None]:
        owner = {**_owner(), "nonce": secrets.token_hex(8)}
        _wait(lambda: self._try_object_lock(file, owner), timeout_s, lambda: self._held_by(file))
        try:
            yield
        finally:
            self.delete(file)

    def _try_object_lock(self, file: str, owner: dict[str, Any]) -> bool:
        holder = self._holder(file)
        if holder and not _is_dead(holder):
            return False
        self.write_json(owner, file)
        time.sleep(_POLL_S)  # two writers of the same moment: the last put wins, and both look again
        return self._holder(file).get("nonce") == owner["nonce"]

    def _holder(self, file: str) -> dict[str, Any]:
        try:
            return dict(self.read_json(file))
        except (OSError, ValueError):
            return {}

    def _held_by(self, file: str) -> str:
        holder = self._holder(file)
        return (
            f"{self.path(file)} is held by process {holder.get('pid', '?')} on {holder.get('host', '?')}; wait for it, "
            f"or end that process (in an object store, delete the lock if it is gone)"
        )


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _is_dead(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (KeyError, ValueError, PermissionError):
        return False
    return False


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(attempt: Callable[[], bool], timeout_s: float, held_by: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not attempt():
        if time.monotonic() >= deadline:
            raise DataError(f"no lock after {timeout_s:g} s: {held_by()}")
        time.sleep(_POLL_S)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
