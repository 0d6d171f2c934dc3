"""Drift of a score on the same documents: its value, and that its standard error is one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nexus_ray.evaluate.drift import drift
from nexus_ray.evaluate.scores import DomainScore


def score(nll: list[float] | np.ndarray, sizes: list[int] | np.ndarray) -> DomainScore:
    sizes = np.asarray(sizes)
    return DomainScore(np.asarray(nll, dtype=float), sizes, sizes)


def test_it_is_the_difference_of_the_scores() -> None:
    before, after = score([1, 2, 3], [10, 20, 30]), score([2, 2, 5], [10, 20, 30])
    lost, error = drift(before, after, of_documents=100)
    assert lost == pytest.approx(after.bits_per_byte - before.bits_per_byte) == pytest.approx(3 / math.log(2) / 60)
    assert error > 0


def test_a_drift_that_is_the_same_everywhere_has_no_error_nor_has_a_whole_corpus() -> None:
    sizes = [10, 20, 30]
    assert drift(score([1, 2, 3], sizes), score([2, 4, 6], sizes), of_documents=100)[1] == pytest.approx(0, abs=1e-12)
    assert drift(score([1, 2, 3], sizes), score([2, 2, 5], sizes), of_documents=3)[1] == 0
    assert drift(score([1], [10]), score([2], [10]), of_documents=100)[1] == 0, "of one document nothing can be said"


def test_two_thirds_of_the_samples_lie_within_one_standard_error() -> None:
    dice = np.random.default_rng(0)
    sizes = dice.integers(50, 500, 400)
    before, lost = dice.normal(2, 0.3, 400) * sizes, dice.normal(0.2, 0.1, 400) * sizes
    truth = lost.sum() / math.log(2) / sizes.sum()
    inside = 0
    for _ in range(1000):
        chosen = dice.choice(400, 60, replace=False)
        found, error = drift(
            score(before[chosen], sizes[chosen]), score((before + lost)[chosen], sizes[chosen]), of_documents=400
        )
        inside += abs(found - truth) <= error
    assert 620 <= inside <= 740
