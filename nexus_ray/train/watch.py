"""Somebody who follows a run from outside: told of every evaluation, and answering whether it goes on.

What is reported of an evaluation is a function of the run's config and weights alone: a run that repeats a step after a
restart reports the same. Imports neither Ray nor PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nexus_ray.errors import Paused, Stopped

Answer = Literal["continue", "pause", "stop"]
"""Go on; or save a checkpoint and end, to be resumed perhaps, or for good."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of a run."""

    step: int
    """Optimizer steps done, over all stages."""
    tokens: int
    """Tokens trained on, over all stages, replay included."""
    new: float
    """Mean negated bits per byte of the domains learned so far; higher is better."""
    forgetting: float
    """Largest loss of an earlier domain or anchor, in bits per byte since its best score; 0 if there is none."""
    cost: float
    """Training operations (FLOPs) spent so far."""
    signals: Mapping[str, float] = field(default_factory=dict)
    """Early signals, see `nexus_ray.config.study.Signal`."""


Watcher = Callable[[Evaluated], Answer]
"""Called in one process of a run, wherever that is, while the others wait; picklable."""


@dataclass(frozen=True)
class Spent:
    """What the stages before a stage took."""

    steps: int = 0
    tokens: int = 0
    operations: float = 0.0


@dataclass(frozen=True)
class Watch:
    """How a stage is watched."""

    watcher: Watcher
    learned: tuple[str, ...]
    """Domains whose score counts as new: those that this stage and the ones before train on for their own sake."""
    debts: Mapping[str, float]
    """The protected domains, and the bits per byte that each had lost already when the stage began."""
    before: Spent
    operations_per_token: float
    start_known: bool
    """Whether the sample's scores of the stage's first model lie in its folder already."""

    def evaluated(
        self,
        step: int,
        tokens: int,
        *,
        bits: Mapping[str, float],
        lost: Mapping[str, float],
        signals: Mapping[str, float],
    ) -> Evaluated:
        """The evaluation after `step` steps and `tokens` tokens of the stage. `bits`: bits per byte by domain; `lost`:
        what each protected domain lost since the stage began."""
        return Evaluated(
            self.before.steps + step,
            self.before.tokens + tokens,
            new_score(bits, self.learned),
            max((debt + lost[name] for name, debt in self.debts.items()), default=0.0),
            self.before.operations + self.operations_per_token * tokens,
            dict(signals),
        )


def new_score(bits: Mapping[str, float], learned: Sequence[str]) -> float:
    """Mean negated bits per byte of the learned domains."""
    return -sum(bits[name] for name in learned) / len(learned)


def raise_answer(answer: Answer, where: str) -> None:
    """Raises Paused or Stopped as answered; `where` says after what."""
    if answer == "pause":
        raise Paused(f"paused {where}, with a checkpoint, until its study resumes it")
    if answer == "stop":
        raise Stopped(f"stopped {where} by its study, with a checkpoint")
