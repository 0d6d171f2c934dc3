"""How far a domain's score has drifted since a stage began, on the same documents, and how sure that is. Pure numpy."""

from __future__ import annotations

import math

import numpy as np

from nexus_ray.evaluate.scores import DomainScore


def drift(start: DomainScore, now: DomainScore, *, of_documents: int) -> tuple[float, float]:
    """(bits per byte lost since `start`, standard error), paired over documents; positive: worse than it was.

    The error is that of a ratio of sums over a simple random sample of `of_documents` documents without replacement
    (Cochran 1977, Sampling Techniques, section 6.3): 0 where the sample is all of them, or one document, of which
    nothing can be said.
    """
    lost = (now.nll_by_document - start.nll_by_document) / math.log(2)
    total = int(now.bytes_by_document.sum())
    mean = math.fsum(lost) / total
    n = len(lost)
    if n < 2:
        return mean, 0.0
    residuals = lost - mean * now.bytes_by_document
    unseen = max(0.0, 1.0 - n / max(n, of_documents))
    return mean, float(np.sqrt(unseen * n / (n - 1) * np.sum(residuals**2))) / total
