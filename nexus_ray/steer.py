"""The driver's side of control: a stage is trained until its controller wants another plan, which is then appended,
and goes on from its checkpoint.

What the workers have logged in `control.jsonl` counts, whoever dies when: an action that is logged and not yet in the
plan is appended before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nexus_ray.config import RunConfig
from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.errors import ForgettingError
from nexus_ray.evaluate.scores import DomainScore
from nexus_ray.evaluate.transfer import earlier_domains
from nexus_ray.stream.curriculum import replay_weights, stage_segments
from nexus_ray.stream.plan_file import PlanFile
from nexus_ray.train.control import Action, Controller, area_left
from nexus_ray.train.governor import Control, logged, pending, settings_in
from nexus_ray.train.loop import StageJob
from nexus_ray.train.schedule import stage_factors


def debts(config: RunConfig, index: int, scores: Sequence[Mapping[str, DomainScore]]) -> dict[str, float]:
    """What a stage must protect, and the bits per byte that each domain is behind its best score when it begins.

    `scores` has a row for the base model and one for each stage before.
    """
    trained = [list(stage.domains) for stage in config.stages]
    earlier = earlier_domains(config.evaluated_domains, trained, index + 1, config.anchors)
    names = dict.fromkeys([*earlier, *config.anchors])
    return {name: scores[-1][name].bits_per_byte - min(row[name].bits_per_byte for row in scores) for name in names}


@dataclass(frozen=True)
class Steering:
    """How one attempt at a stage is planned and, where its config says so, controlled."""

    config: RunConfig
    """The stage's own."""
    index: int
    attempt: int
    manifests: Mapping[str, TokenManifest]
    plan: PlanFile
    control: Control | None
    say: Callable[[str], None]

    @classmethod
    def of(
        cls,
        config: RunConfig,
        index: int,
        attempt: int,
        *,
        manifests: Mapping[str, TokenManifest],
        plan: PlanFile,
        scores: Sequence[Mapping[str, DomainScore]],
        say: Callable[[str], None],
    ) -> Steering:
        """Raises ConfigError if the highest replay ratio that control may ask for repeats a source too often."""
        control = None
        continual, protected = config.continual, debts(config, index, scores)
        if continual.on_forgetting == "control" and continual.max_forgetting is not None and protected:
            tokens = {name: manifest.tokens for name, manifest in manifests.items()}
            most = continual.model_copy(update={"replay_ratio": continual.control.max_replay_ratio})
            stage_segments(config.model_copy(update={"continual": most}), index, manifests, start_row=0)
            controller = Controller(
                bound=continual.max_forgetting,
                config=continual.control,
                start_ratio=continual.replay_ratio,
                can_replay=bool(replay_weights(config, index, tokens)),
                left=area_left(stage_factors(config, index)),
            )
            control = Control(controller, protected)
        return cls(config, index, attempt, manifests, plan, control, say)

    def train(self, job: StageJob, fit: Callable[[StageJob], dict[str, Any]]) -> dict[str, Any]:
        """Fit the stage to its end, through every change of its plan; returns the last fit's result.

        Raises ForgettingError if the controller could not hold the bound.
        """
        seconds = 0.0
        while True:
            stream = self.plan.stream(self.config, self.index, self.attempt, self.manifests)
            action = self._waiting(job)
            if action is not None:
                self._act(action, job.stage)
                continue
            result = fit(replace(job, stream=stream, control=self.control))
            seconds += result["train_seconds"]
            if not result.get("replanned"):
                return {**result, "train_seconds": round(seconds, 2)}
            assert self._waiting(job) is not None, "a fit ended to be planned anew, and nothing is logged"

    def _waiting(self, job: StageJob) -> Action | None:
        if self.control is None:
            return None
        stream = self.plan.stream(self.config, self.index, self.attempt, self.manifests)
        return pending(logged(job.run, self.index, self.attempt), settings_in(stream, self.index, self.attempt))

    def _act(self, action: Action, stage: str) -> None:
        if action.kind == "stop":
            continual = self.config.continual
            raise ForgettingError(
                f"continual.max_forgetting={continual.max_forgetting:g} cannot be held in stage {stage!r}: after step "
                f"{action.step}, {action.reason}. Raise continual.control.max_replay_ratio, lower "
                f"training.learning_rate or continual.control.min_lr_factor, allow more forgetting, or set "
                f"continual.on_forgetting: warn, under another name"
            )
        self.say(
            f"stage {stage}, step {action.step}: {action.reason}; replay {action.replay_ratio:.1%}, learning rate x "
            f"{action.lr_factor:g}"
        )
        self.plan.change(
            self.config,
            self.index,
            self.attempt,
            self.manifests,
            step=action.step,
            replay_ratio=action.replay_ratio,
            lr_factor=action.lr_factor,
        )
