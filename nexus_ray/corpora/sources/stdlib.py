"""Source code of the running Python's own standard library."""

from __future__ import annotations

import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nexus_ray.config.tree import StdlibSource
from nexus_ray.corpora.sources.base import Item, RawDocument
from nexus_ray.errors import DataError


class StdlibCorpus:
    """Every `*.py` file below the standard library's folder, one document each, sorted by path."""

    def __init__(self, domain: str, config: StdlibSource) -> None:
        self.domain = domain
        self.config = config
        self.python = f"{platform.python_implementation()} {platform.python_version()}"

    @property
    def label(self) -> str:
        return f"standard library of {self.python}"

    @property
    def credits(self) -> tuple[str | None, str | None]:
        return "PSF-2.0", "Python Software Foundation and the authors of Python"

    def settings(self) -> dict[str, Any]:
        exclude = sorted(set(self.config.exclude))
        return {"kind": "stdlib", "python": self.python, "exclude": exclude, "max_documents": self.config.max_documents}

    def listing(self) -> None:
        return None

    def items(self) -> list[Item]:
        root = _root()
        found = []
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(set(folders) - set(self.config.exclude) - {"__pycache__"})
            found += [Path(folder, file) for file in files if file.endswith(".py")]
        if not found:
            raise DataError(
                f"domains.{self.domain}.source: no Python source below {root}; this Python comes without its library's "
                f"source: use another Python, or a `files` source"
            )
        names = sorted(path.relative_to(root).as_posix() for path in found)
        return [Item(name, (root / name).stat().st_size, self.python) for name in names]

    def read(self, item: Item) -> Iterator[RawDocument]:
        path = _root() / item.name
        try:
            with tokenize.open(path) as file:  # honours the coding line
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise DataError(
                f"domains.{self.domain}.source: {path} cannot be read ({error}); name its folder in `exclude`"
            ) from None
        yield RawDocument(text, {"source": "stdlib", "python": self.python, "file": item.name, "index": 0})


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
