"""What the YAML file of a study says: a base run, the knobs to search, how to search and how to judge.

    name: knobs                                   # trials are called knobs-POINT-sSEED
    base: run.yaml                                # beside the study file
    common: {training.token_budget: 1024000}
    space:
      continual.replay_ratio: {choice: [0.0, 0.05, 0.1]}
      method: {options: {full: {}, lora: {continual.use_lora: true}, expand: {continual.expand_blocks: 2}}}
      continual.lora_rank: {choice: [4, 16], when: {method: lora}}
      continual.warmup_steps: {int_log_uniform: [1, 100], levels: 3}
    search: {kind: grid}
    seeds: [0, 1, 2]

Rules that need the base run (does a path exist, does the run accept a value) are those of `nexus_ray.study.load`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from nexus_ray.config.methods import Section
from nexus_ray.config.tree import Name, exact_fraction

RANGES = ("uniform", "log_uniform", "int_uniform", "int_log_uniform")
KINDS = ("choice", *RANGES, "options", "stages_order")
"""What a knob can be; each gives exactly one."""
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Signal = Literal["grad_norm", "loss"]
"""What a trial reports besides its scores: norm of the gradient before clipping, and training loss in nats per token,
of the step before the evaluation."""


def _finite(value: Any) -> Any:
    """Plain data as it is. Raises ValueError for nan and infinity, of which no id of a point can be made."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(inner)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{value} is no finite number, and so nothing that can be compared; write a number, or drop it"
        )
    return value


Plain = Annotated[Any, AfterValidator(_finite)]
"""A value of a run's config, which the run itself checks, or a condition on one."""


class Knob(Section):
    """One thing that is searched: values of a config path, named groups of settings, or the order of the stages."""

    path: str | None = None
    """Config path that the value goes to; default: the knob's own name. Two knobs may share a path if their conditions
    exclude each other, such as a learning rate for each method."""
    choice: list[Plain] | None = Field(None, min_length=1)
    """Values, all alike."""
    uniform: tuple[float, float] | None = None
    """Lowest and highest number."""
    log_uniform: tuple[float, float] | None = None
    """Lowest and highest number, uniform in the logarithm."""
    int_uniform: tuple[int, int] | None = None
    """Lowest and highest whole number, both included."""
    int_log_uniform: tuple[int, int] | None = None
    """The same, uniform in the logarithm."""
    options: dict[Name, dict[str, Plain]] | None = Field(None, min_length=1)
    """Groups of settings (config values by dotted path) by name; a point has one of the names."""
    stages_order: Literal["permutations"] | list[list[str]] | None = None
    """Orders of the stages: all of them, or these lists of all stage names. A point has `first>second>third`."""
    levels: int | None = Field(None, ge=2)
    """Values that a grid takes of a range, its ends included and evenly spread (in the logarithm of a log range)."""
    when: dict[str, Plain] = Field(default_factory=dict)
    """Conditions on other knobs, all of which must hold; otherwise this knob is absent, and the base run's value stays.
    A value, a list of values, or `{above: x}` / `{below: x}` for numbers. A condition on an absent knob fails."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = " and ".join(kinds) if kinds else "none of them"
            raise ValueError(f"a knob is one of {', '.join(KINDS)}, and this has {found}; give exactly one")
        if self.kind in RANGES:
            low, high = self.range
            if low >= high:
                raise ValueError(f"{self.kind}=[{low}, {high}] must rise; swap the ends, or set the value in `common`")
            if "log" in self.kind and low <= 0:
                raise ValueError(f"{self.kind}=[{low}, {high}] has no logarithm at its low end; start above 0")
        elif self.levels is not None:
            raise ValueError(f"levels={self.levels} is for ranges ({', '.join(RANGES)}), not for {self.kind}; drop it")
        if self.kind in ("options", "stages_order") and self.path is not None:
            raise ValueError(f"path={self.path!r} is for single values, not for {self.kind}; drop it")
        for name, condition in self.when.items():
            _check_condition(name, condition)
        return self

    @property
    def kind(self) -> str:
        """Which of KINDS."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def range(self) -> tuple[float, float]:
        """Ends of a range."""
        low, high = getattr(self, self.kind)
        return low, high


def _check_condition(name: str, condition: Any) -> None:
    if isinstance(condition, dict):
        bounds = set(condition)
        numbers = all(isinstance(b, int | float) and not isinstance(b, bool) for b in condition.values())
        if not bounds or bounds - {"above", "below"} or not numbers:
            raise ValueError(
                f"when.{name}={condition}: a condition is a value, a list of values, or {{above: x}} / {{below: x}}"
            )
    if condition == []:
        raise ValueError(f"when.{name}=[] never holds; name the values with which this knob makes sense")


# --- search --------------------------------------------------------------------------------------------------------


class GridSearch(Section):
    """Every combination, in a fixed order (the last knob of the file changes fastest)."""

    kind: Literal["grid"]


class RandomSearch(Section):
    """Independent points. Point i depends on the seed and i alone, so more trials never change the first ones."""

    kind: Literal["random"]
    trials: int = Field(ge=1, le=100_000)
    """Points; each is run once per seed of `seeds`."""
    seed: int = Field(0, ge=0)


