"""What the record says of one optimizer step, and of the step that could not be taken. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nexus_ray.errors import TrainingError
from nexus_ray.train.committed import committed
from nexus_ray.train.losses import loss_by_domain

if TYPE_CHECKING:
    from nexus_ray.train.loop import StageJob


def step_line(
    job: StageJob,
    step: int,
    sums: Tensor,
    *,
    lr: float,
    grad_norm: float | None,
    seconds: float,
    batch_hash: int,
    waited_s: float,
    world: int,
    more: Mapping[str, float],
) -> dict[str, Any]:
    """The line of `metrics.jsonl` after step `step` (0-based); `sums` are nats, targets and rows by domain [J, 3]."""
    stream = job.stream
    assert stream is not None
    tokens = stream.rows_per_step * stream.plan.seq_len
    return {
        "stage": job.stage,
        "stage_index": job.stage_index,
        "attempt": job.attempt,
        "step": step + 1,
        "tokens": (step + 1) * tokens,
        "time": round(time.time(), 3),
        "world_size": world,
        "train/loss": float(sums[:, 0].sum() / sums[:, 1].sum()),
        **{f"train/loss/{name}": value for name, value in loss_by_domain(sums, stream.plan.domains).items()},
        "train/lr": lr,
        "train/grad_norm": grad_norm,
        "train/replay_fraction": stream.replayed_share(step + 1),
        "train/targets": int(sums[:, 1].sum()),
        "perf/tokens_per_second": round(tokens / seconds, 1),
        "perf/step_seconds": round(seconds, 4),
        "data/batch_hash": f"{batch_hash:016x}",
        "data/waited_seconds": round(waited_s, 4),
        **more,
    }


def not_finite(
    job: StageJob, what: str, value: float, step: int, sums: Tensor, *, lr: float, grad_norm: float | None
) -> TrainingError:
    """The error of a step (0-based) whose loss or gradient norm is no finite number."""
    stream = job.stream
    assert stream is not None
    found = committed(job.checkpoints)
    last_good = f"the last good checkpoint is {found[0].folder.uri}" if found else "there is no checkpoint yet"
    losses = loss_by_domain(sums, stream.plan.domains)
    first = stream.first_row + step * stream.rows_per_step
    return TrainingError(
        f"stage {job.stage!r}, step {step + 1}: the {what} is {value}. Losses by domain: {losses}; learning "
        f"rate {lr:.3g}; gradient norm of the step before {grad_norm}; rows {first} to "
        f"{first + stream.rows_per_step - 1} of the plan; {last_good}. Lower training.learning_rate, raise "
        f"continual.warmup_steps, or use training.precision: fp32, under another name"
    )
