"""Reads W&B's offline run files (`run-*.wandb`): LevelDB's log framing around the records of W&B's own protobuf.

The Python reader that W&B shipped until 0.2x is gone; `wandb sync` reads the same frames with these same messages.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What one offline directory holds."""

    group: str = ""
    job_type: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, Any] = field(default_factory=dict)
    """By name: type and metadata."""
    ended: bool = False


def read_run(file: Path) -> OfflineRun:
    """All records of a run file, in order."""
    from wandb.proto import wandb_internal_pb2 as messages

    run = OfflineRun()
    for data in _records(file.read_bytes()):
        record = messages.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.group, run.job_type, run.name = record.run.run_group, record.run.job_type, record.run.display_name
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "summary":
            run.summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "history":
            run.history.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "artifact":
            run.artifacts[record.artifact.name] = (record.artifact.type, json.loads(record.artifact.metadata or "{}"))
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            artifact = record.request.log_artifact.artifact
            run.artifacts[artifact.name] = (artifact.type, json.loads(artifact.metadata or "{}"))
        run.ended = run.ended or kind == "exit"
    return run


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B", "not a W&B run file"
    place, pending = 7, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        checksum = int.from_bytes(data[place : place + 4], "little")
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if kind == 0:
            place += left
            continue
        body = data[place + _HEADER : place + _HEADER + length]
        assert zlib.crc32(body, zlib.crc32(bytes([kind]))) == checksum, f"torn record at byte {place}"
        place += _HEADER + length
        pending = body if kind in (_FULL, _FIRST) else pending + body
        if kind in (_FULL, _LAST):
            yield pending
