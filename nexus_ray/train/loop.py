"""What one training worker does in a stage: build, restore, train step by step, checkpoint, hand over to the hooks.

The update of a step depends on the rows of its global batch alone, not on how many workers share them. Decisions that
all workers must take together (stop, save, give up) are summed with the step's token counts, so nobody can diverge.
Evaluators and exporters are handed in as hooks; this module imports neither.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_ray.config.tree import RunConfig
from nexus_ray.errors import DataError, NexusError, TrainingError
from nexus_ray.models.build import apply_freeze, build_model
from nexus_ray.models.score import decode_rows, token_nll
from nexus_ray.storage import Storage
from nexus_ray.stream.feed import Feed, steps_per_chunk
from nexus_ray.stream.rows import RankRows, StageStream, row_hashes
from nexus_ray.train import checkpoint as ckpt
from nexus_ray.train.engine import BatchShape, Engine, import_deepspeed
from nexus_ray.train.losses import domain_sums, loss_by_domain, row_weights, weighted_sum
from nexus_ray.train.schedule import factor

STOP_FILE = ("control", "stop")
T = TypeVar("T")


@dataclass(frozen=True)
class WorkerContext:
    """Which worker this is, and collective sums."""

    rank: int
    world: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all workers."""
        if self.world == 1:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved)
        return moved.to(values.device)


class StageHooks(Protocol):
    """What happens to the model besides training; every method is called by all workers together."""

    def during(self, model: nn.Module, context: WorkerContext) -> dict[str, float]:
        """Metrics of an evaluation during the stage."""

    def finish(self, engine: Engine, context: WorkerContext) -> dict[str, Any]:
        """Evaluate and export at the end of the stage; what it returns becomes part of the stage's result."""


@dataclass(frozen=True)
class StageJob:
    """Everything a worker needs to run one stage; picklable, with absolute storage."""

    config: RunConfig
    """Resolved, with the stage's overrides applied."""
    stage: str
    stage_index: int
    attempt: int
    run: Storage
    folder: Storage
    """The stage's folder."""
    fingerprint: str
    vocab_size: int
    eos_id: int
    hooks: StageHooks
    stream: StageStream | None
    """None: nothing is trained, only the hooks run."""
    start_from: Storage | None = None
    """Checkpoint folder of the stage before."""
    called: float = field(default_factory=time.time)
    """Unix seconds at the call of `fit`."""

    @property
    def checkpoints(self) -> Storage:
        return self.folder.child("checkpoints")


def run_worker(
    job: StageJob, *, context: WorkerContext, blocks: Callable[..., Any] | None, entered: float | None = None
) -> dict[str, Any]:
    """Train a stage to its end, or to a requested stop; returns the stage's result.

    `entered` is when this worker was called (Unix seconds), if that was before this module could be imported.
    A mistake that a restart would only repeat (NexusError) comes back as `{"error": ...}` instead of being raised,
    unless only this one of several workers may know of it: then it is raised, so that Ray Train ends the others, which
    wait for this one in a collective.
    """
    try:
        return _Stage(job, context, blocks, entered).run()
    except _KnownToAll as known:
        error = known.error
    except NexusError as alone:
        if context.world > 1:
            raise
        error = alone
    if os.environ.get("NEXUS_DEBUG"):
        traceback.print_exception(error)
    return {"error": {"kind": type(error).__name__, "message": str(error)}}


class _KnownToAll(Exception):
    """Carries an error that every worker raises at the same point, after an exchange."""

    def __init__(self, error: NexusError) -> None:
        super().__init__(str(error))
        self.error = error


