"""From the stages of a config to segments of the plan: replay sources, curricula, the cap on repetitions. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from nexus_ray.config.tree import Curriculum, RunConfig, StageConfig, exact_fraction
from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.errors import ConfigError
from nexus_ray.stream.mixture import MAX_CYCLE, stage_counts
from nexus_ray.stream.plan import VERSION, Segment, Source


def replay_weights(config: RunConfig, stage_index: int, tokens: Mapping[str, int]) -> dict[str, Fraction]:
    """Replayed domains of a stage: as configured, else those of the earlier stages weighted by their tokens."""
    stage = config.stages[stage_index]
    if stage.replay is not None:
        return {name: exact_fraction(weight) for name, weight in stage.replay.items()}
    earlier = [name for name in config.earlier_domains(stage_index) if name not in stage.domains]
    return {name: Fraction(tokens[name]) for name in earlier}


def stage_segments(
    config: RunConfig,
    stage_index: int,
    manifests: Mapping[str, TokenManifest],
    *,
    start_row: int,
    attempt: int = 0,
) -> list[Segment]:
    """The segments of one stage, from its first global row on.

    `config` is the stage's own config (overrides applied). Raises ConfigError where a source would be repeated more
    often than `data.max_repetitions`, or is too short for a single row.
    """
    stage = config.stages[stage_index]
    replay = replay_weights(config, stage_index, {name: manifest.tokens for name, manifest in manifests.items()})
    ratio = exact_fraction(config.continual.replay_ratio) if replay else Fraction(0)
    rows = config.training.steps * config.training.rows_per_step
    segments = []
    for start, stop, new, part_ratio in _parts(config, stage, rows, ratio):
        weights, cycle = stage_counts(new, replay, part_ratio)
        sources = {name: _source(manifests[name], config) for name in weights}
        segments.append(
            Segment(
                stage=stage.name,
                stage_index=stage_index,
                attempt=attempt,
                start_row=start_row + start,
                rows=stop - start,
                weights=weights,
                cycle=cycle,
                replay=tuple(name for name in replay if name in weights and name not in new),
                replay_ratio=float(part_ratio),
                manifests=sources,
            )
        )
    _check_repetitions(config, stage, segments)
    return segments


def changed_segment(
    config: RunConfig,
    stage_index: int,
    manifests: Mapping[str, TokenManifest],
    last: Segment,
    *,
    start_row: int,
    replay_ratio: float,
    lr_factor: float,
) -> Segment:
    """The segment that replaces `last`, the final one of its stage, from `start_row` on, with another replay ratio and
    learning-rate factor. Domains that `last` draws from keep the manifests they have there."""
    stage = config.stages[stage_index]
    replay = replay_weights(config, stage_index, {name: manifest.tokens for name, manifest in manifests.items()})
    ratio = exact_fraction(replay_ratio) if replay else Fraction(0)
    weights, cycle = stage_counts({name: exact_fraction(w) for name, w in stage.domains.items()}, replay, ratio)
    sources = {name: _source(manifests[name], config) for name in weights}
    return replace(
        last,
        start_row=start_row,
        rows=last.start_row + last.rows - start_row,
        weights=weights,
        cycle=cycle,
        replay=tuple(name for name in replay if name in weights and name not in stage.domains),
        replay_ratio=float(ratio),
        manifests={name: last.manifests.get(name, source) for name, source in sources.items()},
        lr_factor=lr_factor,
        version=VERSION,
    )


def _parts(
    config: RunConfig, stage: StageConfig, rows: int, ratio: Fraction
) -> list[tuple[int, int, dict[str, Fraction], Fraction]]:
    """(first row, last-plus-one row, new weights, replay ratio) of each part of a stage."""
    new = {name: exact_fraction(weight) for name, weight in stage.domains.items()}
    if config.continual.curriculum is Curriculum.INTERLEAVED:
        everything: dict[str, Fraction] = {}
        for other in config.stages:
            total = sum((exact_fraction(w) for w in other.domains.values()), Fraction(0))
            for name, weight in other.domains.items():
                everything[name] = everything.get(name, Fraction(0)) + exact_fraction(weight) / total
        return [(0, rows, everything, Fraction(0))]
    if config.continual.curriculum is Curriculum.SEQUENTIAL or not ratio:
        return [(0, rows, new, ratio)]
    parts = min(config.continual.progressive_steps, config.training.steps)
    edges = [config.training.steps * k // parts * config.training.rows_per_step for k in range(parts + 1)]
    swing = min(ratio, 1 - ratio)  # the ratio falls in a line from ratio + swing to ratio - swing; its mean is `ratio`
    line = [edge * (ratio + swing - swing * edge / rows) for edge in edges]  # its integral: rows replayed before
    counts = [round(after) - round(before) for before, after in pairwise(line)]  # whole rows, so that none accumulates
    return [
        (start, stop, new, Fraction(count, stop - start).limit_denominator(MAX_CYCLE // 2))
        for (start, stop), count in zip(pairwise(edges), counts, strict=True)
    ]


def _source(manifest: TokenManifest, config: RunConfig) -> Source:
    rows = manifest.rows(config.training.seq_len)
    if rows == 0:
        raise ConfigError(
            f"domains.{manifest.domain}: its {manifest.tokens} training tokens do not fill a row of "
            f"training.seq_len={config.training.seq_len}; add text or lower seq_len"
        )
    used = max(1, round(rows * exact_fraction(config.data.fraction)))
    return Source(manifest.fingerprint, len(manifest.shards), rows, used if used < rows else None)


def _check_repetitions(config: RunConfig, stage: StageConfig, segments: list[Segment]) -> None:
    drawn: dict[str, int] = {}
    sources = {name: source for segment in segments for name, source in segment.manifests.items()}
    for segment in segments:
        for name, rows in segment.drawn(segment.rows).items():
            drawn[name] = drawn.get(name, 0) + rows
    for name, rows in drawn.items():
        have = sources[name].used or sources[name].rows
        if rows > config.data.max_repetitions * have:
            raise ConfigError(
                f"data.max_repetitions={config.data.max_repetitions:g}: stage {stage.name!r} would read domain "
                f"{name!r} {rows / have:.1f} times ({rows} rows drawn, {have} there). Lower training.token_budget or "
                f"the domain's weight, add text, or raise data.max_repetitions to {-(-rows // have)}"
            )
