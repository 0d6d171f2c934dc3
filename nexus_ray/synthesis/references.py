"""What verdicts refer to besides settings: quantiles of real text, and the content of files and models.

Quantiles for the filters of likelihood are frozen once from a job's anchor domain, and shared by all jobs.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from nexus_ray.config.filters import FiltersConfig, PerplexityFilter
from nexus_ray.config.validators import JudgeConfig, ValidatorConfig
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.filters.anchor import Anchor, Measure, frozen
from nexus_ray.synthesis.filters.chain import references
from nexus_ray.synthesis.filters.likelihood import Scorer, freeze_perplexity, freeze_prior
from nexus_ray.synthesis.rows import content_id
from nexus_ray.synthesis.validators.judge import load_measure
from nexus_ray.synthesis.validators.rubric import golden_fingerprint, rubric_fingerprint

PRIOR_DOCUMENTS = 20_000
PERPLEXITY_DOCUMENTS = 400
"""Documents of the anchor that are measured: those with the smallest ids, which are hashes of the text."""
Texts = Callable[[], Iterable[tuple[str, str]]]
_PLACES: dict[str, Any] = {
    "safety": {"classifier": {"model", "revision"}},
    "prior": {"reference"},
    "perplexity": {"reference", "model", "revision"},
    "contamination": {"benchmarks": {"__all__": {"paths"}}},
}
"""Settings of filters that say where something lies; what lies there counts."""


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


def verdict_settings(filters: FiltersConfig, validators: Sequence[ValidatorConfig]) -> dict[str, Any]:
    """All of filters and validators that decides a verdict, for a ledger to be bound to.

    Files and models count by what they hold, not by their names: another rubric under the old name is another job,
    and the same one in a moved folder, or in the copy that a submitted job works in, is not. `filters` are those of
    `with_references`. Raises ConfigError or DataError if something that is named cannot be read.
    """
    return {
        "filters": filters.model_dump(mode="json", exclude=_PLACES),
        "references": {**references(filters), **_model_content(filters), **_judge_content(validators)},
        "validators": [_without_places(one) for one in validators],
    }


def _without_places(validator: ValidatorConfig) -> dict[str, Any]:
    exclude = {"rubric", "golden"} if isinstance(validator, JudgeConfig) else None
    return validator.model_dump(mode="json", exclude=exclude)


def _model_content(filters: FiltersConfig) -> dict[str, str]:
    """Of the reference model, where no file of quantiles stands for it."""
    if filters.perplexity is None or filters.perplexity.reference is not None:
        return {}
    scorer = reference_scorer(filters)
    return {} if scorer is None else {"perplexity.model": content_id("scorer", [scorer.fingerprint, scorer.tokenizer])}


def _judge_content(validators: Sequence[ValidatorConfig]) -> dict[str, str]:
    found: dict[str, str] = {}
    for place, one in enumerate(validators):
        if isinstance(one, JudgeConfig):
            rubric, golden = load_measure(one)
            found[f"validators.{place}.rubric"] = rubric_fingerprint(rubric)
            found[f"validators.{place}.golden"] = golden_fingerprint(golden)
    return found


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
