"""`synthesis.<domain>`: a job that writes a domain's text with a generator, filters it and checks it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nexus_ray.config.filters import FiltersConfig
from nexus_ray.config.generators import BudgetConfig, Generator
from nexus_ray.config.methods import Section
from nexus_ray.config.validators import ValidatorsConfig


class SamplingConfig(Section):
    """How answers are drawn."""

    max_tokens: int = Field(512, ge=1)
    """Tokens of an answer at most."""
    temperature: float = Field(0.8, ge=0.0, le=5.0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    """Tokens are drawn from the likeliest ones that together have this probability."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Texts that end an answer; they are not part of it."""


class SynthesisConfig(ValidatorsConfig):
    """One job. Its ledger lies in `<storage>/<name>/synthesis/<domain>/`; `source: {kind: synthesis}` reads it."""

    generator: Generator
    recipe: str = Field(min_length=1)
    """File with templates, parameters and documents of the prompts (`configs/prompts/*.yaml`)."""
    prompts: int | None = Field(None, ge=1)
    """Prompts of the plan, in place of the recipe's own number. Raise it to go on: nothing is asked twice."""
    num_candidates: int = Field(1, ge=1, le=1000)
    """Times that each prompt is asked."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    filters: FiltersConfig = Field(default_factory=FiltersConfig)
    judge: Generator | None = None
    """The model that `validators: [{kind: judge}]` asks."""
    judge_threads: int = Field(8, ge=1, le=256)
    """Answers that a worker filters and validates at once; more than one only helps validators that wait."""
    anchor: str | None = None
    """Domain of real text that diversity, and quantiles of likelihood, are measured against."""
    unseen: list[str] | None = None
    """Domains whose held-out text must not occur in rows; default: all that the run evaluates, but this one."""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    target: int | None = Field(None, ge=1)
    """Stop once so many rows are accepted, or a little later: at the end of a shard. Raise it to go on."""
    against: list[str] = Field(default_factory=list)
    """Folders of earlier ledgers: rows must differ from what they have accepted, too."""
    borrow: list[str] = Field(default_factory=list)
    """Folders of other ledgers whose answers to the same requests are taken over, not paid again."""
    shard_requests: int = Field(256, ge=1)
    """Requests of a shard, the unit of work and of commits; behind the first 100 shards up to 16 times as many."""
    attempts: int = Field(3, ge=1)
    """Failures that may pass by themselves before a request is given up."""
    workers: int = Field(1, ge=1)
    """Processes that ask and judge. Several local models, or more filtering."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU threads of one process."""
    gpus_per_worker: float = Field(0.0, ge=0.0)
    """GPUs of one process (local models)."""

    @property
    def worker_gpus(self) -> float:
        """GPUs of one process: those of the server that it starts, if it does."""
        return self.gpus_per_worker or float(getattr(self.generator, "gpus", 0))
