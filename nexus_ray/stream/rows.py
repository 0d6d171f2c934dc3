"""The rows of a stage as each worker sees them: which part of every global batch, in chunks of whole steps. Pure.

The rows of a global batch depend on the plan alone. A worker takes a contiguous part of each; where the batch does
not divide, the last workers' parts are padded with rows of nothing (position -1), which carry no loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.corpora.reader import PAD, TokenReader
from nexus_ray.stream.plan import Plan, Sequences


@dataclass(frozen=True)
class StageStream:
    """The rows of one stage, readable anywhere: plan, shards and the stage's place in the plan."""

    plan: Plan
    manifests: Mapping[str, TokenManifest]
    first_row: int
    rows_per_step: int
    steps: int
    _readers: dict[str, TokenReader] = field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple[type[StageStream], tuple[object, ...]]:
        return type(self), (self.plan, self.manifests, self.first_row, self.rows_per_step, self.steps)

    def sequences(self, first_step: int, num_steps: int) -> Sequences:
        start = self.first_row + first_step * self.rows_per_step
        return self.plan.sequences(start, start + num_steps * self.rows_per_step)

    def read(self, domains: tuple[str, ...], domain: NDArray[np.int16], row: NDArray[np.int64]) -> NDArray[np.int32]:
        """Tokens of rows in the wire format, [n, seq_len + 1]; a domain below 0 gives a padded row."""
        out = np.empty((len(row), self.plan.seq_len + 1), dtype=np.int32)
        out[domain < 0] = PAD
        for index in np.unique(domain[domain >= 0]):
            chosen = np.flatnonzero(domain == index)
            self._reader(domains[index]).read(row[chosen], out, chosen)
        return out

    def _reader(self, name: str) -> TokenReader:
        if name not in self._readers:
            self._readers[name] = TokenReader(self.manifests[name], self.plan.seq_len)
        return self._readers[name]

    def part(self, first_step: int, num_steps: int, *, rank: int, rows_per_rank: int) -> RankRows:
        """The rows of `num_steps` steps that a worker trains on: [num_steps * rows_per_rank, ...]."""
        places = self.places(first_step, num_steps, rank=rank, rows_per_rank=rows_per_rank)
        return RankRows(tokens=self.read(self.plan.domains, places["domain"], places["row"]), **places)

    def places(self, first_step: int, num_steps: int, *, rank: int, rows_per_rank: int) -> dict[str, NDArray[Any]]:
        """What `part` returns but for the tokens, which are not read: `position`, `domain`, `row`, `replayed`."""
        everything = self.sequences(first_step, num_steps)
        inside = np.arange(rank * rows_per_rank, (rank + 1) * rows_per_rank)
        steps = np.arange(num_steps)[:, None] * self.rows_per_step
        index = np.where(inside < self.rows_per_step, steps + inside, -1).ravel()
        real = index >= 0
        return {
            "position": np.where(real, everything.start + index, -1),
            "domain": np.where(real, everything.domain[index], -1).astype(np.int16),
            "row": np.where(real, everything.row[index], 0),
            "replayed": real & everything.replayed[index],
        }

    def replayed_share(self, steps: int) -> float:
        """Replayed rows / all rows of the first `steps` steps, exactly, from the plan."""
        stop = self.first_row + steps * self.rows_per_step
        replayed = total = 0
        for segment in self.plan.segments:
            low, high = max(segment.start_row, self.first_row), min(segment.start_row + segment.rows, stop)
            if low < high:
                drawn = segment.drawn(high - segment.start_row)
                replayed += sum(drawn[name] for name in segment.replay)
                total += high - low
        return replayed / total


@dataclass(frozen=True)
class RankRows:
    """Rows of one worker; n rows, position -1 where padded."""

    tokens: NDArray[np.int32]
    """[n, seq_len + 1], wire format of `nexus_ray.corpora.reader`."""
    position: NDArray[np.int64]
    """Global position in the plan."""
    domain: NDArray[np.int16]
    """Index into the plan's domains."""
    row: NDArray[np.int64]
    """Row number within the domain."""
    replayed: NDArray[np.bool_]

    def __getitem__(self, part: slice) -> RankRows:
        return RankRows(self.tokens[part], self.position[part], self.domain[part], self.row[part], self.replayed[part])

    def __len__(self) -> int:
        return len(self.position)


def row_hashes(rows: RankRows) -> int:
    """A hash of which tokens stand at which positions, additive over workers (mod 2**62); padding adds nothing."""
    real = rows.position >= 0
    tokens = rows.tokens[real].astype(np.uint64)
    with np.errstate(over="ignore"):
        columns = np.arange(1, tokens.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        each = ((tokens + np.uint64(1)) * (columns | np.uint64(1))).sum(axis=1, dtype=np.uint64)
        each = (each ^ (each >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        each ^= (rows.position[real].astype(np.uint64) + np.uint64(1)) * np.uint64(0x94D049BB133111EB)
        return int((each >> np.uint64(2)).sum(dtype=np.uint64)) & ((1 << 62) - 1)
