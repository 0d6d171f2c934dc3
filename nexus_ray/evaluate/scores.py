"""What a model scored on held-out text: figures and the per-document sums they come from. Pure numpy."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DomainScore:
    """What a model scored on one domain: arrays with one entry per chosen document, in corpus order."""

    nll_by_document: NDArray[np.float64]
    """Nats, summed over the document's targets."""
    tokens_by_document: NDArray[np.int64]
    """Targets: all its tokens but the first; the closing end-of-document token is one."""
    bytes_by_document: NDArray[np.int64]
    """UTF-8 bytes of the text that the targets stand for."""

    @property
    def nll(self) -> float:
        """Nats over all targets (exactly rounded sum)."""
        return math.fsum(self.nll_by_document)

    @property
    def tokens(self) -> int:
        return int(self.tokens_by_document.sum())

    @property
    def bytes(self) -> int:
        return int(self.bytes_by_document.sum())

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of predicted text; comparable between tokenizers."""
        return self.nll / math.log(2) / self.bytes

    def summary(self) -> dict[str, float | int]:
        """The figures of `stage.json`."""
        names = ("nll", "tokens", "bytes", "bits_per_byte", "loss", "perplexity")
        return {name: getattr(self, name) for name in names}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The per-document arrays of `evaluation.npz`, by short name."""
        return {"nll": self.nll_by_document, "tokens": self.tokens_by_document, "bytes": self.bytes_by_document}


def scores_to_bytes(scores: Mapping[str, DomainScore]) -> bytes:
    """The content of an `evaluation.npz`: `<domain>/nll`, `<domain>/tokens`, `<domain>/bytes`."""
    buffer = io.BytesIO()
    arrays = {f"{domain}/{key}": part for domain, score in scores.items() for key, part in score.arrays().items()}
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def scores_from_bytes(content: bytes) -> dict[str, DomainScore]:
    """The inverse of `scores_to_bytes`; domains in the order they were written."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        domains = dict.fromkeys(name.rpartition("/")[0] for name in arrays.files)
        return {d: DomainScore(arrays[f"{d}/nll"], arrays[f"{d}/tokens"], arrays[f"{d}/bytes"]) for d in domains}
