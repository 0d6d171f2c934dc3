"""What `continual.on_forgetting: control` needs and what it does not combine with."""

from __future__ import annotations

from collections.abc import Iterator

from nexus_ray.config.faults import Fault
from nexus_ray.config.tree import Curriculum, RunConfig

CONTROL = "continual.on_forgetting"
FEWEST_EVALUATIONS = 3
"""Evaluations inside a stage without which there is nothing to control by: one to see, one to act, one to check."""


def control_can_work(config: RunConfig) -> Iterator[Fault]:
    """Faults of a config whose stages are to be controlled while they run."""
    if config.continual.on_forgetting != "control":
        return
    yield from _has_a_bound(config)
    yield from _is_measured(config)
    yield from _can_act(config)


def control_has_work(config: RunConfig) -> Iterator[Fault]:
    """Faults of the run as a whole: nothing to protect, or nothing to act with."""
    if config.continual.on_forgetting != "control":
        return
    if len(config.stages) == 1 and not config.anchors and not (config.stages[0].replay or {}):
        yield Fault(
            CONTROL,
            "='control' has nothing to protect: the one stage has no earlier domain, and there are no anchors; name "
            "what it must not forget in `anchors` or in its `replay`, or leave control out",
            related=("anchors",),
        )
    replays = any(stage.replay != {} for stage in config.stages[1:]) or bool(config.stages[0].replay)
    if not replays and config.continual.control.min_lr_factor == 1.0:
        yield Fault(
            "continual.control.min_lr_factor",
            f"=1 leaves the learning rate alone, and no stage has anything to replay: {CONTROL}='control' could only "
            f"stop; lower it, or name domains to replay",
            related=(CONTROL,),
        )


def _has_a_bound(config: RunConfig) -> Iterator[Fault]:
    bound = config.continual.max_forgetting
    if not bound:
        what = "is not set" if bound is None else "=0 leaves nothing to control: every measurement is above it"
        yield Fault(
            "continual.max_forgetting",
            f" {what}, and {CONTROL}='control' holds forgetting under it; set it in bits per byte, such as 0.1",
            related=(CONTROL,),
        )


def _is_measured(config: RunConfig) -> Iterator[Fault]:
    every, steps = config.evaluation.every_steps, config.training.steps
    if every is None:
        yield Fault(
            "evaluation.every_steps",
            f" is not set, and {CONTROL}='control' acts at the evaluations of a running stage; set it, such as "
            f"{max(2, steps // 20)} for twenty evaluations",
            related=(CONTROL,),
        )
    elif (steps - 1) // every < FEWEST_EVALUATIONS:
        yield Fault(
            "evaluation.every_steps",
            f"={every} gives {(steps - 1) // every} evaluations inside a stage of {steps} steps, and "
            f"{CONTROL}='control' needs at least {FEWEST_EVALUATIONS}; use at most "
            f"{max(1, (steps - 1) // FEWEST_EVALUATIONS)}, or a larger training.token_budget",
            related=(CONTROL, "training.token_budget", "training.global_batch_tokens"),
        )
    elif every * config.training.rows_per_step < 2:
        yield Fault(
            "evaluation.every_steps",
            f"={every} with steps of one row: a checkpoint is checked on the stage's first two rows, and "
            f"{CONTROL}='control' may change all but the first {every}; use at least 2",
            related=(CONTROL, "training.global_batch_tokens"),
        )


def _can_act(config: RunConfig) -> Iterator[Fault]:
    continual, control = config.continual, config.continual.control
    if continual.curriculum is not Curriculum.SEQUENTIAL:
        yield Fault(
            "continual.curriculum",
            f"={continual.curriculum.value!r} sets the weights of a stage by itself, and {CONTROL}='control' changes "
            f"them as forgetting asks for; use sequential, or another on_forgetting",
            related=(CONTROL,),
        )
    if continual.alpha is not None:
        yield Fault(
            "continual.alpha",
            f"={continual.alpha:g} weighs new and replayed text the same whatever the replay ratio is, so that the "
            f"ratio, which {CONTROL}='control' acts by, would change next to nothing; leave alpha out",
            related=(CONTROL,),
        )
    if continual.keep.kl:
        yield Fault(
            "continual.keep.kl",
            f"={continual.keep.kl:g} stores predictions of the rows that the plan will replay before the stage begins, "
            f"and {CONTROL}='control' changes which rows these are; drop one of the two",
            related=(CONTROL,),
        )
    if continual.replay_ratio > control.max_replay_ratio:
        yield Fault(
            "continual.control.max_replay_ratio",
            f"={control.max_replay_ratio:g} is below continual.replay_ratio={continual.replay_ratio:g}, which a stage "
            f"starts with; raise the one or lower the other",
            related=("continual.replay_ratio", CONTROL),
        )
