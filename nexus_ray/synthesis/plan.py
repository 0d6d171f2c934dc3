"""The plan of a synthesis job: every request in order, cut into shards, bound to all that decides its verdicts.

Invariant: a plan only grows at its end. A shard, once planned, never changes; each has at least `shard_requests`
requests (but the last of an extension; those of a long plan have more, see `shard_size`) and never divides those of one
prompt, so that validators which compare several answers see them together. Shards are Parquet files of one row per
request; `plan.json`, written last, lists them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nexus_ray.corpora.manifest import stable_hash
from nexus_ray.corpora.parts import PartFile, delete_unlisted, read_columns, write_table
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.rows import Message, Prompt, Request, Sampling

FORMAT = 1
PLAN_FILE = "plan.json"
SHARD_REQUESTS = 256
"""Requests of a shard: enough to keep 64 in flight busy, few enough that a crash leaves little half done."""
EVEN_SHARDS = 100
"""So many shards' worth of requests are cut evenly; then shards grow."""
MOST_GROWTH = 16
"""How many times larger than the first a shard becomes at most."""
SCHEMA = pa.schema(
    [("id", pa.string()), ("index", pa.int32())]
    + [(name, pa.dictionary(pa.int32(), pa.string())) for name in ("prompt_id", "prompt", "sampling")]
)


@dataclass(frozen=True)
class Job:
    """What a ledger is bound to: everything that decides ids and verdicts. No keys, no payload."""

    domain: str
    revision: str
    """The generator's (weights, adapter, engine; or endpoint and model name)."""
    recipe: Any
    """JSON-able: settings of prompts and parsing, or their hash."""
    filters: Any
    """JSON-able: settings of filters and validators, with what they refer to (anchor quantiles), or their hash."""

    @cached_property
    def fingerprint(self) -> str:
        return stable_hash(asdict(self))


@dataclass(frozen=True)
class Plan:
    """The list of shards."""

    job: Job
    shard_requests: int
    shards: tuple[PartFile, ...] = ()
    repeated: int = 0
    """Requests that were left out because an equal one stands before them (same prompt, sampling and index)."""

    @property
    def requests(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of job and shards; that of a prefix of the shards never changes."""
        value = self.job.fingerprint
        for shard in self.shards:
            value = stable_hash([value, shard.sha256])
        return value


def load_plan(folder: Storage) -> Plan | None:
    """The plan of a ledger's folder; None if it has none. Raises DataError if it is broken."""
    if not folder.exists(PLAN_FILE):
        return None
    try:
        data = folder.read_json(PLAN_FILE)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, this version reads {FORMAT}")
        shards = tuple(PartFile(**shard) for shard in data["shards"])
        plan = Plan(Job(**data["job"]), data["shard_requests"], shards, data["repeated"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder.path(PLAN_FILE)} cannot be used ({error}); restore it, or start under another name"
        ) from None
    if plan.fingerprint != data["fingerprint"]:
        raise DataError(f"{folder.path(PLAN_FILE)} does not fit its fingerprint: it was changed; restore it")
    return plan


def check_job(folder: Storage, planned: Job, job: Job) -> None:
    """Raise ConfigError unless a ledger was made by this very job; the message names what differs, not its content."""
    old, new = json.loads(json.dumps(asdict(planned))), json.loads(json.dumps(asdict(job)))
    differing = [name for name in old if old[name] != new[name]]
    if differing:
        pairs = [f"{name} ({stable_hash(old[name], digits=8)} -> {stable_hash(new[name], digits=8)})" for name in old]
        what = ", ".join(pair for name, pair in zip(old, pairs, strict=True) if name in differing)
        raise ConfigError(
            f"the synthesis ledger {folder.uri} was made with other settings: {what}; restore them, or use another "
            f"name or domain and let it borrow the answers of this one, so that nothing is paid again"
        )


def extend_plan(
    folder: Storage, job: Job, requests: Iterable[Request], *, shard_requests: int = SHARD_REQUESTS
) -> Plan:
    """Compare the beginning of `requests` with the plan that exists, append what is new, and return the plan.

    `requests` are those of the whole job, in order; equal ones count once. A plan that exists keeps its own
    `shard_requests`. Raises ConfigError if the job or a planned request differs, or if `requests` end before the plan.
    """
    with folder.lock("locks/plan", 60.0):
        plan = load_plan(folder) or Plan(job, shard_requests)
        check_job(folder, plan.job, job)
        stream = _Unique(requests, job.revision)
        for shard in plan.shards:
            _compare(folder, shard, stream)
        added = [
            _write_shard(folder, len(plan.shards) + number, some)
            for number, some in enumerate(_cut(stream, plan.shard_requests, before=plan.requests))
        ]
        grown = Plan(plan.job, plan.shard_requests, (*plan.shards, *added), stream.repeated)
        if grown != plan or not folder.exists(PLAN_FILE):
            _save(folder, grown)
        delete_unlisted(folder, ["plan"], {shard.file for shard in grown.shards})
        return grown


def _save(folder: Storage, plan: Plan) -> None:
    shards = ",\n".join(json.dumps(asdict(shard)) for shard in plan.shards)
    head = {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "job": asdict(plan.job),
        "shard_requests": plan.shard_requests,
        "requests": plan.requests,
        "repeated": plan.repeated,
    }
    folder.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "shards": [\n{shards}\n]}}\n', PLAN_FILE)


