"""What the controller of a running stage may do: the section `continual.control`."""

from __future__ import annotations

from pydantic import Field, model_validator

from nexus_ray.config.methods import Section


class ControlConfig(Section):
    """Holds forgetting under `continual.max_forgetting` while a stage runs (`continual.on_forgetting: control`).

    At every evaluation of the stage it may raise the replay ratio or, once that is at its limit, lower the learning
    rate; where there is room it takes both back. A stage starts with `continual.replay_ratio`.
    """

    min_replay_ratio: float = Field(0.01, ge=0.0, le=1.0)
    """Lowest replay ratio it goes down to (or `continual.replay_ratio`, where that is lower)."""
    max_replay_ratio: float = Field(0.5, gt=0.0, lt=1.0)
    """Highest replay ratio it may ask for."""
    min_lr_factor: float = Field(0.1, gt=0.0, le=1.0)
    """Lowest factor on the learning rate, on top of the schedule; 1 leaves the learning rate alone."""
    slack: float = Field(0.5, ge=0.0, le=1.0)
    """How far above the bound, as a share of it, forgetting may lie while the stage is young: what it loses at a high
    learning rate heals in part while that decays. Shrinks to 0 with what is left of the sum of learning rates."""
    room: float = Field(0.75, gt=0.0, lt=1.0)
    """Below this share of what is allowed there is room: less replay, or the learning rate back up (hysteresis)."""
    settle_evaluations: int = Field(1, ge=0)
    """Evaluations after an action that only watch what came of it."""
    margin: float = Field(1.0, ge=0.0)
    """Standard errors of the measured forgetting, over the documents of its sample, that are added to it."""

    @model_validator(mode="after")
    def _ordered(self) -> ControlConfig:
        if self.min_replay_ratio >= self.max_replay_ratio:
            raise ValueError(
                f"min_replay_ratio={self.min_replay_ratio:g} is not below max_replay_ratio={self.max_replay_ratio:g}; "
                f"leave room between them"
            )
        return self
