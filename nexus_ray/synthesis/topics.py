"""Topics without a model: hashed TF-IDF, random projection and k-means, from numpy alone.

Texts become directions in a small space whose angles are about those of their TF-IDF vectors (Achlioptas 2003: random
signs keep distances); clusters are made on real text and then only counted against. Coarse beside an embedding model,
but it needs no download, and it sees the loss of whole subjects. Invariant: equal texts and seed give equal figures.

Legend: N texts, H hash buckets (or those that occur), D dimensions, K clusters.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BUCKETS = 2**14
DIMENSIONS = 64
_ITERATIONS = 25


class Vectors:
    """TF-IDF over hashed words, with document frequencies of `reference` (each text a list of words)."""

    def __init__(self, reference: Sequence[Sequence[str]]) -> None:
        counts = np.zeros(BUCKETS)
        for words in reference:
            counts[list({_bucket(word) for word in words})] += 1
        self._idf_H = np.log((1 + len(reference)) / (1 + counts)) + 1e-9

    def __call__(self, texts: Sequence[Sequence[str]]) -> Floats:
        """Unit rows, float64 [N, buckets that occur]; a text without words is a row of zeros."""
        found = [self._weights(words) for words in texts]
        used = np.unique(np.concatenate([np.empty(0, np.int64), *(buckets for buckets, _ in found)]))
        rows_NH = np.zeros((len(texts), len(used)))
        for row, (buckets, weights) in enumerate(found):
            rows_NH[row, np.searchsorted(used, buckets)] = weights
        return _unit(rows_NH)

    def projected(self, texts: Sequence[Sequence[str]], *, seed: int) -> Floats:
        """Unit rows in few dimensions, float64 [N, D]."""
        signs_HD = np.random.default_rng(seed).choice([-1.0, 1.0], size=(BUCKETS, DIMENSIONS))
        rows_ND = np.zeros((len(texts), DIMENSIONS))
        for row, words in enumerate(texts):
            buckets, weights = self._weights(words)
            rows_ND[row] = weights @ signs_HD[buckets]
        return _unit(rows_ND)

    def _weights(self, words: Sequence[str]) -> tuple[NDArray[np.int64], Floats]:
        """Buckets that a text's words fall into, and (1 + log count) x idf of each."""
        found = np.array([_bucket(word) for word in words], np.int64)
        buckets, counts = np.unique(found, return_counts=True)
        return buckets, (1 + np.log(counts)) * self._idf_H[buckets]


@lru_cache(maxsize=2**16)
def _bucket(word: str) -> int:
    return zlib.crc32(word.encode(errors="replace")) % BUCKETS


def _unit(rows_ND: Floats) -> Floats:
    norms = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return np.divide(rows_ND, norms, out=np.zeros_like(rows_ND), where=norms > 0)


@dataclass(frozen=True)
class Clusters:
    """Topics of a reference."""

    centres_KD: Floats

    def count(self, rows_ND: Floats) -> NDArray[np.int64]:
        """How many rows lie nearest to each centre, int64 [K]."""
        return np.bincount(_nearest(rows_ND, self.centres_KD), minlength=len(self.centres_KD)).astype(np.int64)

    def without_small(self, rows_ND: Floats, least: int) -> Clusters:
        """Only those that at least `least` of the rows lie in: a lone odd text is no topic."""
        return Clusters(self.centres_KD[self.count(rows_ND) >= least])


def k_means(rows_ND: Floats, clusters: int, *, seed: int) -> Clusters:
    """Lloyd's algorithm from k-means++ starts (Arthur & Vassilvitskii 2007); `clusters` at most the number of rows."""
    generator = np.random.default_rng(seed)
    centres_KD = rows_ND[[int(generator.integers(len(rows_ND)))]]
    while len(centres_KD) < clusters:
        far_N = _distances(rows_ND, centres_KD).min(axis=1)
        total = far_N.sum()
        chances_N = far_N / total if total > 0 else np.full(len(rows_ND), 1 / len(rows_ND))
        centres_KD = np.concatenate([centres_KD, rows_ND[[int(generator.choice(len(rows_ND), p=chances_N))]]])
    for _ in range(_ITERATIONS):
        nearest_N = _nearest(rows_ND, centres_KD)
        moved_KD = centres_KD.copy()
        for k in np.unique(nearest_N):
            moved_KD[k] = rows_ND[nearest_N == k].mean(axis=0)
        if np.array_equal(moved_KD, centres_KD):
            break
        centres_KD = moved_KD
    return Clusters(centres_KD)


def _distances(rows_ND: Floats, centres_KD: Floats) -> Floats:
    """Squared distances, float64 [N, K]."""
    squares_NK = (rows_ND**2).sum(1)[:, None] - 2 * rows_ND @ centres_KD.T + (centres_KD**2).sum(1)
    return np.maximum(squares_NK, 0.0)


def _nearest(rows_ND: Floats, centres_KD: Floats) -> NDArray[np.int64]:
    return _distances(rows_ND, centres_KD).argmin(axis=1)


def normal_entropy(counts_K: NDArray[np.int64]) -> float:
    """Entropy of shares / log K: 1 if all clusters are met alike, 0 if only one is; 0 for a single cluster."""
    shares = counts_K[counts_K > 0] / max(1, counts_K.sum())
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts_K))) if len(counts_K) > 1 else 0.0


def vendi_score(rows_ND: Floats) -> float:
    """Effective number of different rows: exp of the entropy of the eigenvalues of their similarities / N.

    Friedman & Dieng 2023 (arXiv:2210.02410), with cosine similarity: 1 if all rows are equal, N if all are orthogonal.
    Rows are unit vectors; rows of zeros are left out.
    """
    rows_ND = rows_ND[np.linalg.norm(rows_ND, axis=1) > 0]
    if not len(rows_ND):
        return 0.0
    values = np.linalg.eigvalsh(rows_ND @ rows_ND.T / len(rows_ND))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))
