"""Reads a study file and checks it against its base run: every fault by path, with a way out, before anything starts.

Invariant: of a study that loads, each point checked here is a run that loads: all of a small grid, the samples of a
small random search, else every listed value and both ends of every range at least once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

from pydantic import ValidationError

from nexus_ray.config import Hardware, RunConfig, detect_hardware, fingerprint, parse_config, resolve, stage_config
from nexus_ray.config.domains import SynthesisSource
from nexus_ray.config.faults import Fault, report
from nexus_ray.config.source import Data, apply_overrides, override_texts, read_yaml
from nexus_ray.config.study import StudyConfig, rung_shares
from nexus_ray.config.tree import exact_fraction
from nexus_ray.corpora.sources.synthesis import Pin, pinned
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage
from nexus_ray.study.faults import base_faults, file_faults, space_faults
from nexus_ray.study.records import Point, Trial
from nexus_ray.study.search import points_at_most
from nexus_ray.study.space import Space

MOST_CHECKED = 400
"""Points whose configs are built before a study starts, about 3 ms each."""


@dataclass(frozen=True)
class Study:
    """A study that fits its base run."""

    config: StudyConfig
    space: Space
    base: Data
    """Plain data of the base run with `common` in place."""
    hardware: Hardware
    base_fingerprint: str
    """Of the base run with seed 0; a study does not go on with another."""
    base_tokens: int
    """Tokens of all stages of the base run."""
    pins: Mapping[str, Pin] = field(default_factory=dict)
    """By ledger: how much of it all trials read (`nexus_ray.study.log.held`)."""

    @property
    def folder(self) -> Storage:
        """Where the record of the study lies."""
        return Storage(self.config_of(None, self.config.seeds[0]).storage).child(f"{self.config.name}-study")

    def config_of(self, point: Point | None, seed: int) -> RunConfig:
        """The resolved run of a point (None: of the base) with a seed. Raises ConfigError if a value is refused."""
        name = f"{self.config.name}-{Trial(point, seed).id if point else 'base'}"
        data = self.space.apply(self.base, point) if point else self.base
        config = parse_config(data, [f"name={name}", f"seed={seed}"], where=f"space ({shown(point)})")
        share = self._share(config)
        if share < 1:
            whole = exact_fraction(config.data.fraction)
            data_config = config.data.model_copy(update={"fraction": float(whole * share)})
            config = config.model_copy(update={"data": data_config})
        return pinned(resolve(config, self.hardware), lambda _, source: self.pins.get(source.ledger or ""))

    def _share(self, config: RunConfig) -> Fraction:
        """What share of the full run's tokens a trial reads, and so of its rows, under simulated epoching."""
        if not self.config.simulated_epoching:
            return Fraction(1)
        return min(Fraction(1), Fraction(run_tokens(config), self.config.full_tokens or self.base_tokens))

    def refusal(self, point: Point) -> str | None:
        """Why the run refuses a point's values, in one line; None if it takes them. Inside a range there may be such
        points although its ends are sound (a length that does not divide a batch, say)."""
        try:
            self.config_of(point, self.config.seeds[0])
        except ConfigError as error:
            return " ".join(str(error).split())
        return None

    def budget(self, point: Point) -> int:
        """Tokens of a point's trials; those of the base run for a point that the run refuses, which spends none."""
        try:
            return run_tokens(self.config_of(point, self.config.seeds[0]))
        except ConfigError:
            return self.base_tokens


def load_study(path: Path, overrides: Sequence[str] = (), *, hardware: Hardware | None = None) -> Study:
    """The study in a YAML file, its base run beside it; `overrides` (`path=value`) apply to all its trials.

    Raises ConfigError listing every fault by path.
    """
    data = read_yaml(path)
    try:
        config = StudyConfig.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(report(file_faults(error, data), where=str(path))) from None
    base = read_yaml(path.parent / config.base)
    if faults := list(space_faults(config, overrides)):
        raise ConfigError(report(faults, where=str(path)))
    base = apply_overrides(apply_overrides(base, list(override_texts(config.common))), overrides)
    hardware = hardware or detect_hardware()
    plain = parse_config(base, ["seed=0"], where=f"{path}, its base run {config.base} with `common`")
    if faults := list(base_faults(config, base)):
        raise ConfigError(report(faults, where=str(path)))
    base = _with_own_ledgers(base, plain)
    space = Space.of(config.space, [stage.name for stage in plain.stages])
    study = Study(config, space, base, hardware, fingerprint(resolve(plain, hardware)), run_tokens(plain))
    if faults := [*_size_faults(study), *_point_faults(study)]:
        raise ConfigError(report(faults, where=str(path)))
    return study