class _Stage:
    def __init__(
        self, job: StageJob, context: WorkerContext, blocks: Callable[..., Any] | None, entered: float | None
    ) -> None:
        self.job, self.context = job, context
        self.marks = {"entered": entered or time.time(), "imported": time.time()}
        """Unix seconds of the milestones up to the first step."""
        self.config, self.training = job.config, job.config.training
        torch.set_num_threads(self.config.cluster.cpus_per_worker or 1)
        self.shape = BatchShape(self.training.rows_per_step, context.world, self.training.micro_batch_size)
        if job.stream is not None:
            rows = self.shape.rows_per_rank
            chunk = steps_per_chunk(job.stream, rows_per_rank=rows, world=context.world)
            self.feed = Feed(
                job.stream,
                rank=context.rank,
                rows_per_rank=rows,
                chunk_steps=chunk,
                blocks=partial(blocks, job.stream, context.rank, rows, chunk) if blocks is not None else None,
                warn=self._warn,
            )
        self.optimizer_step = 0

    def _warn(self, text: str) -> None:
        print(f"nexus-ray: rank {self.context.rank}: {text}", flush=True)

    # --- setting up -------------------------------------------------------------------------------------------

    def _agreed(self, action: Callable[[], T]) -> T:
        """What `action`, which exchanges nothing, returns; if it fails in any worker, all raise the same error."""
        result, error = None, None
        try:
            result = action()
        except NexusError as caught:
            error = caught
        found = next((each for each in ckpt._gather(error, self.context.world) if each is not None), None)
        if found is not None:
            raise _KnownToAll(found)
        return cast(T, result)

    def _build(self) -> nn.Module:
        return self._agreed(self._new_model)

    def _new_model(self) -> nn.Module:
        # fp32 here: DeepSpeed makes its bf16 copies from fp32 weights, which become the masters.
        model = build_model(
            self.config.model, vocab_size=self.job.vocab_size, eos_id=self.job.eos_id, seed=self.config.seed
        )
        apply_freeze(model, self.training.freeze)
        return model

    def _engine(self, model: nn.Module) -> Engine:
        return Engine(model.to(self.context.device), self.training, self.shape, use_gpu=self.config.cluster.use_gpu)

    def _restore(self) -> int:
        """Build the engine in the newest state there is; the step where training goes on."""
        rank, world = self.context.rank, self.context.world
        import_deepspeed(use_gpu=self.config.cluster.use_gpu)
        self.marks["deepspeed"] = time.time()
        own = ckpt.newest_valid(self.job.checkpoints, rank=rank, world=world, on_bad=self._warn)
        before = None
        if self.job.start_from is not None:
            before = ckpt.newest_valid(self.job.start_from, rank=rank, world=world, on_bad=self._warn)
            if before is None:
                raise _KnownToAll(
                    DataError(
                        f"{self.job.start_from.uri} holds no valid checkpoint of the stage before; delete that stage's "
                        f"folder to train it again"
                    )
                )
        model = self._build()
        if own is not None:
            self._agreed(partial(self._own_run, own))
            self._load(model, own, before, keep_optimizer=True)
            self.optimizer_step = own.info.optimizer_step
            ckpt.restore_rng(own, rank=rank)
        elif before is not None:
            keep = self.config.continual.optimizer_state == "keep"
            self._load(model, before, None, keep_optimizer=keep)
            self.optimizer_step = before.info.optimizer_step if keep else 0
        else:
            self.engine = self._engine(model)
        if own is None:
            torch.manual_seed(self.config.seed)
        self.frozen = ckpt.frozen_sha256(self.engine.module)
        if own is not None:
            same = partial(
                ckpt.verify,
                own,
                frozen=self.frozen,
                probe_loss=self._probe(),
                exact=own.info.same_layout(self.engine),
                precision=str(self.training.precision),
            )
            self._agreed(same)
        return own.info.step if own is not None else 0

    def _own_run(self, checkpoint: ckpt.Checkpoint) -> None:
        if checkpoint.info.fingerprint != self.job.fingerprint:
            raise DataError(
                f"checkpoint {checkpoint.folder.uri} was made by config {checkpoint.info.fingerprint}, this is "
                f"{self.job.fingerprint}; start under another name"
            )

    def _load(
        self, model: nn.Module, source: ckpt.Checkpoint, base: ckpt.Checkpoint | None, *, keep_optimizer: bool
    ) -> None:
        rank, world = self.context.rank, self.context.world
        mine = (world, int(self.training.zero_stage), self.training.precision)
        same = mine == (source.info.world_size, source.info.zero_stage, source.info.precision)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if same and sorted(trained) == sorted(name for group in source.info.parameters for name in group):
            self.engine = self._engine(model)
            ckpt.load_native(self.engine, source, rank=rank)
            if not keep_optimizer:
                self.engine.reset_optimizer()
            return
        for each in (base, source):
            if each is not None:
                with ckpt.portable(each, rank=rank, world=world) as states:
                    ckpt.load_weights(model, states)
                    if each is source:
                        self.engine = self._engine(model)
                        if keep_optimizer:
                            self.engine.set_state(states, optimizer_step=source.info.optimizer_step)

    # --- the loop ---------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        job, context = self.job, self.context
        began = time.time()
        if job.stream is None:
            self.engine = self._engine(self._build())
            return self._result(0, began, job.hooks.finish(self.engine, context))
        step = self._restore()
        self.saved_at, self.saved_step = time.monotonic(), step
        watch = _StopWatch(job.run) if context.rank == 0 else None
        self.engine.engine.train()
        self.marks["engine"] = time.time()
        while step < job.stream.steps:
            stop = self._step(step, watch)
            step += 1
            self.feed.start(step + 1)  # what it needs to start up would only delay the first step
            if stop:
                self._save(step)
                return {"interrupted": True, "step": step}
        if self.saved_step != step or not ckpt.committed(job.checkpoints):
            self._save(step)
        return self._result(step, began, job.hooks.finish(self.engine, context))

    def _step(self, step: int, watch: _StopWatch | None) -> bool:
        """One optimizer step, its line in the record, and whether to stop after it."""
        stream = self.job.stream
        assert stream is not None
        began = time.perf_counter()
        rows, fault = self._rows(step)
        self.marks.setdefault("batch", time.time())
        decoded = decode_rows(rows.tokens).to(self.context.device)
        targets_B = (decoded.targets >= 0).sum(dim=1)
        save = step + 1 < stream.steps and self._save_due(step + 1)
        asked = [float(targets_B.sum()), float(bool(watch and watch.asked)), float(save), float(fault is not None)]
        targets, stop, save_sum, faults = self.context.sum(torch.tensor(asked, dtype=torch.float64)).tolist()
        if faults:
            raise next(_KnownToAll(DataError(text)) for text in ckpt._gather(fault, self.context.world) if text)
        segment = stream.plan.segment_at(stream.first_row + step * stream.rows_per_step)
        weight_B = row_weights(
            torch.from_numpy(rows.replayed.copy()),
            alpha=self.config.continual.alpha,
            replay_ratio=segment.replay_ratio,
        ).to(self.context.device)
        domain_B = torch.from_numpy(rows.domain.copy())
        lr = self.training.learning_rate * segment.lr_factor * self._lr_factor(step)
        sums = torch.zeros(len(stream.plan.domains), 3, dtype=torch.float64)
        micro = self.engine.shape.micro
        starts = range(0, len(rows), micro)
        for begin in starts:
            part = slice(begin, begin + micro)
            piece = type(decoded)(*(getattr(decoded, name)[part] for name in decoded.__dataclass_fields__))
            nll_BT = token_nll(self.engine.engine, piece)
            self.engine.backward(weighted_sum(nll_BT, weight_B[part]), max(1.0, targets))
            sums += domain_sums(nll_BT, targets_B[part], domain_B[part], len(sums))
            last = begin == starts[-1]
            if last:
                sums, batch_hash = self._summed(sums, rows)
                self._check_finite(step, sums, stream, lr)
            self.engine.step(last=last, learning_rate=lr)
        if self.engine.grad_norm is not None and not np.isfinite(self.engine.grad_norm):
            raise self._not_finite("gradient norm", self.engine.grad_norm, step, sums, stream, lr)
        self.optimizer_step += 1
        self.marks.setdefault("step", time.time())
        self._record(step, sums, lr, batch_hash, time.perf_counter() - began)
        if save_sum and not stop:
            self._save(step + 1)
        return bool(stop)

    def _rows(self, step: int) -> tuple[RankRows, str | None]:
        """This worker's rows, or rows of nothing and the reason."""
        try:
            return self.feed.batch(step), None
        except DataError as error:
            n, width = self.shape.rows_per_rank, self.training.seq_len + 1
            nothing = np.full((n, width), np.iinfo(np.int32).min, dtype=np.int32)
            minus = np.full(n, -1, dtype=np.int64)
            return RankRows(nothing, minus, minus.astype(np.int16), minus * 0, minus > 0), str(error)

    def _lr_factor(self, step: int) -> float:
        assert self.job.stream is not None
        return factor(
            step,
            total_steps=self.job.stream.steps,
            warmup_steps=self.config.continual.warmup_steps,
            config=self.training.schedule,
            rewarm=self.config.continual.warmup_on_new or self.job.stage_index == 0,
        )

    def _summed(self, sums: Tensor, rows: RankRows) -> tuple[Tensor, int]:
        """Per-domain sums and the hash of the global batch, over all workers."""
        part = row_hashes(rows)
        low, high = float(part & 0x7FFFFFFF), float(part >> 31)  # exact in float64 when summed over workers
        packed = self.context.sum(torch.cat([sums.flatten(), torch.tensor([low, high], dtype=torch.float64)]))
        total = (int(packed[-2]) + (int(packed[-1]) << 31)) & ((1 << 62) - 1)
        return packed[:-2].view_as(sums), total

    def _check_finite(self, step: int, sums: Tensor, stream: StageStream, lr: float) -> None:
        loss = float(sums[:, 0].sum() / sums[:, 1].sum())
        if not np.isfinite(loss):
            raise self._not_finite("loss", loss, step, sums, stream, lr)

    def _not_finite(
        self, what: str, value: float, step: int, sums: Tensor, stream: StageStream, lr: float
    ) -> _KnownToAll:
        found = ckpt.committed(self.job.checkpoints)
        last_good = f"the last good checkpoint is {found[0].folder.uri}" if found else "there is no checkpoint yet"
        losses = loss_by_domain(sums, stream.plan.domains)
        first = stream.first_row + step * stream.rows_per_step
        error = TrainingError(
            f"stage {self.job.stage!r}, step {step + 1}: the {what} is {value}. Losses by domain: {losses}; learning "
            f"rate {lr:.3g}; gradient norm of the step before {self.engine.grad_norm}; rows {first} to "
            f"{first + stream.rows_per_step - 1} of the plan; {last_good}. Lower training.learning_rate, raise "
            f"continual.warmup_steps, or use training.precision: fp32, under another name"
        )
        return _KnownToAll(error)

    def _record(self, step: int, sums: Tensor, lr: float, batch_hash: int, seconds: float) -> None:
        stream = self.job.stream
        assert stream is not None
        evaluation = {}
        every = self.config.evaluation.every_steps
        if every and (step + 1) % every == 0 and step + 1 < stream.steps:
            evaluation = self.job.hooks.during(self.engine.module, self.context)
            self.engine.engine.train()
        if self.context.rank:
            return
        line = {
            "stage": self.job.stage,
            "stage_index": self.job.stage_index,
            "attempt": self.job.attempt,
            "step": step + 1,
            "tokens": (step + 1) * stream.rows_per_step * stream.plan.seq_len,
            "time": round(time.time(), 3),
            "world_size": self.context.world,
            "train/loss": float(sums[:, 0].sum() / sums[:, 1].sum()),
            **{f"train/loss/{name}": value for name, value in loss_by_domain(sums, stream.plan.domains).items()},
            "train/lr": lr,
            "train/grad_norm": self.engine.grad_norm,
            "train/replay_fraction": replayed_share(stream, step + 1),
            "train/targets": int(sums[:, 1].sum()),
            "perf/tokens_per_second": round(stream.rows_per_step * stream.plan.seq_len / seconds, 1),
            "perf/step_seconds": round(seconds, 4),
            "data/batch_hash": f"{batch_hash:016x}",
            "data/waited_seconds": round(self.feed.waited_s, 4),
            **evaluation,
        }
        self.job.run.append_line(json.dumps(line), "metrics.jsonl")

    # --- checkpoints and result -------------------------------------------------------------------------------

    def _save_due(self, step: int) -> bool:
        """Rank 0's clock decides for all."""
        policy = self.training.checkpoint
        by_steps = policy.every_steps is not None and step % policy.every_steps == 0
        by_clock = policy.every_seconds is not None and time.monotonic() - self.saved_at >= policy.every_seconds
        return self.context.rank == 0 and (by_steps or by_clock)

    def _save(self, step: int) -> None:
        info = ckpt.CheckpointInfo(
            fingerprint=self.job.fingerprint,
            stage=self.job.stage,
            stage_index=self.job.stage_index,
            attempt=self.job.attempt,
            step=step,
            world_size=self.context.world,
            zero_stage=self.engine.stage,
            precision=str(self.training.precision),
            optimizer_step=self.optimizer_step,
            parameters=self.engine.group_names,
            frozen_sha256=self.frozen,
            probe_loss=self._probe(),
        )
        ckpt.save(self.engine, self.job.checkpoints, info, rank=self.context.rank, keep=self.training.checkpoint.keep)
        self.saved_at, self.saved_step = time.monotonic(), step

    def _probe(self) -> float:
        """Loss in nats per target of the stage's first two rows under the present weights."""
        stream = self.job.stream
        assert stream is not None
        first = stream.plan.sequences(stream.first_row, stream.first_row + 2)
        rows = decode_rows(stream.read(first.domains, first.domain, first.row)).to(self.context.device)
        self.engine.engine.eval()
        with torch.no_grad():
            nll = token_nll(self.engine.engine, rows).double().sum()
        self.engine.engine.train()
        return float(nll / max(1, int((rows.targets >= 0).sum())))

    def _result(self, step: int, began: float, extra: dict[str, Any]) -> dict[str, Any]:
        parameters = dict(self.engine.module.named_parameters())
        sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in parameters.items()}
        found = ckpt.committed(self.job.checkpoints) if self.job.stream is not None else []
        timings = {name: round(at - self.job.called, 2) for name, at in self.marks.items()}
        return {
            "steps": step,
            "train_seconds": round(time.time() - began, 2),
            "time_to_first_step": timings.get("step"),
            "timings": timings,
            "world_size": self.context.world,
            "parameters": sum(sizes.values()),
            "trainable_parameters": sum(size for name, size in sizes.items() if parameters[name].requires_grad),
            "checkpoint": found[0].folder.uri if found else None,
            "local_steps": self.feed.local_steps if self.job.stream is not None else 0,
            **extra,
        }


def replayed_share(stream: StageStream, steps: int) -> float:
    """Replayed rows / all rows of a stage's first `steps` steps, exactly, from the plan."""
    stop = stream.first_row + steps * stream.rows_per_step
    replayed = total = 0
    for segment in stream.plan.segments:
        low, high = max(segment.start_row, stream.first_row), min(segment.start_row + segment.rows, stop)
        if low < high:
            drawn = segment.drawn(high - segment.start_row)
            replayed += sum(drawn[name] for name in segment.replay)
            total += high - low
    return replayed / total


class _StopWatch:
    """Looks twice a second, beside the training, whether the run was asked to stop."""

    def __init__(self, run: Storage) -> None:
        self.asked = False
        self._run = run
        threading.Thread(target=self._look, daemon=True, name="stop-watch").start()

    def _look(self) -> None:
        while not self.asked:
            self.asked = self._run.exists(*STOP_FILE)
            time.sleep(0.5)
