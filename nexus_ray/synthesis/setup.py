"""From a config section to what a job is made of: prompts, the ledger's settings, and what becomes of an answer.

`JobSpec` is small and picklable, so that every worker makes parser, filters and validators for itself. Invariant: all
that decides a verdict is in `Job`, to which the ledger is bound: another filter, held-out document or judge is another
job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nexus_ray.config.filters import FiltersConfig
from nexus_ray.config.prompts import RecipeConfig
from nexus_ray.config.synthesis import SynthesisConfig
from nexus_ray.config.tree import RunConfig
from nexus_ray.config.validators import AgreementConfig
from nexus_ray.corpora.documents import DocumentManifest, iter_documents
from nexus_ray.corpora.parts import Manifest, read_rows
from nexus_ray.corpora.sources.synthesis import read_manifest
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.excerpts import DomainDocuments
from nexus_ray.synthesis.filters.chain import FilterChain, build_chain, combine, references, remembering_chain
from nexus_ray.synthesis.generators.build import generator_revision
from nexus_ray.synthesis.items import ItemParser
from nexus_ray.synthesis.plan import Job, load_plan
from nexus_ray.synthesis.prompts import PromptPlan, load_recipe
from nexus_ray.synthesis.references import reference_scorer, with_references
from nexus_ray.synthesis.rows import Answer, Request, Row, Sampling, Verdict
from nexus_ray.synthesis.validators.agreement import Settled, settle
from nexus_ray.synthesis.validators.protocol import Validator, build_validators, first_objection

Ask = Callable[[str], str]


@dataclass(frozen=True)
class Corpus:
    """Documents of a domain, and which of them are held out."""

    manifest: DocumentManifest
    held_out_fraction: float

    def texts(self, split: str) -> Iterator[tuple[str, str]]:
        """Id and text of the documents of a split, `train` or `held_out`."""
        for row in iter_documents(self.manifest, split=split, held_out_fraction=self.held_out_fraction):
            yield row["id"], row["text"]

    @property
    def fingerprint(self) -> str:
        return f"{self.manifest.fingerprint}-{self.held_out_fraction!r}"


@dataclass(frozen=True)
class JobSpec:
    """All that a worker needs to know of a job."""

    domain: str
    config: SynthesisConfig
    recipe: RecipeConfig
    storage: str
    """Where shared models lie."""
    ledger: Storage
    job: Job
    corpora: Mapping[str, Corpus]
    unseen: tuple[str, ...]
    """Domains whose held-out text must not occur in rows."""
    filters: FiltersConfig
    """Those of the config, with the files of quantiles that they need."""

    def prompts(self) -> PromptPlan:
        """The prompts of the recipe. Raises ConfigError if they cannot be made."""
        return _prompts(self.recipe, self.corpora)

    def requests(self) -> Iterator[Request]:
        """Every request in plan order: each prompt `num_candidates` times."""
        chosen = self.config.sampling
        sampling = Sampling(chosen.max_tokens, chosen.temperature, chosen.top_p, tuple(chosen.stop))
        for prompt in self.prompts().range():
            for index in range(self.config.num_candidates):
                yield Request(prompt, sampling, index)

    def chain(self) -> FilterChain:
        """The filters, with the held-out text they look for."""
        held_out = ((f"{name}/{id}", text) for name in self.unseen for id, text in self.corpora[name].texts("held_out"))
        return build_chain(self.filters, held_out=held_out, scorer=reference_scorer(self.filters))


def ledger_folder(config: RunConfig, domain: str) -> Storage:
    """Where the ledger of `synthesis.<domain>` lies."""
    return Storage(config.storage).child(config.name, "synthesis", domain)


def needed_domains(config: RunConfig, domain: str) -> tuple[str, ...]:
    """Domains whose documents a job reads: the recipe's, the anchor, and those with held-out text."""
    job = _section(config, domain)
    recipe = load_recipe(job.recipe)
    named = [recipe.documents.domain] if recipe.documents is not None else []
    if named and named[0] not in config.domains:
        raise ConfigError(
            f"synthesis.{domain}.recipe={job.recipe}: documents.domain={named[0]!r} is no domain of this config; "
            f"declare it under `domains`, or name one of {', '.join(config.domains)}"
        )
    return tuple(dict.fromkeys([*named, *([job.anchor] if job.anchor else []), *_unseen(config, domain)]))


