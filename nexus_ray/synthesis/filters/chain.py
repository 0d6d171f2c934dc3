"""The chain of filters: cheap first, the first rejection wins, all cheap figures kept.

Stateless filters judge on arrival, on any worker; those that remember judge in plan order, in one process, and take
note of what was accepted. So verdicts do not depend on timing. Filters that cost more than a look (a classifier, a
perplexity) are asked last, and only for rows that nothing cheap rejected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from nexus_ray.config.filters import FiltersConfig, PerplexityFilter
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.filters.anchor import Anchor, Measure, load_anchor
from nexus_ray.synthesis.filters.benchmarks import benchmark_items
from nexus_ray.synthesis.filters.charset import Charset
from nexus_ray.synthesis.filters.contamination import Contamination, HeldOut
from nexus_ray.synthesis.filters.diversity import Diversity
from nexus_ray.synthesis.filters.exact import Exact
from nexus_ray.synthesis.filters.finish import Finish
from nexus_ray.synthesis.filters.format import Format
from nexus_ray.synthesis.filters.language import Language
from nexus_ray.synthesis.filters.length import Length
from nexus_ray.synthesis.filters.likelihood import Perplexities, Perplexity, Prior, Scorer, judge_together
from nexus_ray.synthesis.filters.near import Near
from nexus_ray.synthesis.filters.novelty import Novelty
from nexus_ray.synthesis.filters.personal import Personal
from nexus_ray.synthesis.filters.repetition import Repetition
from nexus_ray.synthesis.filters.safety import Classifier, Safety, SafetyClassifier
from nexus_ray.synthesis.filters.text import Filter, Item, RememberingFilter, Text
from nexus_ray.synthesis.rows import Row, Verdict


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

    def judge_many(self, items: Sequence[Item]) -> list[Verdict]:
        """The verdicts of `judge`, with costly filters asked about all rows at once where they can."""
        texts = [Text.of(item) for item in items]
        found = [[some.judge(text) for some in self.cheap] for text in texts]
        for some in self.costly:
            open_ = [place for place, verdicts in enumerate(found) if not _rejected(verdicts)]
            for place, verdict in zip(open_, judge_together(some, [texts[i] for i in open_]), strict=True):
                found[place].append(verdict)
        return [combine(verdicts) for verdicts in found]

    def judge_in_order(self, item: Item) -> Verdict:
        """What the filters that remember say, given the rows accepted so far."""
        return combine(_until_rejected(self.remembering, Text.of(item)))

    def remember(self, item: Item) -> None:
        """Take note of an accepted row, or of one of an earlier round."""
        text = Text.of(item)
        for some in self.remembering:
            some.remember(text)

    def show(self, text: str) -> None:
        """Take note of a text that a prompt showed as an example: only novelty looks at it."""
        for some in self.remembering:
            if isinstance(some, Novelty):
                some.show(text)

    def judge_exact(self, item: Item) -> Verdict:
        """Whether the very same text was accepted, for one that a person wrote.

        Near duplicates and novelty are left to the person, who may mend a row into something close to another.
        """
        text = Text.of(item)
        return combine(some.judge(text) for some in self.remembering if isinstance(some, Exact))


def build_chain(
    config: FiltersConfig | None = None,
    *,
    held_out: Iterable[tuple[str, str]] = (),
    classifier: Classifier | None = None,
    prior: Anchor | None = None,
    perplexity: Anchor | None = None,
    scorer: Scorer | Perplexities | None = None,
    extra: Sequence[Filter] = (),
) -> FilterChain:
    """The chain of a config.

    `held_out`: name and text of what must stay unseen. `classifier`: what `filters.safety.classifier` names, loaded.
    `prior`, `perplexity`: quantiles of the anchor text, where the config names no file that has them. `scorer`: texts
    -> perplexities. `extra`: further costly filters.

    Raises:
        ConfigError: a filter is on that lacks what it needs.
        DataError: benchmark text or quantiles cannot be read, or were measured by another model.
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
        unseen = chain(held_out, benchmark_items(config.contamination.benchmarks))
        cheap.append(Contamination(HeldOut(unseen, config.contamination)))
    if config.prior:
        cheap.append(Prior(_anchor("prior", config.prior.reference, prior), config.prior))
    costly: list[Filter] = []
    if config.safety and config.safety.max_classifier is not None:
        costly.append(SafetyClassifier(_given(classifier), config.safety.max_classifier, action=config.safety.action))
    if config.perplexity:
        costly.append(_perplexity(config.perplexity, perplexity, scorer))
    return FilterChain(cheap, [*costly, *extra], _remembering(config), personal)


