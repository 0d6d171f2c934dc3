"""Confidence intervals by resampling held-out documents (Efron & Tibshirani 1993, chapter 13: percentile intervals).

Invariant: paired. One resample of a domain's documents is used for all stages of a run (and its from-scratch
comparison), so that the difference of two stages on the same text is not drowned by how hard the text is. A resample
is a function of (seed, domain name, number of documents) alone: runs that share held-out text are paired too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nexus_ray.evaluate.scores import DomainScore

LEVEL = 0.95
"""Coverage of the intervals."""
_CHUNK = 4_000_000


def resample_weights(documents: int, samples: int, *, seed: int, name: str) -> Iterator[NDArray[np.float64]]:
    """How often each document stands in each resample: blocks [k, documents] of `samples` rows in all."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    shares = np.full(documents, 1.0 / documents)
    for start in range(0, samples, step := max(1, _CHUNK // documents)):
        yield generator.multinomial(documents, shares, size=min(step, samples - start)).astype(np.float64)


def resampled_figures(
    scores: Sequence[DomainScore | None], samples: int, *, seed: int, name: str
) -> dict[str, NDArray[np.float64]]:
    """`bits_per_byte` and `loss` of every resample, float64 [samples, len(scores)], one column per stage.

    NaN where a stage has no score, and everywhere if there are fewer than two documents: one document says nothing
    about the next. Raises ValueError if stages were scored on different documents.
    """
    known = [(column, score) for column, score in enumerate(scores) if score is not None]
    figures = {key: np.full((samples, len(scores)), np.nan) for key in ("bits_per_byte", "loss")}
    sizes = {(len(s.nll_by_document), s.tokens, s.bytes) for _, s in known}
    if len(sizes) > 1:
        raise ValueError(f"stages of {name} were scored on different documents: {sorted(sizes)}")
    if not known or next(iter(sizes))[0] < 2:
        return figures
    nll = np.stack([score.nll_by_document for _, score in known], axis=1)
    tokens, bytes_ = known[0][1].tokens_by_document, known[0][1].bytes_by_document
    columns = [column for column, _ in known]
    row = 0
    for weights in resample_weights(len(nll), samples, seed=seed, name=name):
        rows = slice(row, row := row + len(weights))
        with np.errstate(divide="ignore", invalid="ignore"):
            figures["loss"][rows, columns] = (weights @ nll) / (weights @ tokens)[:, None]
            figures["bits_per_byte"][rows, columns] = (weights @ nll) / (weights @ bytes_)[:, None] / math.log(2)
    return figures


def interval(values: NDArray[np.float64], level: float = LEVEL) -> tuple[float, float] | None:
    """The central `level` of a statistic's resampled values [samples]; None if any is undefined."""
    if not len(values) or not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
