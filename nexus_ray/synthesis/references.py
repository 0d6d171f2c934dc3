"""Quantiles of real text for a job's filters of likelihood: frozen once from its anchor domain, shared by all jobs."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from nexus_ray.config.filters import FiltersConfig, PerplexityFilter
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.filters.anchor import Anchor, Measure, frozen
from nexus_ray.synthesis.filters.likelihood import Scorer, freeze_perplexity, freeze_prior
from nexus_ray.synthesis.rows import content_id

PRIOR_DOCUMENTS = 20_000
PERPLEXITY_DOCUMENTS = 400
"""Documents of the anchor that are measured: those with the smallest ids, which are hashes of the text."""
Texts = Callable[[], Iterable[tuple[str, str]]]


def with_references(
    filters: FiltersConfig, *, anchor: str | None, texts: Texts, fingerprint: str, shared: Storage
) -> FiltersConfig:
    """The filters with a file of quantiles wherever one is needed and none is named, made on first use.

    `texts`: id and text of the anchor domain's training documents; `fingerprint`: theirs; `shared`: where files lie.
    Raises ConfigError if there is no anchor, or the reference model cannot be read.
    """
    changes: dict[str, Any] = {}
    if filters.prior is not None and filters.prior.reference is None:
        name = _file("prior", anchor, [fingerprint, PRIOR_DOCUMENTS, filters.prior.min_words])
        make = partial(_prior, str(anchor), texts, filters.prior.min_words)
        changes["prior"] = filters.prior.model_copy(update={"reference": _frozen(shared, name, "prior", make)})
    perplexity = filters.perplexity
    if perplexity is not None and perplexity.reference is None and _needs_quantiles(perplexity):
        scorer = reference_scorer(filters)
        if scorer is None:
            raise ConfigError("filters.perplexity.model is missing; name the reference model, or turn the filter off")
        name = _file(
            "perplexity", anchor, [fingerprint, PERPLEXITY_DOCUMENTS, perplexity.min_words, scorer.fingerprint]
        )
        measured = partial(_perplexity, str(anchor), texts, perplexity.min_words, scorer)
        reference = _frozen(shared, name, "perplexity", measured)
        changes["perplexity"] = perplexity.model_copy(update={"reference": reference})
    return filters.model_copy(update=changes) if changes else filters


def reference_scorer(filters: FiltersConfig) -> Scorer | None:
    """The reference model, if perplexity is looked at and a model is named."""
    if filters.perplexity is None or filters.perplexity.model is None:
        return None
    from nexus_ray.synthesis.scorer import model_scorer

    return model_scorer(filters.perplexity)


def _needs_quantiles(config: PerplexityFilter) -> bool:
    return config.min_perplexity is None and config.max_perplexity is None


def _file(measure: str, anchor: str | None, parts: list[Any]) -> str:
    if anchor is None:
        raise ConfigError(
            f"filters.{measure} is held against real text, and no domain of it is named; set `anchor` of the job, or "
            f"filters.{measure}.reference to a file of quantiles"
        )
    return f"{measure}-{anchor}-{content_id('anchor', parts)[:12]}.json"


def _frozen(shared: Storage, name: str, measure: Measure, make: Callable[[], Anchor]) -> str:
    frozen(shared, name, measure=measure, make=make)
    return shared.child(name).uri


def _prior(anchor: str, texts: Texts, min_words: int) -> Anchor:
    return freeze_prior(_chosen(anchor, texts, PRIOR_DOCUMENTS), min_words=min_words)


def _perplexity(anchor: str, texts: Texts, min_words: int, scorer: Scorer) -> Anchor:
    return freeze_perplexity(_chosen(anchor, texts, PERPLEXITY_DOCUMENTS), scorer, min_words=min_words)


def _chosen(anchor: str, texts: Texts, most: int) -> list[tuple[str, str]]:
    return [(anchor, text) for _, text in heapq.nsmallest(most, texts())]
