"""What one training worker does in a stage: build, restore, train step by step, checkpoint, hand over to the hooks.

The update of a step depends on the rows of its global batch alone, not on how many workers share them. Decisions that
all workers must take together (stop, save, give up) are summed with the step's token counts, so nobody can diverge.
Evaluators and exporters are handed in as hooks; this module imports neither.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nexus_ray.config.tree import RunConfig
from nexus_ray.errors import DataError, NexusError
from nexus_ray.models.methods import Adapted, inserts_blocks, opened, openings
from nexus_ray.models.score import decode_rows, row_logits, target_nll, token_nll
from nexus_ray.models.targets import trainable_report
from nexus_ray.storage import Storage
from nexus_ray.stream.feed import Feed, steps_per_chunk
from nexus_ray.stream.plan import Segment
from nexus_ray.stream.rows import RankRows, StageStream, row_hashes
from nexus_ray.train import checkpoint as ckpt
from nexus_ray.train.agree import KnownToAll, WorkerContext
from nexus_ray.train.between import best_between
from nexus_ray.train.engine import BatchShape, Engine, import_deepspeed
from nexus_ray.train.governor import Control, Governor
from nexus_ray.train.hooks import StageHooks
from nexus_ray.train.line import not_finite, step_line
from nexus_ray.train.lineage import Earlier, Lineage
from nexus_ray.train.losses import domain_sums, row_weights, weighted_sum
from nexus_ray.train.schedule import factor
from nexus_ray.train.stop import StopWatch
from nexus_ray.train.teacher import Teacher, TeacherInfo, replayed_rows, write_teacher
from nexus_ray.train.watch import Watch

PROBE_ROWS = 4
"""Rows that the check of an expanded model's first step reads, of old and of new text."""


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
    history: tuple[Earlier, ...] = ()
    """The stages before this one, first to last; it starts where the last one ended."""
    control: Control | None = None
    """What the stage is controlled by while it runs."""
    watch: Watch | None = None
    """Who is told of its evaluations, and may pause or stop it."""
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
    except KnownToAll as known:
        error = known.error
    except NexusError as alone:
        if context.world > 1:
            raise
        error = alone
    if os.environ.get("NEXUS_DEBUG"):
        traceback.print_exception(error)
    return {"error": {"kind": type(error).__name__, "message": str(error)}}


