"""From held-out scores to what was learned, kept and forgotten. Pure numpy.

Conventions, once and for all: a *score* is the negated bits per byte, so higher is better. `score[t, j]` is that of
domain j after stage t; row 0 is before any training ("base"), row t after stage t. T is the last row.

- forgetting of j:        max over t < T of score[t, j] - score[T, j]      positive: worse than it has been
- backward transfer:      mean over earlier j of score[T, j] - score[l(j), j]     l(j): the stage that learned j first
- forward transfer of j:  score[l(j), j] - score of a fresh model with the same budget on j alone

*Earlier* at stage t is a domain that a stage before t trained on for its own sake, or that is only ever replayed (the
base model brought it along; l(j) = 0). Anchors are reported beside them, outside mean and maximum.
(Chaudhry et al. 2018, section 3; Lopez-Paz & Ranzato 2017, section 2.)

Legend: R rows, J domains; leading dimensions, if any, are resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.evaluate.bootstrap import LEVEL, interval, resampled_figures
from nexus_ray.evaluate.scores import DomainScore

Floats = NDArray[np.float64]


def forgetting(scores: Floats, row: int) -> Floats:
    """Best earlier score minus the score at `row`: [..., R, J] -> [..., J]; NaN where either is undefined."""
    if row < 1:
        return np.full((*scores.shape[:-2], scores.shape[-1]), np.nan)
    return np.fmax.reduce(scores[..., :row, :], axis=-2) - scores[..., row, :]


def change_since(scores: Floats, row: int, since: Sequence[int]) -> Floats:
    """Score at `row` minus that at row `since[j]` of each domain: [..., R, J] -> [..., J]."""
    return scores[..., row, :] - scores[..., list(since), range(scores.shape[-1])]


def learned_at(domains: Sequence[str], trained_by_stage: Sequence[Sequence[str]]) -> list[int | None]:
    """Row of the score matrix after which each domain was first learned; None if no stage trains on it."""
    first: dict[str, int] = {}
    for row, names in enumerate(trained_by_stage, start=1):
        for name in names:
            first.setdefault(name, row)
    return [first.get(domain) for domain in domains]


def earlier_domains(
    domains: Sequence[str], trained_by_stage: Sequence[Sequence[str]], row: int, anchors: Sequence[str] = ()
) -> list[str]:
    """Domains that row `row` (1: the first stage) can have forgotten, anchors not among them."""
    learned = learned_at(domains, trained_by_stage)
    return [
        name
        for name, first in zip(domains, learned, strict=True)
        if (first is None and name not in anchors) or (first is not None and first < row)
    ]


def score_matrix(domains: Sequence[str], scores_by_stage: Sequence[Mapping[str, DomainScore]]) -> Floats:
    """Scores (negated bits per byte) [R, J]; NaN where a domain was not evaluated."""
    return -_table(domains, scores_by_stage, "bits_per_byte")


def stage_forgetting(
    *,
    domains: Sequence[str],
    trained_by_stage: Sequence[Sequence[str]],
    scores_by_stage: Sequence[Mapping[str, DomainScore]],
    anchors: Sequence[str] = (),
) -> dict[str, float]:
    """Forgetting in bits per byte after the last row, of every earlier domain and anchor: what the gate looks at."""
    row = len(scores_by_stage) - 1
    names = [*earlier_domains(domains, trained_by_stage, row, anchors), *anchors]
    values = dict(zip(domains, forgetting(score_matrix(domains, scores_by_stage), row), strict=True))
    return {name: float(values[name]) for name in dict.fromkeys(names) if np.isfinite(values.get(name, np.nan))}


def score_document(
    *,
    domains: Sequence[str],
    stages: Sequence[str],
    trained_by_stage: Sequence[Sequence[str]],
    scores_by_stage: Sequence[Mapping[str, DomainScore]],
    anchors: Sequence[str] = (),
    from_scratch: Mapping[str, DomainScore] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of `scores.json`, a pure function of its arguments; null where a figure is undefined.

    `stages` names the rows, "base" first, and `scores_by_stage` holds one entry per row. `trained_by_stage` has the
    new domains of each stage, without an entry for "base"; it may be longer than the rows of an unfinished run.
    `from_scratch` holds the scores of fresh models that forward transfer is measured against.
    `intervals` mirrors the figures, each a [low, high] pair that covers 95 % of `samples` paired resamples.
    """
    if len(stages) != len(scores_by_stage) or len(trained_by_stage) + 1 < len(stages):
        raise ValueError(
            f"{len(stages)} stages (base included), {len(scores_by_stage)} rows of scores and new domains of "
            f"{len(trained_by_stage)} stages do not fit together"
        )
    fresh = [(from_scratch or {}).get(domain) for domain in domains]
    resampled = [
        resampled_figures([*(row.get(d) for row in scores_by_stage), fresh[j]], samples, seed=seed, name=d)
        for j, d in enumerate(domains)
    ]
    shapes: dict[str, Any] = {"domains": domains, "trained_by_stage": trained_by_stage, "anchors": anchors}
    point = score_matrix(domains, [*scores_by_stage, from_scratch or {}])
    spread = -_stack(resampled, "bits_per_byte", samples, len(stages) + 1)
    figures = _figures(point, point, **shapes)
    intervals = _figures(spread, point, **shapes)
    return {
        "domains": list(domains),
        "stages": list(stages),
        **{key: _cells(_table(domains, scores_by_stage, key)) for key in ("loss", "bits_per_byte", "perplexity")},
        **_mapped(figures, _number),
        "intervals": {
            "level": LEVEL,
            "samples": samples,
            **{
                key: _interval_cells(_stack(resampled, key, samples, len(stages) + 1)[:, :-1])
                for key in ("loss", "bits_per_byte")
            },
            **_mapped(intervals, _interval),
        },
    }


