"""Proposals by Optuna (Akiba et al. 2019, arXiv:1907.10902), whose study is built anew from our record at every ask.

Multi-objective under a bound of forgetting: new-domain score up, forgetting down, cost down, and the bound a
constraint, as loose at a rung as it is to the judge. A weighted objective is one number, the judge's own. No pickle
and no database: each point of the history becomes a trial of an in-memory study, and the sampler is seeded by (seed,
number of points), so that a proposal is a function of the history. Under early stopping points are compared at one
rung, the highest that enough points have reached (as BOHB does, Falkner et al. 2018, arXiv:1807.01774): scores of
different budgets do not mix.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_ray.config.study import Knob, NewUnderForgetting, OptunaSearch, Weighted
from nexus_ray.errors import ConfigError
from nexus_ray.study.judge import forgetting_bound, weighted
from nexus_ray.study.records import Objectives, Point, Value, canonical
from nexus_ray.study.search import Proposal, Seen, first_new, points_at_most
from nexus_ray.study.space import DIGITS, Space

RETRIES = 16
"""Further asks after a proposal that repeats a point; then a random one is taken."""
DIRECTIONS = ("maximize", "minimize", "minimize")
"""Of new-domain score, forgetting and cost."""


@dataclass(frozen=True)
class Optuna:
    """Optuna's samplers over our space and record."""

    space: Space
    search: OptunaSearch
    objective: NewUnderForgetting | Weighted

    def total(self, history: Sequence[Seen]) -> int:
        return points_at_most(self.space, self.search.trials, history)

    def ask(self, history: Sequence[Seen]) -> Proposal | None:
        if len(history) >= self.total(history):
            return None
        optuna = _imported()
        known = {seen.point.id for seen in history}
        directions = DIRECTIONS[:1] if self.objective.kind == "weighted" else DIRECTIONS
        for attempt in range(RETRIES):
            study = optuna.create_study(
                directions=directions, sampler=self._sampler(optuna, len(history), attempt), study_name="study"
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a widened list of choices is an old distribution to Optuna
                study.add_trials([trial for trial in self._trials(optuna, history) if trial is not None])
                trial = study.ask()
                point = self._suggest(trial)
            if point.id not in known:
                frozen = study.get_trials(deepcopy=False)[trial.number]
                return Proposal(point, len(history), _plain(frozen.system_attrs))
        return first_new(self.space, self.search.seed, self._spare_index(history), history)

    def _spare_index(self, history: Sequence[Seen]) -> int:
        return 1 + max((seen.index for seen in history), default=-1)

    def _sampler(self, optuna: Any, count: int, attempt: int) -> Any:
        text = f"{self.search.seed}\x1f{count}\x1f{attempt}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
        if self.search.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=self.search.population, seed=seed)
        return optuna.samplers.TPESampler(n_startup_trials=self.search.startup, seed=seed, constant_liar=True)

    # --- from our record to Optuna's -------------------------------------------------------------------------------

    def level(self, history: Sequence[Seen]) -> int:
        """The rung at which points are compared: the highest that as many have reached as are to start with."""
        depth = max((len(seen.levels) for seen in history), default=0)
        for level in reversed(range(depth)):
            reached = sum(len(seen.levels) > level and seen.levels[level] is not None for seen in history)
            if reached >= self.search.startup or level == 0:
                return level
        return 0

    def _trials(self, optuna: Any, history: Sequence[Seen]) -> list[Any]:
        level = self.level(history)
        return [self._trial(optuna, seen, level) for seen in history]

    def _trial(self, optuna: Any, seen: Seen, level: int) -> Any:
        names = [name for name in self.space.knobs if name in seen.point.params]
        arguments: dict[str, Any] = {
            "params": {name: _inner(self.space.knobs[name], seen.point.params[name]) for name in names},
            "distributions": {name: self._distribution(optuna, name) for name in names},
            "system_attrs": dict(seen.note),
        }
        if not self.space.contains(seen.point):
            return None  # proposed from a space that was wider in another way
        scores = seen.levels[level] if len(seen.levels) > level else None
        states = optuna.trial.TrialState
        if scores is not None:
            values = [scores.new, scores.forgetting, scores.cost]
            if self.objective.kind == "weighted":
                values = [weighted(self.objective.weights, scores)]
            constraints = self._constraints(scores, at_rung=level < len(seen.levels) - 1)
            return optuna.create_trial(state=states.COMPLETE, values=values, constraints=constraints, **arguments)
        return optuna.create_trial(state=states.FAIL if seen.ended else states.RUNNING, **arguments)

    def _constraints(self, scores: Objectives, *, at_rung: bool) -> dict[str, float] | None:
        bound = forgetting_bound(self.objective, at_rung=at_rung)
        return None if bound is None else {"forgetting": scores.forgetting - bound}

    def _distribution(self, optuna: Any, name: str) -> Any:
        knob, kinds = self.space.knobs[name], optuna.distributions
        if (listed := self._listed(name)) is not None:
            return kinds.CategoricalDistribution([canonical(value) for value in listed])
        low, high = knob.range
        log = "log" in knob.kind
        if knob.kind.startswith("int"):
            return kinds.IntDistribution(int(low), int(high), log=log)
        return kinds.FloatDistribution(low, high, log=log)

    def _listed(self, name: str) -> list[Value] | None:
        knob = self.space.knobs[name]
        return None if knob.kind.endswith("uniform") else self.space.values(name)

    def _suggest(self, trial: Any) -> Point:
        params: dict[str, Value] = {}
        for name, knob in self.space.knobs.items():
            if not self.space.holds(name, params):
                continue
            if (listed := self._listed(name)) is not None:
                by_text = {canonical(value): value for value in listed}
                params[name] = by_text[trial.suggest_categorical(name, list(by_text))]
                continue
            low, high = knob.range
            log = "log" in knob.kind
            if knob.kind.startswith("int"):
                params[name] = trial.suggest_int(name, int(low), int(high), log=log)
            else:
                drawn = trial.suggest_float(name, low, high, log=log)
                params[name] = min(max(float(f"{drawn:.{DIGITS}g}"), low), high)
        return Point(params)


def _inner(knob: Knob, value: Value) -> Any:
    """A value as Optuna keeps it: text for what is listed, so that lists and booleans are told apart."""
    return value if knob.kind.endswith("uniform") else canonical(value)


def _plain(note: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in note.items() if isinstance(value, str | int | float | bool | None)}


def _imported() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "search.kind=optuna needs the package optuna; `pip install 'optuna>=5'`, or use kind: random"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
