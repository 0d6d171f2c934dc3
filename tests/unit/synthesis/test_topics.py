"""Topics from numpy alone: clusters find planted subjects, the Vendi score counts what differs."""

from __future__ import annotations

import numpy as np
import pytest

from nexus_ray.synthesis.topics import Vectors, k_means, normal_entropy, vendi_score

SUBJECTS = [
    "sea ship sail wave captain harbour",
    "oven bread flour dough bake crust",
    "star moon orbit comet planet sky",
]


def texts(seed: int, count: int = 40) -> tuple[list[list[str]], list[int]]:
    generator = np.random.default_rng(seed)
    labels = [int(label) for label in generator.integers(len(SUBJECTS), size=count)]
    filler = ["the", "a", "of", "and", "to", "in", "it", "was", "on", "that"]
    words = [[*generator.choice(SUBJECTS[label].split(), 12), *generator.choice(filler, 12)] for label in labels]
    return words, labels


def test_planted_subjects_are_told_apart() -> None:
    reference, _ = texts(0, 90)
    vectors = Vectors(reference)
    topics = k_means(vectors.projected(reference, seed=1), 3, seed=1)
    found, labels = texts(1)
    near = [int(topics.count(vectors.projected([words], seed=1)).argmax()) for words in found]
    assert len(set(zip(near, labels, strict=True))) == 3
    assert topics.count(vectors.projected(found, seed=1)).sum() == len(found)


def test_equal_input_gives_equal_clusters() -> None:
    reference, _ = texts(0)
    rows = Vectors(reference).projected(reference, seed=3)
    assert np.array_equal(k_means(rows, 4, seed=3).centres_KD, k_means(rows, 4, seed=3).centres_KD)


def test_more_clusters_than_different_rows() -> None:
    rows = Vectors([["a", "b"], ["c"]]).projected([["a", "b"]] * 5, seed=0)
    assert k_means(rows, 3, seed=0).count(rows).sum() == 5


def test_projection_keeps_angles() -> None:
    words, _ = texts(2)
    vectors = Vectors(words)
    exact, near = vectors(words), vectors.projected(words, seed=0)
    assert np.abs(exact @ exact.T - near @ near.T).mean() < 0.1


def test_vendi_score_counts_different_rows() -> None:
    assert vendi_score(np.eye(7)) == pytest.approx(7)
    assert vendi_score(np.tile([[1.0, 0.0]], (9, 1))) == pytest.approx(1)
    assert vendi_score(np.eye(4)[[0, 0, 1, 1, 2, 2, 3, 3]]) == pytest.approx(4)
    assert vendi_score(np.zeros((3, 4))) == 0.0


def test_entropy_of_counts() -> None:
    assert normal_entropy(np.array([5, 5, 5, 5])) == pytest.approx(1)
    assert normal_entropy(np.array([9, 0, 0])) == 0
    assert normal_entropy(np.array([3])) == 0