def remembering_chain(config: FiltersConfig) -> FilterChain:
    """Only the filters that remember: for the one process that judges in plan order."""
    return FilterChain(remembering=_remembering(config))


def references(config: FiltersConfig) -> dict[str, str]:
    """Fingerprints of the content of the files that a config names: what verdicts depend on besides the config.

    Raises:
        ConfigError: the classifier cannot be read, or lacks a label that is said to be unsafe.
        DataError: benchmark text or quantiles cannot be read.
    """
    found = {}
    if config.contamination and config.contamination.benchmarks:
        items = benchmark_items(config.contamination.benchmarks)
        digest = hashlib.blake2b(digest_size=16)
        for name, text in items:
            digest.update(json.dumps([name, text]).encode())
        found["benchmarks"] = digest.hexdigest()
    for measure, section in (("prior", config.prior), ("perplexity", config.perplexity)):
        if section is not None and section.reference is not None:
            found[measure] = _anchor(measure, section.reference, None).fingerprint  # type: ignore[arg-type]
    if config.safety and config.safety.classifier is not None:
        from nexus_ray.synthesis.filters.safety_model import classifier_fingerprint

        found["classifier"] = classifier_fingerprint(config.safety.classifier)
    return found


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict of many: the first rejection, else the first flag, else `pass`; the figures of all."""
    outcome, reason = "pass", ""
    scores: dict[str, float] = {}
    for some in verdicts:
        scores.update(some.scores)
        if (some.outcome == "reject" and outcome != "reject") or (some.outcome == "flag" and outcome == "pass"):
            outcome, reason = some.outcome, some.reason
    return Verdict(outcome, reason, scores)  # type: ignore[arg-type]


def _given(classifier: Classifier | None) -> Classifier:
    if classifier is None:
        raise ConfigError(
            "filters.safety.classifier: it must be loaded and handed in; use `safety_model.load_classifier`, or turn "
            "it off with filters.safety.classifier=null and filters.safety.max_classifier=null"
        )
    return classifier


def _anchor(measure: Measure, reference: str | None, given: Anchor | None) -> Anchor:
    if reference is not None:
        folder, _, file = Storage(reference).uri.rpartition("/")
        return load_anchor(Storage(folder), file, measure=measure)
    if given is None:
        raise ConfigError(
            f"filters.{measure}.reference=null: the quantiles of the anchor text are needed; name the file that holds "
            f"them, or turn the filter off with filters.{measure}=null"
        )
    return given


def _perplexity(config: PerplexityFilter, given: Anchor | None, scorer: Scorer | Perplexities | None) -> Perplexity:
    if scorer is None:
        raise ConfigError(
            "filters.perplexity: a model must measure it; name one as filters.perplexity.model, or turn the filter off "
            "with filters.perplexity=null"
        )
    bounded = config.min_perplexity is not None or config.max_perplexity is not None
    has_anchor = config.reference is not None or given is not None or not bounded
    return Perplexity(scorer, config, anchor=_anchor("perplexity", config.reference, given) if has_anchor else None)


def _remembering(config: FiltersConfig) -> list[RememberingFilter]:
    remembering: list[RememberingFilter] = []
    if config.exact:
        remembering.append(Exact(config.exact))
    if config.near:
        remembering.append(Near(config.near))
    if config.novelty:
        remembering.append(Novelty(config.novelty))
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