class _Unique:
    """Requests with their ids, each id once."""

    def __init__(self, requests: Iterable[Request], revision: str) -> None:
        self._requests = iter(requests)
        self._revision = revision
        self._seen: set[bytes] = set()
        self.repeated = 0

    def __iter__(self) -> Iterator[tuple[str, Request]]:
        return self

    def __next__(self) -> tuple[str, Request]:
        for request in self._requests:
            id = request.id(self._revision)
            key = bytes.fromhex(id)
            if key not in self._seen:
                self._seen.add(key)
                return id, request
            self.repeated += 1
        raise StopIteration


def _compare(folder: Storage, shard: PartFile, stream: Iterator[tuple[str, Request]]) -> None:
    for position, id in enumerate(read_columns(folder, shard, ["id"]).column("id").to_pylist()):
        got = next(stream, None)
        if got is None or got[0] != id:
            what = "the prompts of this job end there" if got is None else "another prompt, sampling or index is there"
            raise ConfigError(
                f"the synthesis ledger {folder.uri} planned other requests: at place {position} of {shard.file} "
                f"{what}; a job can only be extended at its end: restore the prompts, or use another name or domain"
            )


def shard_size(shard_requests: int, before: int) -> int:
    """Least requests of a shard that has `before` requests of the plan before it.

    Plan and manifest list every shard and are written whole, so that equal shards cost a long job the square of its
    length. From the hundredth on they grow as the root of what lies before them: a million requests make 1,152 shards
    in place of 3,907. A function of the place alone, so that a plan may be streamed, and grow later.
    """
    growth = math.sqrt(before / (EVEN_SHARDS * shard_requests))
    return int(shard_requests * min(max(1.0, growth), MOST_GROWTH))


def _cut(
    stream: Iterable[tuple[str, Request]], shard_requests: int, *, before: int
) -> Iterator[list[tuple[str, Request]]]:
    """Lists of at least `shard_size` requests (the last may be shorter), cut only between prompts."""
    some: list[tuple[str, Request]] = []
    size = shard_size(shard_requests, before)
    for id, request in stream:
        if len(some) >= size and request.prompt != some[-1][1].prompt:
            yield some
            before += len(some)
            size, some = shard_size(shard_requests, before), []
        some.append((id, request))
    if some:
        yield some


def shard_count(shard_requests: int, requests: int) -> int:
    """Shards of a plan, or a few less: they are cut only between prompts."""
    count = before = 0
    while before < requests:
        before, count = before + shard_size(shard_requests, before), count + 1
    return count


def _write_shard(folder: Storage, number: int, requests: list[tuple[str, Request]]) -> PartFile:
    encoded: dict[int, tuple[str, str]] = {}
    for _, request in requests:
        if (key := id(request.prompt)) not in encoded:
            encoded[key] = request.prompt.id, _canonical(asdict(request.prompt))
    columns = {
        "id": [name for name, _ in requests],
        "index": [request.index for _, request in requests],
        "prompt_id": [encoded[id(request.prompt)][0] for _, request in requests],
        "prompt": [encoded[id(request.prompt)][1] for _, request in requests],
        "sampling": [_canonical(asdict(request.sampling)) for _, request in requests],
    }
    return write_table(folder, f"plan/shard-{number:05d}.parquet", pa.table(columns, schema=SCHEMA))


def read_requests(folder: Storage, shard: PartFile) -> dict[str, Request]:
    """The requests of a shard by id, in plan order. Raises DataError if the file is not what was planned."""
    table = read_columns(folder, shard, SCHEMA.names)
    prompts = {text: _prompt(json.loads(text)) for text in table.column("prompt").unique().to_pylist()}
    samplings = {text: _sampling(json.loads(text)) for text in table.column("sampling").unique().to_pylist()}
    rows = zip(*(table.column(name).to_pylist() for name in ("id", "prompt", "sampling", "index")), strict=True)
    return {id: Request(prompts[prompt], samplings[sampling], index) for id, prompt, sampling, index in rows}


def _prompt(data: Mapping[str, Any]) -> Prompt:
    content = data["content"]
    turns = content if isinstance(content, str) else tuple(Message(**turn) for turn in content)
    return Prompt(**{**data, "content": turns, "parents": tuple(data["parents"])})


def _sampling(data: Mapping[str, Any]) -> Sampling:
    return Sampling(**{**data, "stop": tuple(data["stop"])})


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class RequestIndex:
    """Which shard a request is in. Holds 12 bytes for each: half of an id, which is enough to know where to look."""

    def __init__(self, folder: Storage, plan: Plan) -> None:
        parts = [_halves(read_columns(folder, shard, ["id"]).column("id").to_pylist()) for shard in plan.shards]
        keys = np.concatenate([np.empty(0, np.uint64), *parts])
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._shards = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])[order]

    def find(self, ids: Sequence[str]) -> list[int]:
        """Sorted numbers of the shards that hold any of `ids`."""
        keys = _halves(ids)
        places = np.searchsorted(self._keys, keys)
        inside = places < len(self._keys)
        places, keys = places[inside], keys[inside]
        return sorted({int(shard) for shard in self._shards[places[self._keys[places] == keys]]})


def _halves(ids: Sequence[str]) -> NDArray[np.uint64]:
    return np.array([int(id[:16], 16) for id in ids], dtype=np.uint64)
