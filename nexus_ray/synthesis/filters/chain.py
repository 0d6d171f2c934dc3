"""The chain of filters: cheap first, the first rejection wins, all cheap figures kept.

Stateless filters judge on arrival, on any worker; those that remember judge in plan order, in one process, and take
note of what was accepted. So verdicts do not depend on timing. Filters that cost more than a look (a classifier, a
perplexity) are asked last, and only for rows that nothing cheap rejected.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nexus_ray.config.filters import FiltersConfig
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.filters.charset import Charset
from nexus_ray.synthesis.filters.contamination import Contamination, HeldOut
from nexus_ray.synthesis.filters.diversity import Diversity
from nexus_ray.synthesis.filters.exact import Exact
from nexus_ray.synthesis.filters.finish import Finish
from nexus_ray.synthesis.filters.format import Format
from nexus_ray.synthesis.filters.language import Language
from nexus_ray.synthesis.filters.length import Length
from nexus_ray.synthesis.filters.near import Near
from nexus_ray.synthesis.filters.novelty import Novelty
from nexus_ray.synthesis.filters.personal import Personal
from nexus_ray.synthesis.filters.repetition import Repetition
from nexus_ray.synthesis.filters.safety import Safety, SafetyClassifier
from nexus_ray.synthesis.filters.text import Filter, Item, RememberingFilter, Text
from nexus_ray.synthesis.rows import Row, Verdict

_FORMAT = 1


@dataclass(frozen=True)
class FilterChain:
    """Filters in the order in which they are asked."""

    cheap: Sequence[Filter] = ()
    """Stateless; all are asked, so that every row has all their figures."""
    costly: Sequence[Filter] = ()
    """Stateless; asked until one rejects, if no cheap one did."""
    remembering: Sequence[RememberingFilter] = ()
    """Asked until one rejects, in plan order."""
    personal: Personal | None = None
    """Masks before anything is judged, if it is set to."""

    def clean(self, row: Row) -> Row:
        """The row as the filters are to see it: personal data masked where the config says so."""
        return self.personal.clean(row) if self.personal else row

    def judge(self, item: Item) -> Verdict:
        """What the stateless filters say: for workers, on arrival."""
        text = Text.of(item)
        verdicts = [some.judge(text) for some in self.cheap]
        if not _rejected(verdicts):
            verdicts += _until_rejected(self.costly, text)
        return combine(verdicts)

    def judge_in_order(self, item: Item) -> Verdict:
        """What the filters that remember say, given the rows accepted so far."""
        return combine(_until_rejected(self.remembering, Text.of(item)))

    def remember(self, item: Item) -> None:
        """Take note of an accepted row, of one of an earlier round, or of one of the pool."""
        text = Text.of(item)
        for some in self.remembering:
            some.remember(text)

    def save(self, storage: Storage, *parts: str) -> None:
        """Write down what is remembered, in one file."""
        buffer = io.BytesIO()
        arrays = {f"{some.name}.{key}": value for some in self.remembering for key, value in some.state().items()}
        np.savez_compressed(buffer, header=np.array(self._header()), **arrays)  # type: ignore[arg-type]
        storage.write_bytes(buffer.getvalue(), *parts)

    def load(self, storage: Storage, *parts: str) -> None:
        """Take up what `save` wrote. Raises DataError if it is torn or was made with other settings."""
        try:
            with np.load(io.BytesIO(storage.read_bytes(*parts)), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = str(arrays.pop("header"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(_unusable(storage, parts, str(error))) from None
        if header != self._header():
            raise DataError(_unusable(storage, parts, "made by other filters or settings"))
        for some in self.remembering:
            prefix = f"{some.name}."
            some.restore({key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)})

    def _header(self) -> str:
        return json.dumps([_FORMAT, *([some.name, some.settings()] for some in self.remembering)])


def build_chain(
    config: FiltersConfig | None = None,
    *,
    held_out: Iterable[tuple[str, str]] = (),
    pool: Iterable[str] = (),
    classifier: Callable[[str], float] | None = None,
    extra: Sequence[Filter] = (),
) -> FilterChain:
    """The chain of a config.

    `held_out`: name and text of what must stay unseen. `pool`: texts that rows must differ from by ROUGE-L (the seeds
    they were prompted with). `classifier`: text -> harmfulness in [0, 1]. `extra`: further costly filters.
    """
    config = config or FiltersConfig()
    personal = Personal(config.personal) if config.personal else None
    cheap: list[Filter] = []
    if config.length:
        cheap.append(Length(config.length))
    if config.finish:
        cheap.append(Finish(config.finish))
    if config.format:
        cheap.append(Format(config.format))
    if config.charset:
        cheap.append(Charset(config.charset))
    if config.language:
        cheap.append(Language(config.language))
    if config.repetition:
        cheap.append(Repetition(config.repetition))
    if personal:
        cheap.append(personal)
    if config.safety:
        cheap.append(Safety(config.safety))
    if config.contamination:
        cheap.append(Contamination(HeldOut(held_out, config.contamination)))
    costly: list[Filter] = [SafetyClassifier(classifier, config.safety)] if classifier and config.safety else []
    return FilterChain(cheap, [*costly, *extra], _remembering(config, pool), personal)


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict of many: the first rejection, else the first flag, else `pass`; the figures of all."""
    outcome, reason = "pass", ""
    scores: dict[str, float] = {}
    for some in verdicts:
        scores.update(some.scores)
        if (some.outcome == "reject" and outcome != "reject") or (some.outcome == "flag" and outcome == "pass"):
            outcome, reason = some.outcome, some.reason
    return Verdict(outcome, reason, scores)  # type: ignore[arg-type]


def _remembering(config: FiltersConfig, pool: Iterable[str]) -> list[RememberingFilter]:
    remembering: list[RememberingFilter] = []
    if config.exact:
        remembering.append(Exact(config.exact))
    if config.near:
        remembering.append(Near(config.near))
    if config.novelty:
        remembering.append(Novelty(config.novelty, pool=pool))
    if config.diversity:
        remembering.append(Diversity(config.diversity))
    return remembering


def _until_rejected(filters: Iterable[Filter], text: Text) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for some in filters:
        verdicts.append(some.judge(text))
        if verdicts[-1].outcome == "reject":
            break
    return verdicts


def _rejected(verdicts: Iterable[Verdict]) -> bool:
    return any(some.outcome == "reject" for some in verdicts)


def _unusable(storage: Storage, parts: Sequence[str], reason: str) -> str:
    return (
        f"{'/'.join((storage.uri, *parts))} cannot be used ({reason}); delete it, and the memory of the filters is "
        f"rebuilt from the accepted rows"
    )
