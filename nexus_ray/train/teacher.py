"""Stored predictions of the model a stage starts from, for the KL term on replayed rows.

Before the stage, its first weights read every row that the plan will replay, and the `k` most likely next tokens of
each column are kept with their log-probabilities. During the stage they are read again, a few rows per step, so that
no second model is ever in memory. The rest of the vocabulary counts as one class.

Files: `part-RRRRR.parquet` of each rank (columns `ids`, `log_probs`: one row's arrays as bytes), in plan order, and
`MANIFEST.json`, written last. Entry j belongs to the j-th replayed row of the stage.

Dimensions: B rows, S columns, K stored tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_ray.corpora.reader import PAD
from nexus_ray.errors import DataError
from nexus_ray.models.score import IGNORE, decode_rows, row_logits
from nexus_ray.storage import Storage
from nexus_ray.stream.rows import RankRows, StageStream
from nexus_ray.train.agree import WorkerContext

MANIFEST = "MANIFEST.json"
GROUP_ROWS = 32
"""Rows of one row group: what a read costs at least."""
KEPT_GROUPS = 4
"""Row groups a reader holds: rows are read in plan order."""


@dataclass(frozen=True)
class TeacherInfo:
    """What stored predictions belong to."""

    rows: int
    """Replayed rows of the stage."""
    parts: int
    top_k: int
    seq_len: int
    first_row: int
    """Where the stage begins in the plan."""
    run: str
    """Fingerprint of the run."""


def replayed_before(stream: StageStream, position: int) -> int:
    """Replayed rows of the stage that stand before a position of the plan."""
    count = 0
    for segment in stream.plan.segments:
        low, high = max(segment.start_row, stream.first_row), min(segment.start_row + segment.rows, position)
        if low < high:
            before = segment.drawn(low - segment.start_row)
            drawn = segment.drawn(high - segment.start_row)
            count += sum(drawn[name] - before[name] for name in segment.replay)
    return count


def replayed_rows(stream: StageStream) -> int:
    return replayed_before(stream, stream.first_row + stream.steps * stream.rows_per_step)


def top_log_probs(logits_BSV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids int32 [B, S, K] and float16 log-probabilities of the K most likely next tokens of each column."""
    values, ids = logits_BSV.float().log_softmax(dim=-1).topk(min(k, logits_BSV.shape[-1]), dim=-1)
    return ids.to(torch.int32), values.to(torch.float16)


def kl_to_stored(logits_BSV: Tensor, ids_BSK: Tensor, log_probs_BSK: Tensor, targets_BS: Tensor) -> Tensor:
    """KL(stored || model) in nats, float32 [B, S], over the K stored tokens and the rest as one class; 0 where a
    column has no target. It is a lower bound of the KL over the whole vocabulary."""
    stored = log_probs_BSK.float()
    rest = (-torch.expm1(stored.logsumexp(dim=-1).clamp(max=-1e-6))).log()
    mine = logits_BSV.float().log_softmax(dim=-1).gather(-1, ids_BSK.long())
    mine_rest = (-torch.expm1(mine.logsumexp(dim=-1).clamp(max=-1e-6))).log()
    kl = (stored.exp() * (stored - mine)).sum(dim=-1) + rest.exp() * (rest - mine_rest)
    return kl.masked_fill(targets_BS == IGNORE, 0.0)


class TeacherWriter:
    """One rank's part, written in plan order."""

    def __init__(self, folder: Storage, rank: int) -> None:
        self._folder, self._name = folder, f"part-{rank:05d}.parquet"
        self._ids: list[bytes] = []
        self._log_probs: list[bytes] = []
        folder.filesystem.create_dir(folder.path(), recursive=True)
        self._sink = folder.filesystem.open_output_stream(folder.path(self._name))
        self._file = pq.ParquetWriter(self._sink, _SCHEMA, compression="zstd", write_page_checksum=True)

    def add(self, ids_BSK: Tensor, log_probs_BSK: Tensor) -> None:
        for ids, log_probs in zip(ids_BSK.cpu().numpy(), log_probs_BSK.cpu().numpy(), strict=True):
            self._ids.append(ids.tobytes())
            self._log_probs.append(log_probs.tobytes())
        while len(self._ids) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = [pa.array(column[:GROUP_ROWS], pa.binary()) for column in (self._ids, self._log_probs)]
        self._file.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), row_group_size=GROUP_ROWS)
        del self._ids[:GROUP_ROWS], self._log_probs[:GROUP_ROWS]

    def close(self) -> None:
        if self._ids:
            self._flush()
        self._file.close()
        self._sink.close()


_SCHEMA = pa.schema([("ids", pa.binary()), ("log_probs", pa.binary())])


