"""Text, JSONL, JSON and Parquet files on a local disk or in an object store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from nexus_ray.config.tree import ChatConfig, FilesSource
from nexus_ray.corpora.sources.base import Item, RawDocument, matcher, with_chat
from nexus_ray.corpora.sources.records import format_of, parse, parse_records
from nexus_ray.errors import DataError

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

_MAGIC = "*?["


class FilesCorpus:
    """Files, folders (everything in them but hidden files), glob patterns and URIs, in the order they are named."""

    def __init__(
        self, domain: str, config: FilesSource, chat: ChatConfig | None = None, *, where: str | None = None
    ) -> None:
        self.domain = domain
        self.config = config
        self.chat = chat
        self.where = where or f"domains.{domain}.source"

    @property
    def label(self) -> str:
        return f"files {', '.join(self.config.paths)}"

    @property
    def credits(self) -> tuple[str | None, str | None]:
        return None, None

    def settings(self) -> dict[str, Any]:
        return with_chat(self.config.model_dump(exclude={"license", "attribution", "paths"}), self.chat)

    def listing(self) -> list[Item]:
        items: dict[str, Item] = {}
        for pattern in self.config.paths:
            for item in self._expand(pattern):
                items.setdefault(item.name, item)
        return list(items.values())

    items = listing

    def read(self, item: Item) -> Iterator[RawDocument]:
        with self._stream(item) as stream:
            for document in parse(stream, item.name, self.config, self.where, self.chat):
                yield RawDocument(document.text, {"source": "files", **document.provenance})

    def records(self, item: Item, fields: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        """Place and content of each record that `where` keeps; of a text file, its pieces as text."""
        with self._stream(item) as stream:
            yield from parse_records(stream, item.name, self.config, fields)

    @contextmanager
    def _stream(self, item: Item) -> Iterator[BinaryIO]:
        filesystem, path = _open(item.name)
        is_parquet = format_of(item.name, self.config.format) == "parquet"
        try:
            with filesystem.open_input_file(path) if is_parquet else filesystem.open_input_stream(path) as stream:
                yield cast(BinaryIO, stream)
        except OSError as error:
            raise DataError(
                f"{self.where}.paths: {item.name} cannot be read: {error}; restore it or leave it out"
            ) from None

    def _expand(self, pattern: str) -> list[Item]:
        filesystem, path = _open(pattern)
        scheme = pattern.partition("://")[0] + "://" if "://" in pattern else ""
        try:
            found = _match(filesystem, path)
        except OSError as error:
            raise DataError(
                f"{self.where}.paths: {pattern!r} cannot be listed: {error}; check the path and the credentials"
            ) from None
        if not found:
            raise DataError(
                f"{self.where}.paths: {pattern!r} matches no file (looked at {path}); correct the path; relative paths "
                f"start at {Path.cwd()}"
            )
        files = sorted(found, key=lambda info: info.path)
        return [Item(scheme + info.path, info.size, f"{info.size}:{info.mtime_ns}") for info in files]


def _open(name: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem, LocalFileSystem

    name = name.removeprefix("file://")
    if "://" not in name:
        return LocalFileSystem(), str(Path(name).expanduser().absolute())
    scheme, _, rest = name.partition("://")
    magic = min((rest.find(sign) for sign in _MAGIC if sign in rest), default=len(rest))
    head = rest[:magic].rpartition("/")[0] if magic < len(rest) else rest  # pyarrow refuses `*` in some URIs
    try:
        filesystem, base = FileSystem.from_uri(f"{scheme}://{head}")
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"{name} cannot be opened: {error}; use a local path or a URI that pyarrow knows (s3://...)"
        ) from None
    return filesystem, base + rest[len(head) :]


def _match(filesystem: FileSystem, path: str) -> list[FileInfo]:
    from pyarrow.fs import FileSelector, FileType

    exact = filesystem.get_file_info(path)
    if exact.type == FileType.File:
        return [exact]
    if exact.type == FileType.Directory:
        base, pattern = path.rstrip("/"), None
    else:
        magic = min((path.find(sign) for sign in _MAGIC if sign in path), default=-1)
        if magic < 0:
            return []
        base, pattern = path[:magic].rpartition("/")[0], matcher([path])
    infos = filesystem.get_file_info(FileSelector(base or "/", recursive=True, allow_not_found=True))
    files = [info for info in infos if info.type == FileType.File]
    if pattern is not None:
        return [info for info in files if pattern.fullmatch(info.path)]
    return [info for info in files if not any(part.startswith(".") for part in info.path[len(base) + 1 :].split("/"))]
