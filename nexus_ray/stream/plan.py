"""The plan of a run: an append-only list of segments, from which `sequence(i)` is a pure function.

A segment says from which global row on which integer weights hold, with which learning-rate factor and over which
prefix of each domain's manifest. `plan.jsonl` holds one segment a line and is written before it is used; the order
of the rows never depends on anything but (seed, plan, position).

A line that starts inside the stage planned last replaces the rest of that stage: what stands before it never changes,
and every domain goes on where its counters stand, so that samples of different ratios stay nested.

A domain has two counters over one order of its rows: learning takes its rows one after the other, and so does replay,
which thus begins with the rows learned first, whatever the ratio. Over the stages that replay a domain, what has been
replayed is a growing prefix of that order; it goes beyond what was learned only once more rows have been replayed than
learned. A repeated attempt at a stage takes the rows that the rejected one took: no model remembers those.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.errors import DataError
from nexus_ray.stream.mixture import cycle_ranks, fair_cycle
from nexus_ray.stream.permute import Indices, RowOrder, key_of

GROUP_TOKENS = 524_288
"""Tokens of a permuted group: eight row groups of a token shard."""
MIN_GROUPS = 64
"""A small domain has this many groups all the same: what part of an epoch reads must be a fair sample of the whole."""
WINDOW_TOKENS = 4 * GROUP_TOKENS
"""Most tokens that rows are shuffled inside: a reader holds a window of every domain, whatever the sequence length."""
VERSION = 2
"""Of a plan's lines: what their rows are counted by. In version 1, whose lines do not say it, learning, replay and all
attempts shared one counter per domain."""


_Taken = dict[tuple[str, bool], tuple["Source", int]]
"""By domain and whether it is replayed: the rows taken of it so far, and what they were taken from."""


@dataclass(frozen=True)
class Source:
    """The prefix of a domain's training shards that a segment draws from."""

    fingerprint: str
    shards: int
    rows: int
    used: int | None = None
    """Rows that are read at all, those that the first epoch of all begins with; None is all."""


@dataclass(frozen=True)
class Segment:
    """From `start_row` on, for `rows` rows: `weights` rows of each domain in every `cycle`."""

    stage: str
    stage_index: int
    attempt: int
    start_row: int
    rows: int
    weights: dict[str, int]
    cycle: int
    replay: tuple[str, ...]
    replay_ratio: float
    manifests: dict[str, Source]
    lr_factor: float = 1.0
    version: int = VERSION

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(self.weights.values())

    def drawn(self, rows: int) -> dict[str, int]:
        """Rows of each domain among the segment's first `rows`."""
        cycles, rest = divmod(rows, self.cycle)
        part = np.bincount(fair_cycle(self.counts)[:rest], minlength=len(self.weights))
        return {
            name: cycles * count + int(extra) for (name, count), extra in zip(self.weights.items(), part, strict=True)
        }

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Segment:
        values = {"version": 1, **record}
        values["manifests"] = {name: Source(**source) for name, source in values["manifests"].items()}
        values["replay"] = tuple(values["replay"])
        return cls(**values)


@dataclass(frozen=True)
class Sequences:
    """Rows `start ... start + n` of the stream: `domain[i]` indexes `domains`, `row[i]` is a row of that domain."""

    start: int
    domains: tuple[str, ...]
    domain: NDArray[np.int16]
    row: Indices
    replayed: NDArray[np.bool_]


