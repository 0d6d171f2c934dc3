"""The driver's side of being watched: what each stage of a run reports from, and what is asked between stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nexus_ray.config import RunConfig, stage_config
from nexus_ray.evaluate.hooks import START
from nexus_ray.evaluate.scores import DomainScore
from nexus_ray.models.flops import run_flops
from nexus_ray.steer import debts
from nexus_ray.storage import Storage
from nexus_ray.train.watch import Evaluated, Spent, Watch, Watcher, new_score, raise_answer


class Watching:
    """A run that is watched."""

    def __init__(self, config: RunConfig, watcher: Watcher, *, vocab_size: int) -> None:
        self._config, self._watcher = config, watcher
        self._operations = run_flops(config, vocab_size)

    def stage(
        self,
        config: RunConfig,
        index: int,
        *,
        scores: Sequence[Mapping[str, DomainScore]],
        run: Storage,
        folder: Storage,
    ) -> Watch:
        """How a stage is watched; `config` is its own, `scores` has a row for the base model and each stage before.

        The first stage begins with the base model, whose sample has been scored with it.
        """
        base = run.child("base")
        if index == 0 and base.exists(START) and not folder.exists(START):
            folder.write_bytes(base.read_bytes(START), START)
        return Watch(
            self._watcher,
            self._learned(index),
            debts(config, index, scores),
            self._spent(index),
            self._operations[index],
            start_known=index == 0 and folder.exists(START),
        )

    def evaluated(self, index: int, scores: Mapping[str, DomainScore], forgetting: Mapping[str, float]) -> Evaluated:
        """After a stage, on all held-out documents."""
        spent = self._spent(index + 1)
        bits = {name: score.bits_per_byte for name, score in scores.items()}
        new = new_score(bits, self._learned(index))
        return Evaluated(spent.steps, spent.tokens, new, max(forgetting.values(), default=0.0), spent.operations)

    def ask_after(self, index: int, scores: Mapping[str, DomainScore], forgetting: Mapping[str, float]) -> None:
        """Ask whether the run goes on after a stage that is not its last; raises Paused or Stopped."""
        stages = self._config.stages
        if index < len(stages) - 1:
            raise_answer(
                self._watcher(self.evaluated(index, scores, forgetting)), f"after stage {stages[index].name!r}"
            )

    def _learned(self, index: int) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for stage in self._config.stages[: index + 1] for name in stage.domains))

    def _spent(self, stages: int) -> Spent:
        """What the first so many stages take."""
        plans = [stage_config(self._config, index).training for index in range(stages)]
        tokens = [training.steps * training.global_batch_tokens for training in plans]
        cost = sum(count * each for count, each in zip(tokens, self._operations, strict=False))
        return Spent(sum(training.steps for training in plans), sum(tokens), cost)
