"""How much of a model a stage trains, and what holds it near its start: sections of `continual`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), through `peft`. Rank: `continual.lora_rank`."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Learn the size of each output's weights apart from their direction (Liu et al. 2024, arXiv:2402.09353)."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of an adapter's inputs dropped in training."""
    targets: list[str] | None = None
    """Names of the linear layers that get an adapter (`q_proj`); default: all of attention and feed-forward."""
    across_stages: Literal["carry", "new", "merge"] = "carry"
    """The adapter at a transition: `carry` it on, freeze it and start a `new` one beside it, or `merge` it."""


class Unfreeze(Section):
    """Opens more of an expanded model during a stage."""

    at: float = Field(gt=0.0, lt=1.0)
    """Share of the stage's steps after which it happens."""
    open: Literal["neighbours", "all"]
    """The blocks beside the new ones, or everything."""
    lr_factor: float = Field(0.1, gt=0.0, le=1.0)
    """Learning rate of what is opened here, as a share of the new blocks'."""


class ExpansionConfig(Section):
    """LLaMA-Pro block expansion (Wu et al. 2024, arXiv:2401.02415). Number of blocks: `continual.expand_blocks`."""

    positions: list[Annotated[int, Field(ge=0)]] | None = None
    """Blocks of the model, from 0, behind which a copy goes; default: spread evenly."""
    across_stages: Literal["carry", "stack"] = "carry"
    """A later stage trains the blocks there are (`carry`), or freezes them and inserts its own (`stack`)."""
    unfreeze: list[Unfreeze] = Field(default_factory=list)
    """What else is trained later in the stage; default: the new blocks alone to its end."""
    max_drift: float = Field(0.05, gt=0.0)
    """Most nats per token that one optimizer step may cost on old text, checked before the stage begins."""

    @model_validator(mode="after")
    def _ascending(self) -> ExpansionConfig:
        at = [step.at for step in self.unfreeze]
        if at != sorted(set(at)):
            raise ValueError(f"unfreeze: `at` must rise from step to step, not {at}")
        return self


class OsftConfig(Section):
    """Orthogonal-subspace fine-tuning (Nayak et al. 2025, arXiv:2504.07097)."""

    unfreeze_rank_ratio: float = Field(0.25, gt=0.0, le=1.0)
    """Share of each weight's singular directions, the least important ones, in which the update may lie."""
    targets: list[str] | None = None
    """Names of the linear layers; default: all of attention and feed-forward. Everything else is frozen."""


class KeepConfig(Section):
    """What holds a stage's weights or predictions near those it starts from; each may be combined with replay."""

    l2: float = Field(0.0, ge=0.0)
    """Pull towards the starting weights, per step: weights -= learning rate x l2 x (weights - start) (L2-SP)."""
    kl: float = Field(0.0, ge=0.0)
    """Weight of KL(model at the stage's start || model) on replayed rows, in nats per token."""
    kl_top_k: int = Field(32, ge=1, le=4096)
    """Log-probabilities stored per token for it; the rest of the vocabulary counts as one class."""
    interpolate: list[Annotated[float, Field(ge=0.0, le=1.0)]] = Field(default_factory=list)
    """WiSE-FT (Wortsman et al. 2021, arXiv:2109.01903): shares of the way from the starting to the trained weights;
    the one with the lowest loss on held-out text of old and new domains becomes the stage's result."""