def _with_own_ledgers(base: Data, plain: RunConfig) -> Data:
    """The base run with its own ledgers named, since its trials have other names."""
    own = {
        f"domains.{name}.source.ledger": f"{plain.storage}/{plain.name}/synthesis/{name}"
        for name, domain in plain.domains.items()
        if isinstance(domain.source, SynthesisSource) and domain.source.ledger is None
    }
    return apply_overrides(base, list(override_texts(own)))


def run_tokens(config: RunConfig) -> int:
    """Tokens that a run trains on, all stages together."""
    stages = (stage_config(config, index).training for index in range(len(config.stages)))
    return sum(training.steps * training.global_batch_tokens for training in stages)


def evaluations(config: RunConfig) -> list[int]:
    """After how many tokens of the run scores are known before its end: evaluations during stages, ends of stages."""
    out, before = [], 0
    for index in range(len(config.stages)):
        stage = stage_config(config, index)
        tokens, every = stage.training.global_batch_tokens, stage.evaluation.every_steps
        if every is not None:
            out += [before + step * tokens for step in range(every, stage.training.steps, every)]
        before += stage.training.steps * tokens
        out.append(before)
    return out[:-1]


def rung_tokens(config: RunConfig, shares: Sequence[Fraction]) -> list[int | None]:
    """After how many tokens a run is judged at each rung: at its first evaluation from the rung's share of the full
    budget on; None where there is none before the next rung or the end."""
    total = run_tokens(config)
    known = evaluations(config)
    edges = [share * total for share in shares] + [Fraction(total)]
    return [next((at for at in known if low <= at < high), None) for low, high in pairwise(edges)]


def shown(point: Point | None) -> str:
    """A point for a person: `a=1, b=2`."""
    return ", ".join(f"{name}={value}" for name, value in point.params.items()) if point else "base"


# --- faults that need the run ----------------------------------------------------------------------------------------


def _size_faults(study: Study) -> Iterator[Fault]:
    search, space = study.config.search, study.space
    if search.kind == "grid":
        for name in (name for name in space.knobs if space.values(name) is None):
            kind = space.knobs[name].kind
            yield Fault(f"space.{name}.levels", f" is missing: a grid takes values of {kind}; set it, such as 4")
    elif (size := points_at_most(space, search.trials, [])) < search.trials:
        yield Fault("search.trials", f"={search.trials}, but the space has {size} points; set {size}, or kind: grid")


def points_to_check(study: Study) -> list[Point]:
    """The points whose configs are built, each once, most telling first."""
    return list({point.id: point for point in islice(_telling(study), MOST_CHECKED)}.values())


def _telling(study: Study) -> Iterator[Point]:
    space, search = study.space, study.config.search
    for name in space.knobs:
        yield from filter(None, (space.witness(name, value) for value in space.ends(name)))
    if search.kind == "random":
        yield from (space.sample(search.seed, index) for index in range(search.trials))
    yield from space.corners()


def _point_faults(study: Study) -> Iterator[Fault]:
    """What the run refuses at points of the space; each line once, with the first point that shows it."""
    found: dict[str, list[Point]] = {}
    for point in points_to_check(study):
        try:
            config = study.config_of(point, study.config.seeds[0])
            lines = [*_stage_problems(config), *_rung_problems(study, config)]
        except ConfigError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            lines = lines[1:] or lines
        for line in lines:
            found.setdefault(line, []).append(point)
    for line, points in found.items():
        more = f"; and {len(points) - 1} more points" if len(points) > 1 else ""
        yield Fault("space", f" ({shown(points[0])}{more}): {line}")


def _stage_problems(config: RunConfig) -> Iterator[str]:
    """What makes the results of a run those of other settings than its point's."""
    for index, stage in enumerate(config.stages):
        continual = stage_config(config, index).continual
        if continual.on_forgetting == "retry" and continual.max_forgetting is not None:
            yield (
                f"continual.on_forgetting=retry repeats stage {stage.name} with more replay than its point says, and "
                "the steps of both count as one; set it to warn or stop in `common`"
            )
            return


def _rung_problems(study: Study, config: RunConfig) -> Iterator[str]:
    """Rungs at which a run has no scores."""
    shares = rung_shares(study.config.stopping)
    if not shares:
        return
    if config.evaluation.every_steps is None and not evaluations(config):
        yield (
            f"stopping.rule={study.config.stopping.rule} reads evaluations during a stage, and evaluation.every_steps "
            f"is not set; set it in `common`, to {max(1, int(shares[0] * config.training.steps))} or less"
        )
        return
    for share, tokens in zip(shares, rung_tokens(config, shares), strict=True):
        if tokens is None:
            yield (
                f"stopping.rungs: no evaluation between the rung at {float(share):.3g} of the budget and the next one "
                f"(evaluation.every_steps={config.evaluation.every_steps}, {config.training.steps} steps); evaluate "
                "more often, or set the rungs further apart"
            )