class _Stage:
    def __init__(
        self, job: StageJob, context: WorkerContext, blocks: Callable[..., Any] | None, entered: float | None
    ) -> None:
        self.job, self.context = job, context
        self.marks = {"entered": entered or time.time(), "imported": time.time()}
        """Unix seconds of the milestones up to the first step."""
        self.config, self.training, self.keep = job.config, job.config.training, job.config.continual.keep
        self.lineage = Lineage(job.config, job.history, job.vocab_size, job.eos_id, context, self._warn)
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
            self.openings = openings(job.config, job.stream.steps)
        self.optimizer_step = 0
        self.peak_memory = 0

    def _warn(self, text: str) -> None:
        print(f"nexus-ray: rank {self.context.rank}: {text}", flush=True)

    # --- setting up -------------------------------------------------------------------------------------------

    def _restore(self) -> int:
        """Build the engine in the newest state there is; the step where training goes on. Also called in the middle of
        a stage, when more of the model is opened to training."""
        import_deepspeed(use_gpu=self.config.cluster.use_gpu)
        self.marks.setdefault("deepspeed", time.time())
        own = self.lineage.newest(self.job.checkpoints)
        if own is not None:
            self.context.agreed(partial(self._own_run, own))
        adapted, source = self.lineage.build(own=own)
        step = own.info.step if own is not None else 0
        if own is None and inserts_blocks(self.config, [each.config for each in self.job.history]):
            self.context.agreed(partial(self._check_first_step, adapted))
        factors = opened(adapted, self.config, step, self._stream.steps)
        start = self._start_masters(factors) if own is not None and self.keep.l2 else None
        if source is None:
            self.engine = self._engine(adapted.model, factors)
        else:
            keep = own is not None or self.config.continual.optimizer_state == "keep"
            self._load(adapted.model, source, factors, keep_optimizer=keep)
            self.optimizer_step = source.info.optimizer_step if keep else 0
        self.adapted = adapted
        if self.keep.l2:
            self.engine.pull_to(start or self.engine.copied_masters(), self.keep.l2)
        self.frozen = ckpt.frozen_sha256(self.engine.module)
        if own is None:
            torch.manual_seed(self.config.seed)
        else:
            ckpt.restore_rng(own, rank=self.context.rank)
            self._verify(own)
        self.engine.engine.train()
        return step

    def _check_first_step(self, adapted: Adapted) -> None:
        """Training may not begin if its first step would throw old text off."""
        from nexus_ray.models.identity import check_drift

        places = self._stream.sequences(0, 1)
        new = self._stream.read(places.domains, places.domain[:PROBE_ROWS], places.row[:PROBE_ROWS])
        check_drift(
            adapted.model,
            adapted.expansions[-1].parameters,
            old_rows=decode_rows(self.job.hooks.old_text(PROBE_ROWS)),
            new_rows=decode_rows(new),
            learning_rate=self.training.learning_rate,
            weight_decay=self.training.weight_decay,
            max_drift=self.config.continual.expansion.max_drift,
        )

    def _engine(self, model: nn.Module, lr_factors: Mapping[str, float]) -> Engine:
        model, use_gpu = model.to(self.context.device), self.config.cluster.use_gpu
        return Engine(model, self.training, self.shape, use_gpu=use_gpu, lr_factors=lr_factors)

    def _start_masters(self, lr_factors: Mapping[str, float]) -> list[list[Tensor]]:
        """The stage's first weights as the optimizer of this worker holds them."""
        return self._engine(self.lineage.start().model, lr_factors).copied_masters()

    def _verify(self, own: ckpt.Checkpoint) -> None:
        trained = {name for group in own.info.parameters for name in group}
        frozen = ckpt.frozen_sha256(self.engine.module, trained)
        exact = own.info.same_layout(self.engine) and own.info.parameters == self.engine.group_names
        same = partial(
            ckpt.verify,
            own,
            frozen=frozen,
            probe_loss=self._probe(),
            exact=exact,
            precision=str(self.training.precision),
        )
        self.context.agreed(same)

    def _own_run(self, checkpoint: ckpt.Checkpoint) -> None:
        if checkpoint.info.fingerprint != self.job.fingerprint:
            raise DataError(
                f"checkpoint {checkpoint.folder.uri} was made by config {checkpoint.info.fingerprint}, this is "
                f"{self.job.fingerprint}; start under another name"
            )

    def _load(
        self, model: nn.Module, source: ckpt.Checkpoint, lr_factors: Mapping[str, float], *, keep_optimizer: bool
    ) -> None:
        rank, world = self.context.rank, self.context.world
        mine = (world, int(self.training.zero_stage), self.training.precision)
        same = mine == (source.info.world_size, source.info.zero_stage, source.info.precision)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if same and sorted(trained) == sorted(name for group in source.info.parameters for name in group):
            self.engine = self._engine(model, lr_factors)
            ckpt.load_native(self.engine, source, rank=rank)
            if not keep_optimizer:
                self.engine.reset_optimizer()
            return
        with ckpt.portable(source, rank=rank, world=world) as states:
            ckpt.load_weights(model, states)
            self.engine = self._engine(model, lr_factors)
            if keep_optimizer:
                self.engine.set_state(states, optimizer_step=source.info.optimizer_step)

    def _teacher(self, step: int) -> Teacher | None:
        """Predictions of the stage's first weights on the rows it will replay; written before its first step."""
        rows = replayed_rows(self._stream) if self.keep.kl else 0
        if not rows:
            return None
        folder = self.job.folder.child("teacher")
        info = TeacherInfo(
            rows=rows,
            parts=self.context.world,
            top_k=min(self.keep.kl_top_k, self.job.vocab_size),
            seq_len=self.training.seq_len,
            first_row=self._stream.first_row,
            run=self.job.fingerprint,
        )
        if step == 0:
            batch = self.engine.shape.micro
            write_teacher(self.engine.engine, self._stream, folder, info, self.context, batch_rows=batch)
            self.engine.engine.train()
        return self.context.agreed(partial(Teacher.open, folder, info, self._stream))

    # --- the loop ---------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        job, context = self.job, self.context
        began = time.time()
        if job.stream is None:
            self.adapted = Adapted(context.agreed(self.lineage.first))
            self.engine = self._engine(self.adapted.model, {})
            return self._result(0, began, job.hooks.finish(self.engine, context, self.adapted))
        step = self._restore()
        self.saved_at, self.saved_step = time.monotonic(), step
        self.teacher = self._teacher(step)
        self.governor = Governor(job, context, self.engine, step)
        watch = StopWatch(job.run) if context.rank == 0 else None
        self.marks["engine"] = time.time()
        while step < job.stream.steps:
            if self.governor.acts:  # the driver appends to the plan, and the stage goes on from here
                return {"replanned": True, "step": step, "train_seconds": round(time.time() - began, 2)}
            stop = self._step(step, watch)
            step += 1
            self.feed.start(step + 1)  # what it needs to start up would only delay the first step
            held = self.governor.answer != "continue"
            if stop or (self.saved_step != step and (held or self.governor.acts or step in self.openings)):
                self._save(step)
            if held:
                return {"held": self.governor.answer, "step": step, "train_seconds": round(time.time() - began, 2)}
            if step in self.openings and not stop and not self.governor.acts:
                self._restore()
            if stop:
                return {"interrupted": True, "step": step}
        if self.saved_step != step or not ckpt.committed(job.checkpoints):
            self._save(step)
        self.peak_memory = peak_memory(context.device)
        chosen = self._interpolate(step) if self.keep.interpolate else {}
        return self._result(step, began, {**chosen, **job.hooks.finish(self.engine, context, self.adapted)})

    def _step(self, step: int, watch: StopWatch | None) -> bool:
        """One optimizer step, its line in the record, and whether to stop after it."""
        stream = self._stream
        began = time.perf_counter()
        rows, fault = self._rows(step)
        self.marks.setdefault("batch", time.time())
        decoded = decode_rows(rows.tokens).to(self.context.device)
        targets_B = (decoded.targets >= 0).sum(dim=1)
        save = step + 1 < stream.steps and self._save_due(step + 1)
        asked = [float(targets_B.sum()), float(bool(watch and watch.asked)), float(save), float(fault is not None)]
        targets, stop, save_sum, faults = self.context.sum(torch.tensor(asked, dtype=torch.float64)).tolist()
        if faults:
            raise next(KnownToAll(DataError(text)) for text in self.context.gather(fault) if text)
        segment = self._segment(step)
        weight_B = row_weights(
            torch.from_numpy(rows.replayed.copy()),
            alpha=self.config.continual.alpha,
            replay_ratio=segment.replay_ratio,
        ).to(self.context.device)
        domain_B = torch.from_numpy(rows.domain.copy())
        lr = self.training.learning_rate * segment.lr_factor * self._lr_factor(step)
        sums = torch.zeros(len(stream.plan.domains), 3, dtype=torch.float64)
        kl = 0.0
        micro = self.engine.shape.micro
        starts = range(0, len(rows), micro)
        for begin in starts:
            part = slice(begin, begin + micro)
            piece = type(decoded)(*(getattr(decoded, name)[part] for name in decoded.__dataclass_fields__))
            logits = row_logits(self.engine.engine, piece)
            nll_BT = target_nll(logits, piece.targets)
            loss = weighted_sum(nll_BT, weight_B[part])
            if self.teacher is not None:
                kl_BT = self.teacher.divergence(logits, piece.targets, rows[part])
                loss = loss + self.keep.kl * kl_BT.sum()
                kl += float(kl_BT.detach().double().sum())
            self.engine.backward(loss, max(1.0, targets))
            sums += domain_sums(nll_BT, targets_B[part], domain_B[part], len(sums))
            last = begin == starts[-1]
            if last:
                sums, kl, batch_hash = self._summed(sums, kl, rows)
                self._check_finite("loss", float(sums[:, 0].sum() / sums[:, 1].sum()), step, sums, lr)
            self.engine.step(last=last, learning_rate=lr)
        if self.engine.grad_norm is not None:
            self._check_finite("gradient norm", self.engine.grad_norm, step, sums, lr)
        self.optimizer_step += 1
        self.marks.setdefault("step", time.time())
        self._record(step, sums, kl, lr, batch_hash, time.perf_counter() - began)
        if save_sum and not stop:
            self._save(step + 1)
        return bool(stop)

    @property
    def _stream(self) -> StageStream:
        assert self.job.stream is not None
        return self.job.stream

    def _segment(self, step: int) -> Segment:
        return self._stream.plan.segment_at(self._stream.first_row + step * self._stream.rows_per_step)

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
        return factor(
            step,
            total_steps=self._stream.steps,
            warmup_steps=self.config.continual.warmup_steps,
            config=self.training.schedule,
            rewarm=self.config.continual.warmup_on_new or self.job.stage_index == 0,
        )

    def _summed(self, sums: Tensor, kl: float, rows: RankRows) -> tuple[Tensor, float, int]:
        """Per-domain sums, the divergence from the teacher and the hash of the global batch, over all workers."""
        part = row_hashes(rows)
        extra = (
            kl,
            float(part & 0x7FFFFFFF),
            float(part >> 31),
        )  # halves: exact in float64
        packed = self.context.sum(torch.cat([sums.flatten(), torch.tensor(extra, dtype=torch.float64)]))
        total = (int(packed[-2]) + (int(packed[-1]) << 31)) & ((1 << 62) - 1)
        return packed[:-3].view_as(sums), float(packed[-3]), total

    def _check_finite(self, what: str, value: float, step: int, sums: Tensor, lr: float) -> None:
        if not np.isfinite(value):
            known = not_finite(self.job, what, value, step, sums, lr=lr, grad_norm=self.engine.grad_norm)
            raise KnownToAll(known)

    def _record(self, step: int, sums: Tensor, kl: float, lr: float, batch_hash: int, seconds: float) -> None:
        stream = self._stream
        more: dict[str, float] = {}
        if self.teacher is not None:
            replayed = [i for i, name in enumerate(stream.plan.domains) if name in self._segment(step).replay]
            more["train/kl"] = kl / max(1.0, float(sums[replayed, 1].sum()))
        every = self.config.evaluation.every_steps
        if every and (step + 1) % every == 0 and step + 1 < stream.steps:
            signals = {"loss": float(sums[:, 0].sum() / sums[:, 1].sum())}
            if self.engine.grad_norm is not None:
                signals["grad_norm"] = self.engine.grad_norm
            more |= self.governor.evaluate(self.engine, step + 1, signals)
        if self.context.rank == 0:
            line = step_line(
                self.job,
                step,
                sums,
                lr=lr,
                grad_norm=self.engine.grad_norm,
                seconds=seconds,
                batch_hash=batch_hash,
                waited_s=self.feed.waited_s,
                world=self.context.world,
                more=more,
            )
            self.job.run.append_line(json.dumps(line), "metrics.jsonl")

    # --- between the first and the last weights ---------------------------------------------------------------

    def _interpolate(self, step: int) -> dict[str, Any]:
        """Replace the trained weights by the best point between the stage's first ones and them, in a checkpoint that
        counts as later than the one that training ended with."""
        own = self.lineage.newest(self.job.checkpoints)
        assert own is not None
        if own.info.interpolated is not None:  # this process came after the choice
            return {"interpolated": {"factor": own.info.interpolated}}
        first = self.lineage.start().model
        shares, new = self.keep.interpolate, self.config.stages[self.job.stage_index].domains
        found = best_between(first, own, shares, context=self.context, select=self.job.hooks.select, new_domains=new)
        if found.factor != 1.0:
            del self.engine
            self.engine = self._engine(found.model, {})
            self.engine.set_state({}, optimizer_step=0)  # moments of other weights; DeepSpeed saves no gaps
            self.optimizer_step = 0
            self._save(step, interpolated=found.factor)
        return {"interpolated": {"factor": found.factor, "losses": found.losses}}

    # --- checkpoints and result -------------------------------------------------------------------------------

    def _save_due(self, step: int) -> bool:
        """Rank 0's clock decides for all."""
        policy = self.training.checkpoint
        by_steps = policy.every_steps is not None and step % policy.every_steps == 0
        by_clock = policy.every_seconds is not None and time.monotonic() - self.saved_at >= policy.every_seconds
        return self.context.rank == 0 and (by_steps or by_clock)

    def _save(self, step: int, *, interpolated: float | None = None) -> None:
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
            interpolated=interpolated,
        )
        ckpt.save(self.engine, self.job.checkpoints, info, rank=self.context.rank, keep=self.training.checkpoint.keep)
        self.saved_at, self.saved_step = time.monotonic(), step

    def _probe(self) -> float:
        """Loss in nats per target of the stage's first two rows under the present weights."""
        stream = self._stream
        first = stream.plan.sequences(stream.first_row, stream.first_row + 2)
        rows = decode_rows(stream.read(first.domains, first.domain, first.row)).to(self.context.device)
        self.engine.engine.eval()
        with torch.no_grad():
            nll = token_nll(self.engine.engine, rows).double().sum()
        self.engine.engine.train()
        return float(nll / max(1, int((rows.targets >= 0).sum())))

    def _result(self, step: int, began: float, extra: dict[str, Any]) -> dict[str, Any]:
        trainable = trainable_report(self.engine.module)
        found = ckpt.committed(self.job.checkpoints) if self.job.stream is not None else []
        timings = {name: round(at - self.job.called, 2) for name, at in self.marks.items()}
        return {
            "steps": step,
            "train_seconds": round(time.time() - began, 2),
            "time_to_first_step": timings.get("step"),
            "timings": timings,
            "world_size": self.context.world,
            "parameters": trainable[-1].total,
            "trainable_parameters": trainable[-1].trainable,
            "trainable": {row.kind: [row.trainable, row.total] for row in trainable[:-1]},
            **self._leak(),
            "peak_memory_bytes": max(self.context.gather(self.peak_memory)),
            "checkpoint": found[0].folder.uri if found else None,
            "local_steps": self.feed.local_steps if self.job.stream is not None else 0,
            **extra,
        }

    def _leak(self) -> dict[str, float]:
        """Share of the update that lies in the directions that OSFT preserves; not measured where ZeRO-3 partitions."""
        if self.config.continual.method != "osft" or self.engine.stage == 3:
            return {}
        from nexus_ray.models.osft import model_leak

        return {"leak": model_leak(self.engine.module)}


def peak_memory(device: torch.device) -> int:
    """Most bytes in use at once so far: of the GPU's memory by tensors, or else of this process, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