class Teacher:
    """Reads stored predictions by the position of their row among the stage's replayed rows."""

    def __init__(self, folder: Storage, info: TeacherInfo, stream: StageStream) -> None:
        self.info, self._stream = info, stream
        self._folder = folder
        self._files: dict[int, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[int, int], dict[str, list[bytes]]] = OrderedDict()

    @classmethod
    def open(cls, folder: Storage, expected: TeacherInfo, stream: StageStream) -> Teacher:
        """Raises DataError if nothing is stored there, or something else than what is expected."""
        if not folder.exists(MANIFEST):
            raise DataError(
                f"continual.keep.kl needs the stored predictions of the stage's first model, and {folder.uri} holds "
                f"none; run the roadmap again, which writes them before the stage"
            )
        found = TeacherInfo(**folder.read_json(MANIFEST))
        for name in ("rows", "top_k", "seq_len", "first_row", "run"):
            if getattr(found, name) != getattr(expected, name):
                raise DataError(
                    f"the stored predictions in {folder.uri} have {name}={getattr(found, name)}, this stage needs "
                    f"{getattr(expected, name)}; delete that folder to have them written again"
                )
        return cls(folder, found, stream)

    def divergence(self, logits: Tensor, targets_BS: Tensor, rows: RankRows) -> Tensor:
        """`kl_to_stored` of a micro-batch [B, S]; zero in rows that are not replayed. Differentiable in `logits`."""
        replayed = np.flatnonzero(rows.replayed)
        kl = torch.zeros(targets_BS.shape, dtype=torch.float32, device=logits.device)
        if not len(replayed):
            return kl
        first = replayed_before(self._stream, int(rows.position[replayed[0]]))
        ids, log_probs = self.read(range(first, first + len(replayed)))  # a worker's rows follow each other in the plan
        index = torch.from_numpy(replayed).to(logits.device)
        mine = logits.view(*targets_BS.shape, -1)[index]
        stored = ids.to(logits.device), log_probs.to(logits.device)
        return kl.index_copy(0, index, kl_to_stored(mine, *stored, targets_BS[index]))

    def read(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [n, S, K] of the stage's replayed rows with these numbers."""
        shape = (self.info.seq_len, -1)
        pairs = [self._entry(int(number)) for number in numbers]
        ids = np.stack([np.frombuffer(pair[0], np.int32).reshape(shape) for pair in pairs])
        log_probs = np.stack([np.frombuffer(pair[1], np.float16).reshape(shape) for pair in pairs])
        return torch.from_numpy(ids), torch.from_numpy(log_probs)

    def _entry(self, number: int) -> tuple[bytes, bytes]:
        per_part = rows_per_part(self.info.rows, self.info.parts)
        part, row = divmod(number, per_part)
        key = (part, row // GROUP_ROWS)
        if key not in self._groups:
            self._groups[key] = self._read_group(*key)
            if len(self._groups) > KEPT_GROUPS:
                self._groups.popitem(last=False)
        group, inside = self._groups[key], row % GROUP_ROWS
        return group["ids"][inside], group["log_probs"][inside]

    def _read_group(self, part: int, group: int) -> dict[str, list[bytes]]:
        path = self._folder.path(f"part-{part:05d}.parquet")
        try:
            if part not in self._files:
                source = self._folder.filesystem.open_input_file(path)
                self._files[part] = pq.ParquetFile(source, page_checksum_verification=True)
            return self._files[part].read_row_group(group).to_pydict()
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"the stored predictions in {path} cannot be read ({error}); delete {self._folder.uri} and the "
                f"stage's checkpoints to have them written again"
            ) from error


def rows_per_part(rows: int, parts: int) -> int:
    """Replayed rows in each rank's part; the last may have fewer."""
    return max(1, -(-rows // parts))


def write_teacher(
    model: Any, stream: StageStream, folder: Storage, info: TeacherInfo, context: WorkerContext, *, batch_rows: int
) -> None:
    """Store what `model` predicts of every row that the stage will replay; collective. `batch_rows` per forward."""
    per_part = rows_per_part(info.rows, info.parts)
    first = min(info.rows, context.rank * per_part)
    last = min(info.rows, first + per_part)
    if context.rank == 0:
        folder.delete(MANIFEST)
    writer = TeacherWriter(folder, context.rank)
    batches = stored_rows(stream, first, last, batch=batch_rows)
    nothing = np.full((1, stream.plan.seq_len + 1), PAD, dtype=np.int32)
    model.eval()
    with torch.no_grad():
        for _ in range(-(-per_part // batch_rows)):  # the same number of forward passes on every rank: ZeRO-3 needs it
            tokens = next(batches, None)
            rows = decode_rows(nothing if tokens is None else tokens).to(context.device)
            logits = row_logits(model, rows)
            if tokens is not None:
                writer.add(*top_log_probs(logits.view(*rows.targets.shape, -1), info.top_k))
    with folder.write_errors():
        writer.close()
    context.gather(None)
    if context.rank == 0:
        folder.write_json(asdict(info), MANIFEST)
    context.gather(None)


def stored_rows(stream: StageStream, first: int, last: int, *, batch: int) -> Iterator[NDArray[np.int32]]:
    """Tokens [n, S+1] of the stage's replayed rows `first` to `last - 1`, up to `batch` at a time, in plan order."""
    waiting: list[NDArray[np.int32]] = []
    count, number, step = 0, 0, 0
    while step < stream.steps and number < last:
        places = stream.sequences(step, 1)
        step += 1
        indices = np.flatnonzero(places.replayed)
        inside = indices[(number + np.arange(len(indices)) >= first) & (number + np.arange(len(indices)) < last)]
        number += len(indices)
        if len(inside):
            waiting.append(stream.read(places.domains, places.domain[inside], places.row[inside]))
            count += len(inside)
        while count >= batch:
            rows = np.concatenate(waiting)
            yield rows[:batch]
            waiting, count = [rows[batch:]], count - batch
    if count:
        yield np.concatenate(waiting)