def _figures(
    scores: Floats,
    point: Floats,
    *,
    domains: Sequence[str],
    trained_by_stage: Sequence[Sequence[str]],
    anchors: Sequence[str],
) -> dict[str, Any]:
    """All figures of a score matrix [..., R + 1, J] whose extra last row holds the from-scratch scores.

    `point` is the matrix [R + 1, J] without resampling: it decides which domains a mean or maximum covers.
    """
    row = scores.shape[-2] - 2
    learned = learned_at(domains, trained_by_stage)
    since = [first if first is not None and first <= row else 0 for first in learned]
    earlier = earlier_domains(domains, trained_by_stage, row, anchors) if row >= 1 else []
    lost = _by_domain(domains, forgetting(scores[..., :-1, :], row), forgetting(point[:-1], row))
    gained = _by_domain(domains, change_since(scores, row, since), change_since(point, row, since))
    above = [scores[..., t, j] - scores[..., -1, j] for j, t in enumerate(since)]
    above_point = np.asarray([point[t, j] - point[-1, j] for j, t in enumerate(since)])
    fresh = _by_domain(domains, np.stack(above, axis=-1), above_point)
    lost_earlier = [lost[name] for name in earlier if name in lost]
    gained_earlier = [gained[name] for name in earlier if name in gained]
    return {
        "forgetting": {
            "per_domain": {name: lost.get(name) for name in earlier},
            "mean": np.mean(lost_earlier, axis=0) if lost_earlier else None,
            "max": np.max(lost_earlier, axis=0) if lost_earlier else None,
            "anchors": {name: lost.get(name) for name in anchors} if row >= 1 else {},
        },
        "backward_transfer": np.mean(gained_earlier, axis=0) if gained_earlier else None,
        "forward_transfer": {
            name: fresh[name] for name, t in zip(domains, learned, strict=True) if name in fresh and t and t <= row
        },
    }


def _by_domain(domains: Sequence[str], values: Floats, point: Floats) -> dict[str, Floats]:
    """The columns of `values` [..., J] whose figure is defined, by domain."""
    return {name: values[..., j] for j, name in enumerate(domains) if np.isfinite(point[j])}


def _table(domains: Sequence[str], rows: Sequence[Mapping[str, DomainScore]], figure: str) -> Floats:
    cells = [[getattr(row[d], figure) if d in row else math.nan for d in domains] for row in rows]
    return np.asarray(cells, dtype=np.float64).reshape(len(rows), len(domains))


def _stack(resampled: Sequence[Mapping[str, Floats]], figure: str, samples: int, rows: int) -> Floats:
    """[samples, rows, J]"""
    if not resampled:
        return np.zeros((samples, rows, 0))
    return np.stack([part[figure] for part in resampled], axis=-1)


def _number(value: Any) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def _interval(value: Any) -> list[float] | None:
    found = None if value is None else interval(value)
    return None if found is None else list(found)


def _mapped(tree: Any, leaf: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _mapped(value, leaf) for key, value in tree.items()}
    return leaf(tree)


def _cells(table: Floats) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in table]


def _interval_cells(values: Floats) -> list[list[list[float] | None]]:
    """Intervals of resampled tables [samples, R, J]."""
    return [[_interval(values[:, t, j]) for j in range(values.shape[2])] for t in range(values.shape[1])]
