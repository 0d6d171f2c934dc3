"""Quantiles of real ("anchor") text, computed once and frozen in a file, by which both tails of a figure are cut.

Bounds taken from the round's own rows drift with the round and make a verdict depend on its neighbours. Here they come
from anchor documents alone: a verdict is a function of the row and the file. The file holds a grid of quantiles per
domain, so that the levels can be chosen later; what measured (model, tokenizer); and how much text stands behind it.

Documents are cut into passages of equal length, which are measured one by one: figures of a whole book scatter less
than those of a row. A row whose domain the file does not know is held against all anchor text together.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from nexus_ray.errors import ConfigError, DataError
from nexus_ray.storage import Storage

Measure = Literal["prior", "perplexity"]
Documents = Iterable[tuple[str, str]]
"""Domain and text of each."""
ALL = ""
"""The domain of all anchor text together."""
STEPS = 200
"""The grid: quantiles at 0, 1/200, ..., 1; between two of them, bounds are interpolated."""
PASSAGE_WORDS = 200
_FORMAT = 1
_WORD = re.compile(r"\S+")
_LOCK_S = 3600.0


@dataclass(frozen=True)
class Anchor:
    """What is known of the anchor text, for one measure."""

    measure: Measure
    model: str
    """Fingerprint of what measured: weights and precision, or the table of word counts."""
    tokenizer: str
    """Fingerprint of what cut text into tokens."""
    passage_words: int
    documents: Mapping[str, int]
    """Number of documents by domain, `ALL` included."""
    passages: Mapping[str, int]
    """Number of passages by domain."""
    quantiles: Mapping[str, Mapping[str, Sequence[float]]]
    """By domain and figure: `STEPS` + 1 values, ascending."""
    words: Mapping[str, int] = field(default_factory=dict)
    """Prior: how often the commonest words occur."""
    total: int = 0
    """Prior: number of words, the rare ones included."""

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of all of it."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()

    def domain(self, name: str) -> str:
        """The domain by which a row is judged."""
        return name if name in self.quantiles else ALL

    def bound(self, domain: str, figure: str, level: float | None) -> float | None:
        """The figure's value that the share `level` of the domain's passages do not exceed; None for no level."""
        if level is None:
            return None
        grid = self.quantiles[self.domain(domain)][figure]
        place = level * STEPS
        left = min(int(place), STEPS - 1)
        return float(grid[left] + (grid[left + 1] - grid[left]) * (place - left))

    def check_levels(self, low: float | None, high: float | None) -> None:
        """Raise ConfigError if a domain has too few passages for a tail: less than one would lie in it."""
        tails = [tail for tail in (low, None if high is None else 1.0 - high) if tail]
        for domain, count in self.passages.items():
            if tails and count * min(tails) < 1.0 - 1e-9:
                raise ConfigError(
                    f"{self.measure}: {domain or 'all anchor text'} has {count} passages, too few for tails of "
                    f"{min(tails):g}, which need {math.ceil(1.0 / min(tails) - 1e-9)}; give more anchor text, or cut "
                    f"less with low and high"
                )


def grids(figures: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Quantile grids by domain and figure of the figures of each domain's passages; `ALL` is added.

    Raises DataError if there is no passage at all, or a figure is not finite.
    """
    together = [one for domain in figures for one in figures[domain]]
    if not together:
        raise DataError("the anchor text has no passage long enough to be measured; give more or longer documents")
    levels = np.linspace(0.0, 1.0, STEPS + 1)
    result: dict[str, dict[str, list[float]]] = {}
    for domain, found in {**figures, ALL: together}.items():
        table = {name: np.array([one[name] for one in found]) for name in found[0]}
        for name, values in table.items():
            if not np.isfinite(values).all():
                raise DataError(
                    f"anchor text of {domain or 'all domains'}: {name} of {int((~np.isfinite(values)).sum())} passages "
                    f"is no finite number; check what measures it, or leave that text out"
                )
        result[domain] = {name: np.quantile(values, levels).tolist() for name, values in table.items()}
    return result


def passages(text: str, words: int) -> Iterator[str]:
    """The text in pieces of `words` words between white space; a shorter rest counts only if it is all there is."""
    ends = [found.end() for found in _WORD.finditer(text)]
    last = ends[words - 1 :: words] or ends[-1:]
    start = 0
    for end in last:
        yield text[start:end].strip()
        start = end


def with_all(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by domain with those of all anchor text; what has no domain counts there alone."""
    return {**counts, ALL: sum(counts.values())}


def save_anchor(anchor: Anchor, storage: Storage, *parts: str) -> None:
    """Write it as one JSON file, in place at once."""
    storage.write_json({"format": _FORMAT, "fingerprint": anchor.fingerprint, **asdict(anchor)}, *parts)


def load_anchor(storage: Storage, *parts: str, measure: Measure) -> Anchor:
    """What `save_anchor` wrote. Raises DataError if it is missing, damaged, edited, or of another measure."""
    where = "/".join((storage.uri, *parts))
    try:
        data: dict[str, Any] = dict(storage.read_json(*parts))
        stated = data.pop("format"), data.pop("fingerprint")
        anchor = Anchor(**data)
        found = _FORMAT, anchor.fingerprint
    except FileNotFoundError:
        raise DataError(f"{where} is not there; freeze the {measure} quantiles of anchor text first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(_unusable(where, measure, f"{type(error).__name__}: {error}")) from None
    if stated != found:
        raise DataError(_unusable(where, measure, "its fingerprint is not that of its content"))
    if anchor.measure != measure:
        raise DataError(f"{where} holds quantiles of {anchor.measure}, not of {measure}; name the other file")
    return anchor


def frozen(storage: Storage, *parts: str, measure: Measure, make: Callable[[], Anchor]) -> Anchor:
    """The anchor of a file; made and written by the first who asks for it, under a lock, and only read from then on."""
    if not storage.exists(*parts):
        with storage.lock("-".join(parts), _LOCK_S):
            if not storage.exists(*parts):
                save_anchor(make(), storage, *parts)
    return load_anchor(storage, *parts, measure=measure)


def _unusable(where: str, measure: str, reason: str) -> str:
    return f"{where} cannot be used ({reason}); delete it and freeze the {measure} quantiles of the anchor text again"