@dataclass(frozen=True)
class Plan:
    """Segments in order, without gaps, and the seed of the permutations."""

    seed: int
    seq_len: int
    shuffle_window_rows: int
    segments: tuple[Segment, ...] = field(default=())

    def append(self, segments: Iterable[Segment]) -> Plan:
        """The plan with more segments at its end, or in the place of the end of the stage planned last."""
        together = list(self.segments)
        for segment in segments:
            expected = together[-1].start_row + together[-1].rows if together else 0
            if segment.start_row < expected:
                together = _cut(together, segment)
            elif segment.start_row > expected:
                raise DataError(
                    f"plan: segment of stage {segment.stage!r} starts at row {segment.start_row}, not {expected}"
                )
            together.append(segment)
        return Plan(self.seed, self.seq_len, self.shuffle_window_rows, tuple(together))

    @property
    def rows(self) -> int:
        """Rows that the plan covers."""
        return self.segments[-1].start_row + self.segments[-1].rows if self.segments else 0

    @cached_property
    def domains(self) -> tuple[str, ...]:
        names: dict[str, None] = {}
        for segment in self.segments:
            names.update(dict.fromkeys(segment.weights))
        return tuple(names)

    @cached_property
    def _starts(self) -> list[int]:
        return [segment.start_row for segment in self.segments]

    @cached_property
    def _counters(self) -> list[dict[str, int]]:
        """Per segment: at its first row, how many rows of each domain have been taken for the use it makes of it (to
        learn, or to replay). A grown manifest starts new counts; an attempt begins with those its stage began with."""
        check_versions(self.segments)
        out: list[dict[str, int]] = []
        seen: _Taken = {}
        at_start: dict[int, _Taken] = {}
        attempt: tuple[int, int] | None = None
        for segment in self.segments:
            if attempt != (segment.stage_index, segment.attempt):
                attempt = (segment.stage_index, segment.attempt)
                seen = dict(at_start.setdefault(segment.stage_index, seen))
            begin = {}
            for name, drawn in segment.drawn(segment.rows).items():
                use, source = (name, name in segment.replay), segment.manifests[name]
                before = seen[use][1] if use in seen and seen[use][0] == source else 0
                begin[name] = before
                seen[use] = (source, before + drawn)
            out.append(begin)
        return out

    def order(self, name: str, source: Source) -> RowOrder:
        """The row order of a domain: depends on the seed, the domain and the prefix it is drawn from, nothing else."""
        group_rows = max(1, min(GROUP_TOKENS // self.seq_len, source.rows // MIN_GROUPS))
        window_rows = min(self.shuffle_window_rows, max(1, WINDOW_TOKENS // self.seq_len))
        key = key_of(self.seed, name, source.fingerprint)
        return RowOrder(source.rows, group_rows, window_rows, key, used=source.used)

    def sequences(self, start: int, stop: int) -> Sequences:
        """Which domain and which row of it stands at each global position in [start, stop)."""
        if not 0 <= start <= stop <= self.rows:
            raise DataError(f"plan: rows {start}..{stop} asked for, but it covers 0..{self.rows}")
        domain = np.empty(stop - start, dtype=np.int16)
        row = np.empty(stop - start, dtype=np.int64)
        replayed = np.zeros(stop - start, dtype=np.bool_)
        index = {name: i for i, name in enumerate(self.domains)}
        for number, segment in enumerate(self.segments):
            low, high = max(start, segment.start_row), min(stop, segment.start_row + segment.rows)
            if low >= high:
                continue
            local = np.arange(low - segment.start_row, high - segment.start_row)
            cycles, inside = np.divmod(local, segment.cycle)
            which = fair_cycle(segment.counts)[inside]
            rank = cycle_ranks(segment.counts)[inside]
            part = slice(low - start, high - start)
            for i, (name, count) in enumerate(segment.weights.items()):
                chosen = which == i
                if not chosen.any():
                    continue
                counter = self._counters[number][name] + cycles[chosen] * count + rank[chosen]
                row[part][chosen] = self.order(name, segment.manifests[name])(counter)
                domain[part][chosen] = index[name]
                replayed[part][chosen] = name in segment.replay
        return Sequences(start, self.domains, domain, row, replayed)

    def stage_rows(self, stage_index: int, attempt: int) -> tuple[int, int]:
        """First and last-plus-one row of a stage's attempt."""
        mine = [s for s in self.segments if (s.stage_index, s.attempt) == (stage_index, attempt)]
        if not mine:
            raise DataError(f"plan: no segment of stage {stage_index}, attempt {attempt}")
        return mine[0].start_row, mine[-1].start_row + mine[-1].rows

    def segment_at(self, row: int) -> Segment:
        return self.segments[int(np.searchsorted(self._starts, row, side="right")) - 1]


def check_versions(segments: Iterable[Segment]) -> None:
    """Raises DataError if lines of an older version drew rows that the counters of this one do not tell."""
    older = [segment for segment in segments if segment.version < VERSION]
    learned = {name for segment in older for name in segment.weights if name not in segment.replay}
    both = sorted(learned & {name for segment in older for name in segment.replay})
    if both or any(segment.attempt for segment in older):
        what = f"learns and replays {both[0]!r}" if both else "repeats a stage"
        raise DataError(
            f"plan.jsonl was begun by an older version and {what}; this version counts such rows otherwise and would "
            f"take others. Finish or read the run with the version that began it (`commit` in run.json), or start "
            f"under another name, with model.init_from: the stages/*/model that it finished last"
        )


def _cut(segments: list[Segment], by: Segment) -> list[Segment]:
    """`segments` up to the first row of `by`, which replaces the rest of their last stage."""
    last = segments[-1]
    mine = [s for s in segments if (s.stage_index, s.attempt) == (by.stage_index, by.attempt)]
    if not mine or mine[-1] is not last or by.start_row < mine[0].start_row:
        raise DataError(
            f"plan: segment of stage {by.stage!r} (attempt {by.attempt}) starts at row {by.start_row}, inside rows "
            f"planned before; only the end of the stage planned last, {last.stage!r} (attempt {last.attempt}), can be "
            f"planned anew"
        )
    if by.start_row + by.rows != last.start_row + last.rows:
        raise DataError(
            f"plan: segment of stage {by.stage!r} from row {by.start_row} ends at {by.start_row + by.rows}, and the "
            f"stage it changes at {last.start_row + last.rows}"
        )
    kept = [segment for segment in segments if segment.start_row < by.start_row]
    if kept and kept[-1].start_row + kept[-1].rows > by.start_row:
        kept[-1] = replace(kept[-1], rows=by.start_row - kept[-1].start_row)
    return kept


def parse_plan(lines: Sequence[str], *, seed: int, seq_len: int, shuffle_window_rows: int) -> Plan:
    """The plan in the lines of a `plan.jsonl`."""
    empty = Plan(seed, seq_len, shuffle_window_rows)
    return empty.append(Segment.from_json(json.loads(line)) for line in lines if line.strip())