class OptunaSearch(Section):
    """Points proposed by Optuna from what earlier ones scored: towards the front of new-domain score, forgetting and
    cost within the bound, or towards the best weighted sum, as the objective says."""

    kind: Literal["optuna"]
    trials: int = Field(ge=1, le=10_000)
    """Points; each is run once per seed of `seeds`."""
    seed: int = Field(0, ge=0)
    sampler: Literal["tpe", "nsga2"] = "tpe"
    """Tree-structured Parzen estimator (few trials), or the genetic algorithm NSGA-II (hundreds)."""
    startup: int = Field(10, ge=1)
    """Random points before the first proposal that learns (tpe)."""
    population: int = Field(16, ge=2)
    """Points of a generation (nsga2)."""


Search = Annotated[GridSearch | RandomSearch | OptunaSearch, Field(discriminator="kind")]

# --- objective -----------------------------------------------------------------------------------------------------


class NewUnderForgetting(Section):
    """The best new-domain score among the trials that keep within a bound of forgetting."""

    kind: Literal["new_under_forgetting"]
    max_forgetting: float = Field(ge=0.0)
    """Most bits per byte that an earlier domain or anchor may lose. Points beyond it rank below all within it, by how
    much they forget."""
    rung_slack: float = Field(0.15, ge=0.0)
    """How much looser the bound is at a rung, as a share of itself: forgetting heals as the learning rate falls (from
    a fifth of the budget to its end by 12 % at 5 % replay, by a third at 25 %: configs/experiments/replay)."""


class Weights(Section):
    """What one unit of each is worth."""

    new: float = Field(1.0, ge=0.0)
    """Per bit per byte gained on the new domains."""
    forgetting: float = Field(1.0, ge=0.0)
    """Per bit per byte lost on earlier ones."""
    cost: float = Field(0.0, ge=0.0)
    """Per 1e15 training operations."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.new or self.forgetting or self.cost):
            raise ValueError("all weights are 0, so that no trial is better than another; set one above 0")
        return self


class Weighted(Section):
    """new x score - forgetting x loss - cost x operations."""

    kind: Literal["weighted"]
    weights: Weights = Weights()


ObjectiveConfig = Annotated[NewUnderForgetting | Weighted, Field(discriminator="kind")]

# --- early stopping ------------------------------------------------------------------------------------------------


class NoStopping(Section):
    """Every trial runs to its full budget."""

    rule: Literal["none"]


class _Stopping(Section):
    max_signal: dict[Signal, float] = Field(default_factory=dict)
    """Highest value of an early signal at any evaluation; a point with more is stopped at once."""


class MedianStopping(_Stopping):
    """A point stops at a rung where more than half of those that reached it before, those that were stopped since among
    them, are better (Golovin et al. 2017)."""

    rule: Literal["median"]
    rungs: list[Share] = Field([0.25, 0.5], min_length=1)
    """Shares of the full token budget at which trials are judged."""
    grace: int = Field(4, ge=1)
    """Points that must have reached a rung before one is stopped there."""


class AshaStopping(_Stopping):
    """Successive halving (Li et al. 2020, arXiv:1810.05934) by promotion: a trial pauses at a rung, its checkpoint
    kept, and goes on once it is among the best 1 / eta there."""

    rule: Literal["asha"]
    eta: int = Field(3, ge=2)
    """One of so many goes on."""
    rungs: list[Share] | None = Field(None, min_length=1)
    """Shares of the full token budget at which trials are judged; default: those of `min_share`."""
    min_share: Share | None = None
    """The first rung, the others eta times as far each; default: 1 / eta squared."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.rungs is not None and self.min_share is not None:
            raise ValueError("rungs and min_share both say where the rungs are; drop one")
        return self


Stopping = Annotated[NoStopping | MedianStopping | AshaStopping, Field(discriminator="rule")]


def rung_shares(stopping: NoStopping | MedianStopping | AshaStopping) -> tuple[Fraction, ...]:
    """Shares of the full budget at which trials are judged, rising; none without a rule."""
    if stopping.rule == "none":
        return ()
    if stopping.rungs is not None:
        return tuple(exact_fraction(share) for share in stopping.rungs)
    first = Fraction(1, stopping.eta**2) if stopping.min_share is None else exact_fraction(stopping.min_share)
    shares = [first]
    while shares[-1] * stopping.eta < 1:
        shares.append(shares[-1] * stopping.eta)
    return tuple(shares)


class StudyConfig(Section):
    """A study: the same run many times, with other settings."""

    name: Annotated[Name, Field(max_length=40)]
    """Trials are runs of the name `NAME-POINT-sSEED`; the record lies in `<storage>/NAME-study`."""
    base: str
    """Config file of a run, relative to the study file."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Config values of all trials, by dotted path."""
    space: dict[str, Knob] = Field(min_length=1)
    """Knobs by config path, or by any name where the knob says itself what it sets."""
    search: Search = GridSearch(kind="grid")
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(default=[0], min_length=1)
    """Replicates: every point is run with each of these seeds and judged by their mean."""
    objective: ObjectiveConfig = Weighted(kind="weighted")
    stopping: Stopping = NoStopping(rule="none")
    max_concurrent: int | None = Field(None, ge=1)
    """Most trials at once; default: as many as the cluster holds."""
    simulated_epoching: bool = True
    """Cut every domain to the share of its rows that a trial's budget is of the full one (`data.fraction`), so that
    the trial repeats its text as often as the full run would, and small budgets rank like large ones."""
    full_tokens: int | None = Field(None, ge=1)
    """Tokens of all stages of the run that the study stands for; default: those of the base run."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} names a seed twice; drop one")
        shares = rung_shares(self.stopping)
        if list(shares) != sorted(set(shares)):
            raise ValueError(f"stopping.rungs={[float(share) for share in shares]} must rise from rung to rung")
        return self
