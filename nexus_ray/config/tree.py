"""The typed configuration tree: frozen, closed (unknown keys are errors), every unit in the name or the docstring.

Imports neither torch nor ray, so that a config can be checked on any machine. `nexus_ray.config.load` reads YAML
into this tree and reports all faults at once.
"""

from __future__ import annotations

import re
from enum import StrEnum
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nexus_ray.config.control import ControlConfig
from nexus_ray.config.domains import *  # noqa: F403
from nexus_ray.config.domains import DomainConfig
from nexus_ray.config.methods import ExpansionConfig, KeepConfig, LoraConfig, OsftConfig, Section
from nexus_ray.config.model import *  # noqa: F403
from nexus_ray.config.model import ModelConfig
from nexus_ray.config.synthesis import SynthesisConfig

Fraction01 = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]


# --- continual learning ----------------------------------------------------------------------------------------


class Curriculum(StrEnum):
    """Order in which domains are presented."""

    SEQUENTIAL = "sequential"
    """One stage's domains at a time."""
    INTERLEAVED = "interleaved"
    """All domains mixed in every stage."""
    PROGRESSIVE = "progressive"
    """Within a stage, weight moves gradually from the earlier domains to the new ones."""


class ContinualConfig(Section):
    """How new material is learned without losing the old."""

    replay_ratio: Fraction01 = 0.1
    """Replay tokens / all tokens of a stage, at a fixed token budget. Exact: never off by more than one sequence."""
    curriculum: Curriculum = Curriculum.SEQUENTIAL
    progressive_steps: int = Field(10, ge=2)
    """Into how many equal parts a stage is cut under the progressive curriculum."""
    alpha: Fraction01 | None = None
    """Weight of the new loss: L = alpha L_new + (1 - alpha) L_replay. Default: 1 - replay_ratio, the token mean."""
    warmup_on_new: bool = True
    """Raise the learning rate again at the start of every stage (re-warm). Off: stay at the final learning rate."""
    warmup_steps: int = Field(20, ge=0)
    """Optimizer steps from zero to the peak learning rate; clipped, with a warning, in a shorter stage."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Adam moments at the start of a later stage."""
    use_lora: bool = False
    """Train low-rank adapters beside the frozen weights."""
    lora_rank: int = Field(8, ge=1)
    """Rank of each adapter."""
    lora_alpha: float | None = Field(None, gt=0)
    """An adapter's update is scaled by alpha / rank; default: twice the rank."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    expand_blocks: int = Field(0, ge=0)
    """Insert so many copies of transformer blocks that start as the identity, and train only those."""
    expansion: ExpansionConfig = Field(default_factory=ExpansionConfig)
    use_osft: bool = False
    """Train only in directions orthogonal to what matters most in each weight."""
    osft: OsftConfig = Field(default_factory=OsftConfig)
    keep: KeepConfig = Field(default_factory=KeepConfig)
    max_forgetting: float | None = Field(None, ge=0.0)
    """Gate: most bits per byte that any earlier domain or anchor may lose in a stage, against its best score so far."""
    on_forgetting: Literal["warn", "stop", "retry", "control"] = "stop"
    """What the gate does: only warn, stop the roadmap, repeat the stage with more replay, or `control` the stage while
    it runs (and stop it only if the bound cannot be held; the gate at its end then warns)."""
    control: ControlConfig = Field(default_factory=ControlConfig)
    max_retries: int = Field(2, ge=1)
    """Repetitions of a stage by `on_forgetting: retry`; each doubles the replay ratio."""

    @model_validator(mode="after")
    def _weights(self) -> ContinualConfig:
        if self.alpha is not None and self.replay_ratio == 0.0 and self.alpha != 1.0:
            raise ValueError(f"alpha={self.alpha} weighs a replay loss, but replay_ratio is 0; leave alpha out")
        if self.alpha is not None and self.replay_ratio == 1.0 and self.alpha != 0.0:
            raise ValueError(f"alpha={self.alpha} weighs a new-domain loss, but replay_ratio is 1; leave alpha out")
        return self

    @property
    def method(self) -> Literal["full", "lora", "expand", "osft"]:
        """What a stage trains."""
        if self.use_lora:
            return "lora"
        return "expand" if self.expand_blocks else "osft" if self.use_osft else "full"


# --- training --------------------------------------------------------------------------------------------------


class ScheduleConfig(Section):
    """Learning rate over the steps of a stage, as factors of `training.learning_rate`."""

    kind: Literal["cosine", "wsd", "infinite", "constant"] = "cosine"
    min_factor: Fraction01 = 0.1
    """Final learning rate / peak; the whole stage's without re-warming."""
    decay_fraction: Fraction01 = 0.1
    """wsd, infinite: share of the steps in the final decay (the anneal)."""
    cooldown_fraction: Fraction01 = 0.6
    """infinite: share of the steps in the cooldown from the peak to the constant phase."""
    constant_factor: Fraction01 = 0.55
    """infinite: learning rate of the constant phase / peak."""

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        if self.kind == "infinite" and self.decay_fraction + self.cooldown_fraction > 1.0:
            raise ValueError(
                f"decay_fraction={self.decay_fraction} + cooldown_fraction={self.cooldown_fraction} exceed 1"
            )
        return self


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, ge=1)
    """Save after so many optimizer steps."""
    every_seconds: float | None = Field(300.0, gt=0)
    """Save after so many seconds since the last one."""
    keep: int = Field(2, ge=1)
    """Committed checkpoints kept per stage; older ones are deleted."""