def open_job(
    config: RunConfig,
    domain: str,
    documents: Mapping[str, DocumentManifest],
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> JobSpec:
    """A job of a resolved config; `documents` are those of `needed_domains`.

    Raises ConfigError if recipe, generator or documents cannot be used, SynthesisError or DataError for what it reads.
    """
    section = _section(config, domain)
    recipe = load_recipe(section.recipe)
    if section.prompts is not None:
        recipe = recipe.model_copy(update={"prompts": section.prompts})
    corpora = {name: Corpus(found, config.domains[name].held_out_fraction) for name, found in documents.items()}
    unseen = _unseen(config, domain)
    folder = ledger_folder(config, domain)
    against = _against(folder, section)
    revision = partial(generator_revision, storage=config.storage, gpu=bool(section.worker_gpus), progress=progress)
    filters = _filters(config, section, corpora)
    job = Job(
        domain,
        revision(section.generator),
        {"prompts": _prompts(recipe, corpora).fingerprint, "num_candidates": section.num_candidates},
        {
            "filters": section.filters.model_dump(mode="json"),
            "references": references(filters),
            "validators": [one.model_dump(mode="json") for one in section.validators],
            "judge": None if section.judge is None else revision(section.judge),
            "unseen": {name: corpora[name].fingerprint for name in unseen},
            "against": against,
        },
    )
    return JobSpec(domain, section, recipe, config.storage, folder, job, corpora, unseen, filters)


def _filters(config: RunConfig, section: SynthesisConfig, corpora: Mapping[str, Corpus]) -> FiltersConfig:
    corpus = corpora[section.anchor] if section.anchor is not None else None
    return with_references(
        section.filters,
        anchor=section.anchor,
        texts=(lambda: corpus.texts("train")) if corpus is not None else (lambda: ()),
        fingerprint=corpus.fingerprint if corpus is not None else "",
        shared=Storage(config.storage).child("_shared", "anchors"),
    )


def _section(config: RunConfig, domain: str) -> SynthesisConfig:
    if domain not in config.synthesis:
        known = ", ".join(config.synthesis) or "none"
        raise ConfigError(f"synthesis.{domain}: there is no such job; jobs of this config: {known}")
    return config.synthesis[domain]


def _unseen(config: RunConfig, domain: str) -> tuple[str, ...]:
    chosen = config.synthesis[domain].unseen
    if chosen is not None:
        return tuple(chosen)
    own = {name for name, one in config.domains.items() if one.source.kind == "synthesis"}
    return tuple(name for name in config.evaluated_domains if name != domain and name not in own)


def _prompts(recipe: RecipeConfig, corpora: Mapping[str, Corpus]) -> PromptPlan:
    if recipe.documents is None:
        return PromptPlan(recipe)
    corpus = corpora[recipe.documents.domain]
    return PromptPlan(recipe, DomainDocuments(corpus.manifest, held_out_fraction=corpus.held_out_fraction))


def _against(folder: Storage, section: SynthesisConfig) -> list[list[Any]]:
    """Which prefixes of earlier ledgers the rows are compared with: decided at the job's first start."""
    plan = load_plan(folder)
    known = {} if plan is None else {name: [entries, mark] for name, entries, mark in plan.job.filters["against"]}
    found = []
    for name in section.against:
        if name not in known:
            manifest = read_manifest(Storage(name), where="synthesis.against")
            known[name] = [len(manifest.entries), manifest.fingerprint]
        found.append([name, *known[name]])
    return found


# --- what becomes of an answer -----------------------------------------------------------------------------------


class AnswerJudge:
    """Parser, filters that need no memory, and validators: for workers, answer by answer."""

    def __init__(self, spec: JobSpec, ask: Ask | None = None) -> None:
        self._domain = spec.domain
        self._parser = ItemParser(spec.recipe.items)
        self._chain = spec.chain()
        self._validators: Sequence[Validator] = build_validators(spec.config.validators, ask=ask)

    def rows(self, request: Request, answer: Answer) -> list[tuple[Row, Verdict]]:
        """All rows of an answer, each with its verdict; one that cannot be taken apart is one rejected row."""
        parsed = self._parser.parse(request, answer, domain=self._domain)
        if parsed.verdict.outcome == "reject":
            return [(row, parsed.verdict) for row in parsed.rows]
        return [self._judged(self._chain.clean(row)) for row in parsed.rows]

    def _judged(self, row: Row) -> tuple[Row, Verdict]:
        verdict = self._chain.judge(row)
        if verdict.outcome != "reject" and self._validators:
            verdict = combine([verdict, first_objection(self._validators, row)])
        return row, verdict


class PlanOrder:
    """`Memory` of the committer: agreement of the answers to one prompt, and the filters that remember."""

    def __init__(self, spec: JobSpec) -> None:
        self._chain = remembering_chain(spec.config.filters)
        self._agreement = next((one for one in spec.config.validators if isinstance(one, AgreementConfig)), None)
        self._settled: Settled | None = None
        for row in earlier_rows(spec.job):
            self._chain.remember(row)

    def group(self, rows: Sequence[Row]) -> None:
        if self._agreement is not None:
            self._settled = settle(rows, self._agreement) if rows else None

    def judge(self, row: Row) -> Verdict:
        votes = [self._settled.validate(row)] if self._settled is not None else []
        if any(vote.outcome == "reject" for vote in votes):
            return combine(votes)
        return combine([*votes, self._chain.judge_in_order(row)])

    def remember(self, row: Row) -> None:
        self._chain.remember(row)


def earlier_rows(job: Job) -> Iterator[str]:
    """Texts of the earlier ledgers that a job is held against, as far as it reads them."""
    for name, entries, fingerprint in job.filters["against"]:
        folder = Storage(name)
        prefix: Manifest = read_manifest(folder, where="synthesis.against").prefix(entries, fingerprint)
        for part in prefix.files("accepted"):
            for row in read_rows(folder, part):
                yield row.text
