"""From the bytes of one file to documents: text, JSONL, JSON and Parquet.

Nothing is guessed: a record without text, a line that is no JSON, bytes that are no UTF-8 name their file and place.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, BinaryIO, cast

from nexus_ray.config.tree import ChatConfig, FilesSource, HubSource, WheelSource
from nexus_ray.corpora.conversations import conversation_text
from nexus_ray.corpora.sources.base import RawDocument
from nexus_ray.errors import DataError

_SUFFIXES = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "parquet": "parquet", "pq": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")


def format_of(name: str, chosen: str) -> str:
    """`text`, `jsonl`, `json` or `parquet`: the chosen format, or by the file name if that is `auto`."""
    if chosen != "auto":
        return chosen
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return _SUFFIXES.get(name.rpartition(".")[2].lower(), "text")


def parse(
    file: BinaryIO, name: str, config: FilesSource | WheelSource, where: str, chat: ChatConfig | None = None
) -> Iterator[RawDocument]:
    """Documents of one open file; conversations if `chat` says where they lie.

    `where` is the config path of the source, for messages.
    """
    kind = format_of(name, config.format)
    if kind == "text" and chat is not None:
        raise DataError(
            f"{name} is read as text, which holds no conversations; leave it out by a narrower pattern, or set "
            f"{where}.format to jsonl, json or parquet"
        )
    if kind == "text":
        yield from _texts(file.read(), name, config.split_on)
        return
    for place, record in parse_records(file, name, config, fields_of(config, chat)):
        text = document_text(record, config, chat, f"{name}, {place}", where)
        yield RawDocument(text, _trace(name, place))


def parse_records(
    file: BinaryIO, name: str, config: FilesSource | WheelSource, fields: tuple[str, ...]
) -> Iterator[tuple[str, Any]]:
    """Place (`line 3`) and content of each record of one open file that `where` keeps; of text, each piece of it.

    `fields` are the record's fields that are wanted.
    """
    kind = format_of(name, config.format)
    if kind == "text":
        for document in _texts(file.read(), name, config.split_on):
            yield f"part {document.provenance['index']}", document.text
        return
    records = {"jsonl": _jsonl, "json": _json, "parquet": _parquet}[kind]
    for place, record in records(file, name, config, fields):
        if all(_plain(record.get(key)) == value for key, value in config.where.items()):
            yield place, record


def fields_of(config: FilesSource | WheelSource | HubSource, chat: ChatConfig | None) -> tuple[str, ...]:
    """The fields of a record that hold its document."""
    return (config.text_field,) if chat is None else chat.fields


def document_text(
    record: Any, config: FilesSource | WheelSource | HubSource, chat: ChatConfig | None, place: str, where: str
) -> str:
    """The text of a record, or its conversation as text. Raises DataError naming `place`."""
    if chat is None:
        return record_text(record, config.text_field, place, where)
    return conversation_text(record, chat, place, where)


def record_text(record: Any, field: str, place: str, where: str) -> str:
    """The text of a record. Raises DataError if there is no such field or it is no text."""
    if not isinstance(record, dict):
        raise DataError(f"{place}: a {type(record).__name__} is no record; records must be mappings with {field!r}")
    if field not in record:
        raise DataError(
            f"{place}: no field {field!r} ({where}.text_field); the fields are {', '.join(map(str, record)) or 'none'}"
        )
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{place}: field {field!r} ({where}.text_field) holds a {type(text).__name__}, not text; name another field"
        )
    return text


def decode(data: bytes, name: str) -> str:
    """UTF-8 text, a byte order mark left out. Raises DataError naming the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; save the file as UTF-8, or leave it "
            f"out by a narrower pattern"
        ) from None


def _texts(data: bytes, name: str, split_on: str | None) -> Iterator[RawDocument]:
    for index, piece in enumerate(cut(decode(data, name), split_on)):
        yield RawDocument(piece, {"file": name, "index": index})


def cut(text: str, split_on: str | None) -> list[str]:
    """The text cut where the regular expression matches, each match at the start of a piece."""
    starts = [match.start() for match in re.finditer(split_on, text)] if split_on else []
    return [text[a:b] for a, b in pairwise(sorted({0, *starts, len(text)}))] or [text]


def _jsonl(file: BinaryIO, name: str, config: Any, fields: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(io.BufferedReader(cast(Any, file)), start=1):
        if line.strip():
            yield f"line {number}", _loads(line, f"{name}, line {number}")


def _json(file: BinaryIO, name: str, config: Any, fields: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    data = _loads(file.read(), name)
    if isinstance(data, list):
        yield from ((f"record {index}", record) for index, record in enumerate(data))
    elif isinstance(data, dict) and data and all(isinstance(value, dict) for value in data.values()):
        yield from ((f"record {key!r}", record) for key, record in data.items())
    elif isinstance(data, dict) and all(field in data for field in fields):
        yield "record 0", data
    else:
        raise DataError(
            f"{name}: a JSON {type(data).__name__} without records; it must be a list of mappings, or a mapping whose "
            f"values are mappings"
        )


def _parquet(
    file: BinaryIO, name: str, config: FilesSource | WheelSource, fields: tuple[str, ...]
) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        row = 0
        columns = [key for key in dict.fromkeys((*fields, *config.where)) if key in names]
        for field in fields:
            if field not in names:
                record_text(dict.fromkeys(names), field, name, "source")
        for batch in parquet.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                yield f"row {row}", record
                row += 1
    except pa.ArrowException as error:
        raise DataError(f"{name} cannot be read as Parquet: {error}; restore the file or leave it out") from None


def _loads(data: bytes, place: str) -> Any:
    try:
        return json.loads(decode(data, place))
    except ValueError as error:
        raise DataError(f"{place}: no valid JSON ({error}); mend it, or set source.format") from None


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _trace(name: str, place: str) -> dict[str, Any]:
    return {"file": name, "place": place}