class TrainingConfig(Section):
    token_budget: int = Field(1_000_000, ge=1)
    """Tokens of a stage, replay included; rounded down to whole global batches."""
    seq_len: int = Field(256, ge=8)
    """Tokens of a packed row."""
    global_batch_tokens: int = Field(8192, ge=1)
    """Tokens of one optimizer step over all workers; a multiple of seq_len."""
    micro_batch_size: int = Field(8, ge=1)
    """Rows of one forward pass of one worker."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's, on matrices only; norms and biases are not decayed."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    clip_norm: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16` keeps fp32 master weights. `auto`: bf16 on GPUs and on processors with AMX, fp32 elsewhere."""
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage. `auto`: 0 in fp32, 1 in bf16 (which needs at least 1)."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (GPUs, ZeRO >= 1)."""
    activation_checkpointing: bool = False
    compile: bool = False
    """`torch.compile` the model (compiles at first use)."""
    freeze: list[str] = Field(default_factory=list)
    """Regular expressions of parameter names that are not trained."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    max_restarts: int = Field(3, ge=0)
    """Worker deaths a stage survives by restarting from its last checkpoint."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.global_batch_tokens % self.seq_len:
            low = max(1, self.global_batch_tokens // self.seq_len) * self.seq_len
            raise ValueError(
                f"global_batch_tokens={self.global_batch_tokens} is not a multiple of seq_len={self.seq_len}; use {low}"
            )
        if self.token_budget < self.global_batch_tokens:
            raise ValueError(
                f"token_budget={self.token_budget} is less than one step of global_batch_tokens="
                f"{self.global_batch_tokens}; raise the budget or lower the batch"
            )
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision=bf16 needs zero_stage >= 1 (DeepSpeed 0.19.8 takes an optimizer step inside initialize "
                "at stage 0); set zero_stage: 1 or precision: fp32"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage >= 1; set zero_stage: 2 or drop offload_optimizer")
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"freeze: {pattern!r} is no regular expression: {error}") from None
        return self

    @property
    def rows_per_step(self) -> int:
        """Sequences in one global batch."""
        return self.global_batch_tokens // self.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of a stage."""
        return self.token_budget // self.global_batch_tokens


# --- evaluation, cluster, data, tracking, report -------------------------------------------------------------------


class EvaluationConfig(Section):
    max_tokens: int = Field(65_536, ge=64)
    """At most this many held-out tokens per domain (whole documents, the same ones every time)."""
    batch_size: int = Field(16, ge=1)
    """Rows of one evaluation forward pass of one worker."""
    every_steps: int | None = Field(None, ge=1)
    """Also score all domains, on `during_tokens`, after so many steps of a stage (curves of the report)."""
    during_tokens: int = Field(8_192, ge=64)
    """Held-out tokens per domain of an evaluation during a stage."""
    forward_transfer: bool = False
    """Also train a fresh model of the same budget on each new domain, which forward transfer is measured against."""
    bootstrap_samples: int = Field(1000, ge=100)
    """Resamples of the documents behind each confidence interval."""


class ClusterConfig(Section):
    num_workers: int = Field(1, ge=1)
    """Training processes."""
    use_gpu: bool = False
    """One GPU for each training process, or a share of one."""
    gpus_per_worker: float = Field(1.0, gt=0.0, le=1.0)
    """Of `use_gpu`: less than 1 lets several runs of a study share a GPU; the process is held to that share of its
    memory. Only with one worker: NCCL refuses two of one run on one GPU."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPU threads of one training process; default: this machine's cores divided by the workers, 4 beside a GPU."""
    address: str | None = None
    """Address of a running Ray cluster; default: $RAY_ADDRESS, else a local one is started."""
    worker_start_timeout_s: float = Field(120.0, gt=0)
    """How long the cluster may take to place the workers."""


class DataConfig(Section):
    on_corrupt: Literal["stop", "quarantine"] = "stop"
    """A corrupt shard stops the run, or is set aside and counted."""
    max_repetitions: float = Field(100.0, gt=0)
    """Most epochs over any source that a stage may ask for."""
    fraction: float = Field(1.0, gt=0.0, le=1.0)
    """Share of every domain's training rows that the run may read, a fair sample: those that the whole domain's first
    epoch begins with. A study cuts domains so, for a small budget to repeat its text as often as a large one would."""
    shard_tokens: int = Field(16_777_216, ge=1024)
    """Tokens of one token shard, about."""
    shuffle_window_rows: int = Field(8192, ge=1)
    """Rows inside which the second level of the permutation shuffles; at most 2,097,152 tokens (bounds memory)."""


class WandbConfig(Section):
    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "nexus-ray"
    entity: str | None = None


class TrackingConfig(Section):
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    tensorboard: bool = False
    """Also write event files to `<run>/tensorboard/`; `tensorboard --logdir runs` shows all runs side by side."""
    log_every_steps: int = Field(10, ge=1)
    """Progress lines where there is no terminal. `metrics.jsonl` always has every step."""


class ReportConfig(Section):
    prompts: dict[str, str] = Field(default_factory=dict)
    """One prompt per domain that the model continues after each stage; default: the start of a held-out document."""
    sample_tokens: int = Field(60, ge=0)
    """Tokens of each continuation; 0 writes none."""
    temperature: float = Field(0.7, ge=0)
    """0 continues greedily."""


# --- stages and the whole run -------------------------------------------------------------------------------------


class StageConfig(Section):
    """One step of the curriculum: new domains, one training run, one row of the score matrix."""

    name: Name
    kind: Literal["cpt", "dap", "sft"] = "cpt"
    """Continual or domain-adaptive pre-training on text, or fine-tuning on chat domains, which learns the answers
    alone. Replay may be of either format."""
    domains: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """New domains and their relative weights in tokens."""
    replay: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Replayed domains and relative weights; default: the domains of earlier stages, weighted by their tokens."""
    override: dict[str, Any] = Field(default_factory=dict)
    """Config values of this stage alone, by dotted path (`training.learning_rate: 3.0e-4`)."""


OVERRIDABLE = ("training.", "continual.", "evaluation.", "report.", "cluster.", "data.")
"""Sections a stage may override."""
FIXED_ACROSS_STAGES = (
    "training.seq_len",
    "training.global_batch_tokens",
    "cluster.address",
    "data.fraction",
    "data.shard_tokens",
)
"""Paths inside those sections that must be the same in all stages of a run."""


class RunConfig(Section):
    """One run: domains, stages, and how they are trained."""

    name: Name
    seed: int = Field(0, ge=0, lt=2**31)
    storage: str = "runs"
    """Folder or URI under which runs and shared artefacts are kept."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    domains: dict[Name, DomainConfig] = Field(min_length=1)
    anchors: list[str] = Field(default_factory=list)
    """Domains that are evaluated and never trained on."""
    stages: list[StageConfig] = Field(min_length=1)
    continual: ContinualConfig = Field(default_factory=ContinualConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
    synthesis: dict[Name, SynthesisConfig] = Field(default_factory=dict)
    """Jobs of `nexus-ray synthesize`, by the domain they write."""

    @property
    def evaluated_domains(self) -> tuple[str, ...]:
        """Every domain with a column in the score matrix: those of stages (in order), replayed ones, anchors."""
        names: dict[str, None] = {}
        for stage in self.stages:
            names.update(dict.fromkeys(stage.domains))
        for stage in self.stages:
            names.update(dict.fromkeys(stage.replay or {}))
        names.update(dict.fromkeys(self.anchors))
        return tuple(names)

    def earlier_domains(self, stage_index: int) -> tuple[str, ...]:
        """New domains of the stages before `stage_index`, in order."""
        names: dict[str, None] = {}
        for stage in self.stages[:stage_index]:
            names.update(dict.fromkeys(stage.domains))
        return tuple(names)


def exact_fraction(value: float) -> Fraction:
    """The decimal number that the user wrote, exactly: 0.1 is 1/10, not its binary neighbour."""
    return Fraction(repr(value))
