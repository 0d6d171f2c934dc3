"""From a config section to what a job is made of: prompts, the ledger's settings, and what becomes of an answer.

`JobSpec` is small and picklable, so that every worker makes parser, filters and validators for itself. Invariant: all
that decides a verdict is in `Job`, to which the ledger is bound, files and models by their content: another filter,
held-out document, rubric or judge is another job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from nexus_ray.config.filters import ContaminationFilter, FiltersConfig
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
from nexus_ray.synthesis.filters.benchmarks import benchmark_items
from nexus_ray.synthesis.filters.chain import FilterChain, build_chain, combine, remembering_chain
from nexus_ray.synthesis.filters.contamination import overlap_table
from nexus_ray.synthesis.filters.exact import digest
from nexus_ray.synthesis.filters.safety import Classifier
from nexus_ray.synthesis.generators.build import generator_revision
from nexus_ray.synthesis.items import ItemParser
from nexus_ray.synthesis.plan import Job, load_plan
from nexus_ray.synthesis.prompts import PromptPlan, load_recipe
from nexus_ray.synthesis.references import reference_scorer, verdict_settings, with_references
from nexus_ray.synthesis.rows import Answer, Prompt, Request, Row, Sampling, Verdict
from nexus_ray.synthesis.validators.agreement import Settled, settle
from nexus_ray.synthesis.validators.calibration import Record
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

    def held_out(self) -> Iterator[tuple[str, str]]:
        """Name and text of the held-out documents that rows must not hold."""
        return ((f"{name}/{id}", text) for name in self.unseen for id, text in self.corpora[name].texts("held_out"))

    def chain(self) -> FilterChain:
        """The filters, with the held-out text they look for and the models they ask."""
        return build_chain(
            self.filters,
            held_out=self.held_out(),
            classifier=_classifier(self.filters),
            scorer=reference_scorer(self.filters),
        )

    def overlap(self, rows: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
        """How much of what must stay unseen the rows (id, text) hold; measured also where the filter is off."""
        config = self.filters.contamination or ContaminationFilter()
        return overlap_table(chain(self.held_out(), benchmark_items(config.benchmarks)), rows, config)


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
        {
            "prompts": _prompts(recipe, corpora).fingerprint,
            "num_candidates": section.num_candidates,
            "documents": recipe.documents.domain if recipe.documents is not None else None,
        },
        {
            **verdict_settings(filters, section.validators),
            "judge": None if section.judge is None else revision(section.judge),
            "unseen": {name: corpora[name].fingerprint for name in unseen},
            "against": against,
        },
    )
    return JobSpec(domain, section, recipe, config.storage, folder, job, corpora, unseen, filters)


def _classifier(filters: FiltersConfig) -> Classifier | None:
    if filters.safety is None or filters.safety.classifier is None:
        return None
    from nexus_ray.synthesis.filters.safety_model import load_classifier

    return load_classifier(filters.safety.classifier)


def _on_cpu(spec: JobSpec) -> JobSpec:
    """The job for a process that may have no GPU: the driver's, which judges the few texts that people write."""
    safety = spec.filters.safety
    if safety is None or safety.classifier is None:
        return spec
    classifier = safety.classifier.model_copy(update={"device": "cpu"})
    filters = spec.filters.model_copy(update={"safety": safety.model_copy(update={"classifier": classifier})})
    return replace(spec, filters=filters)


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
        record = Record(spec.ledger, spec.job.filters["judge"]) if spec.config.judge is not None else None
        self._validators: Sequence[Validator] = build_validators(spec.config.validators, ask=ask, record=record)

    def rows(self, request: Request, answer: Answer) -> list[tuple[Row, Verdict]]:
        """All rows of an answer, each with its verdict; one that cannot be taken apart is one rejected row."""
        parsed = self._parser.parse(request, answer, domain=self._domain)
        if parsed.verdict.outcome == "reject":
            return [(row, parsed.verdict) for row in parsed.rows]
        rows = [self._chain.clean(row) for row in parsed.rows]
        return list(map(self._validated, rows, self._chain.judge_many(rows)))

    def _validated(self, row: Row, verdict: Verdict) -> tuple[Row, Verdict]:
        if verdict.outcome != "reject" and self._validators:
            verdict = combine([verdict, first_objection(self._validators, row)])
        return row, verdict


class PlanOrder:
    """`Memory` of the committer: agreement of the answers to one prompt, and the filters that remember.

    Novelty's pool grows with the prompts: a row is held against what its own and earlier prompts showed, so that its
    verdict does not change with a plan that is extended later.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._chain = remembering_chain(spec.config.filters)
        self._stateless: FilterChain | None = None
        self._prompts: Iterator[tuple[Prompt, tuple[str, ...]]] = iter(())
        if spec.config.filters.novelty is not None:
            self._prompts = spec.prompts().shown()
        self._reached: Prompt | None = None
        self._shown: set[bytes] = set()
        self._agreement = next((one for one in spec.config.validators if isinstance(one, AgreementConfig)), None)
        self._settled: Settled | None = None
        for row in earlier_rows(spec.job):
            self._chain.remember(row)

    def group(self, rows: Sequence[Row]) -> None:
        if self._agreement is not None:
            self._settled = settle(rows, self._agreement) if rows else None

    def judge(self, row: Row) -> Verdict:
        self._reach(row.prompt)
        votes = [self._settled.validate(row)] if self._settled is not None else []
        if any(vote.outcome == "reject" for vote in votes):
            return combine(votes)
        return combine([*votes, self._chain.judge_in_order(row)])

    def remember(self, row: Row) -> None:
        self._reach(row.prompt)
        self._chain.remember(row)

    def judge_edit(self, row: Row, flagged: str) -> tuple[Row, Verdict]:
        """The row that a person wrote in place of the text `flagged`, which must not count as its duplicate."""
        if self._stateless is None:
            self._stateless = _on_cpu(self._spec).chain()  # held-out text and models: only if someone edits
        clean = self._stateless.clean(row)
        verdict = self._stateless.judge(clean)
        if digest(clean.text) != digest(flagged):
            verdict = combine([verdict, self._chain.judge_exact(clean)])
        return clean, verdict

    def _reach(self, prompt: Prompt) -> None:
        """Show the chain what the prompts up to this one show. Rows come in the order of their prompts."""
        if prompt == self._reached:
            return
        for one, texts in self._prompts:
            for text in texts:
                if (key := digest(text)) not in self._shown:
                    self._shown.add(key)
                    self._chain.show(text)
            if one == prompt:
                break
        self._reached = prompt


def earlier_rows(job: Job) -> Iterator[str]:
    """Texts of the earlier ledgers that a job is held against, as far as it reads them."""
    for name, entries, fingerprint in job.filters["against"]:
        folder = Storage(name)
        prefix: Manifest = read_manifest(folder, where="synthesis.against").prefix(entries, fingerprint)
        for part in prefix.files("accepted"):
            for row in read_rows(folder, part):
                yield row.text
