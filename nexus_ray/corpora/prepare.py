"""Everything a run reads, ready: documents, tokenizer and token shards of its domains, built once and found again.

Invariant: an artefact exists exactly if its manifest does, and it is built under a lock, so that several runs may
prepare at once.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nexus_ray.config.tree import RunConfig
from nexus_ray.corpora.build import Found, build_documents, find_documents, settings_hash
from nexus_ray.corpora.chat_template import DROPPED, TOO_LONG, template_fingerprint
from nexus_ray.corpora.documents import DocumentManifest, load_index
from nexus_ray.corpora.manifest import MANIFEST_FILE, SPLITS, TokenManifest, load_manifest, save_manifest
from nexus_ray.corpora.sources import CorpusSource, open_source
from nexus_ray.corpora.tasks import run_tasks
from nexus_ray.corpora.tokenizer import (
    TokenizerManifest,
    TrainingPart,
    build_tokenizer,
    chosen_template,
    find_tokenizer,
    pretrained_name,
    trained_domains,
)
from nexus_ray.corpora.tokenizer import folder_name as tokenizer_folder_name
from nexus_ray.corpora.tokens import ChatLayout, WrittenShard, base_fingerprint, plan_shards, write_shard
from nexus_ray.corpora.tokens import folder_name as tokens_folder_name
from nexus_ray.corpora.verify import check_tokenizer, usable
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.storage import Storage

Progress = Callable[[str], None]
LOCK_TIMEOUT_S = 6 * 3600.0


@dataclass(frozen=True)
class PreparedDomain:
    """One domain, ready to be read."""

    name: str
    documents: Storage
    train: TokenManifest
    held_out: TokenManifest
    license: str | None
    attribution: str | None
    source: str
    """For people: where the text comes from."""
    stats: dict[str, float] = field(default_factory=dict)
    """Counts of documents and tokens, and of everything that was left out; of a chat domain also of its padding, and
    `packing_efficiency`, the share of places in rows that hold a token."""
    manifest: DocumentManifest | None = None


@dataclass(frozen=True)
class Made:
    """What a call of `prepare` had to do itself; zeros where it found everything."""

    documents: int = 0
    """Texts read from sources and kept."""
    tokens: int = 0
    """Tokens encoded into shards, padding included."""


@dataclass(frozen=True)
class PreparedData:
    """All that a run reads."""

    tokenizer: Storage
    """Folder that `AutoTokenizer.from_pretrained` loads, if it is local; else see `tokenizer_dir`."""
    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int
    domains: dict[str, PreparedDomain]
    tokenizer_source: str = ""
    made: Made = field(default=Made(), compare=False)

    def tokenizer_dir(self) -> Path:
        """The tokenizer as a folder of this machine; downloaded first if the storage is remote."""
        if self.tokenizer.is_local:
            return self.tokenizer.local_path
        cache = Path(tempfile.gettempdir()) / "nexus-ray" / f"{self.tokenizer.name}-{self.tokenizer_fingerprint}"
        if not (cache / MANIFEST_FILE).exists():
            cache.mkdir(parents=True, exist_ok=True)
            names = [name for name in self.tokenizer.list() if name != MANIFEST_FILE]
            for name in [*names, MANIFEST_FILE]:
                Storage(str(cache)).write_bytes(self.tokenizer.read_bytes(name), name)
        return cache


def shared_storage(config: RunConfig) -> Storage:
    """Where artefacts lie that runs share."""
    return Storage(config.storage).child("_shared")


def used_domains(config: RunConfig) -> tuple[str, ...]:
    """Domains of stages, replay, anchors and of the tokenizer's training. Raises ConfigError if one is not defined."""
    names = tuple(dict.fromkeys((*config.evaluated_domains, *trained_domains(config))))
    for name in names:
        if name not in config.domains:
            known = ", ".join(config.domains)
            raise ConfigError(f"domain {name!r} is used but not defined; add domains.{name}, or use one of {known}")
    return names


def find_prepared(config: RunConfig) -> PreparedData | None:
    """What `prepare` would return, if all of it exists; else None. Needs no Ray and builds nothing."""
    shared = shared_storage(config)
    documents: dict[str, DocumentManifest] = {}
    for name in used_domains(config):
        found = find_documents(open_source(name, config.domains[name], shared), shared.child("documents"))
        if not found.complete or found.manifest is None:
            return None
        documents[name] = found.manifest
    folder = _tokenizer_folder(config, shared, documents)
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        return None
    layouts = _layouts(config, folder, documents)
    drafts = {name: _token_drafts(config, shared, documents[name], tokenizer, layouts[name]) for name in documents}
    if any(draft.batches < len(documents[name].batches) for name in drafts for draft in drafts[name].values()):
        return None
    return _prepared(config, folder, tokenizer, documents, drafts)


def prepare(config: RunConfig, *, progress: Progress = lambda message: None) -> PreparedData:
    """Build what is missing. The caller has started Ray, which is needed only if something is.

    Raises ConfigError or DataError naming the domain, the field and the way out.
    """
    if (ready := find_prepared(config)) is not None:
        return ready
    shared = shared_storage(config)
    Storage(config.storage).check_writable()
    documents, read = _build_documents(config, shared, progress, used_domains(config))
    _check_splits(config, documents)
    for (held_out, trained), count in shared_texts(config, documents).items():
        progress(
            f"warning: {count} texts held out of {held_out} are trained on in {trained}; give both domains the same "
            f"held_out_fraction to keep them apart"
        )
    folder, tokenizer = _build_tokenizer(config, shared, documents, progress)
    drafts, encoded = _build_tokens(config, shared, documents, folder, tokenizer, progress)
    return replace(_prepared(config, folder, tokenizer, documents, drafts), made=Made(read, encoded))


def check_prepared(data: PreparedData, on_corrupt: str, *, progress: Progress = lambda message: None) -> PreparedData:
    """What of it can be read: `data.on_corrupt: stop` refuses a corrupt shard, `quarantine` sets it aside and says so.

    Raises DataError naming the file, or the domain whose shards belong to another tokenizer.
    """
    domains = {}
    for name, domain in data.domains.items():
        for manifest in (domain.train, domain.held_out):
            check_tokenizer(manifest, data.tokenizer_fingerprint)
        train, held_out = usable(domain.train, on_corrupt), usable(domain.held_out, on_corrupt)
        for manifest in (train, held_out):
            if bad := manifest.quarantined:
                left, split = len(manifest.shards), manifest.split
                progress(
                    f"warning: {name}: {len(bad)} corrupt {split} shards set aside ({', '.join(bad)}), {left} left"
                )
        domains[name] = replace(domain, train=train, held_out=held_out)
    return replace(data, domains=domains)


# --- documents ---------------------------------------------------------------------------------------------------


def prepare_documents(
    config: RunConfig, names: Sequence[str], *, progress: Progress = lambda message: None
) -> dict[str, DocumentManifest]:
    """Documents of some domains, built where they are missing (which needs Ray). Raises ConfigError or DataError."""
    return _build_documents(config, shared_storage(config), progress, names)[0]


def _build_documents(
    config: RunConfig, shared: Storage, progress: Progress, names: Sequence[str]
) -> tuple[dict[str, DocumentManifest], int]:
    """The documents of each domain, and how many were read for it."""
    sources: list[CorpusSource] = [open_source(name, config.domains[name], shared) for name in names]
    root = shared.child("documents")
    with _locks(shared, [f"documents-{source.domain}-{settings_hash(source)}" for source in sources]):
        found: list[Found] = [find_documents(source, root) for source in sources]
        manifests = build_documents(sources, root, found, progress=progress)
    known = sum(have.manifest.stats["documents"] for have in found if have.manifest is not None)
    return dict(zip(names, manifests, strict=True)), sum(each.stats["documents"] for each in manifests) - known


def _check_splits(config: RunConfig, documents: dict[str, DocumentManifest]) -> None:
    """Raise DataError if a domain would have nothing to train or to be measured on."""
    trained = {*trained_domains(config)}
    for stage in config.stages:
        trained.update(stage.domains, stage.replay or ())
    for name, manifest in documents.items():
        fraction = config.domains[name].held_out_fraction
        held_out = load_index(manifest).held_out(fraction)
        if name in config.evaluated_domains and not held_out.any():
            raise DataError(
                f"domains.{name}.held_out_fraction={fraction} holds out none of its {len(held_out)} documents; raise "
                f"it, bring more documents, or cut them smaller (split_on)"
            )
        if name in trained and held_out.all():
            raise DataError(
                f"domains.{name}.held_out_fraction={fraction} leaves none of its {len(held_out)} documents for "
                f"training; lower it, bring more documents, or cut them smaller (split_on)"
            )


def shared_texts(config: RunConfig, documents: dict[str, DocumentManifest]) -> dict[tuple[str, str], int]:
    """Texts held out in one domain and trained on in another: {(held-out domain, training domain): count}.

    The split depends on the text alone, so there are none between domains of equal `held_out_fraction`.
    """
    fraction = {name: config.domains[name].held_out_fraction for name in documents}
    if len(set(fraction.values())) == 1:
        return {}
    index = {name: load_index(manifest) for name, manifest in documents.items()}
    found = {}
    for a, b in itertools.permutations(index, 2):
        held_out, trained = index[a].held_out(fraction[a]), ~index[b].held_out(fraction[b])
        if count := len(np.intersect1d(index[a].ids[held_out], index[b].ids[trained])):
            found[a, b] = count
    return found


# --- tokenizer -----------------------------------------------------------------------------------------------------


def _training_parts(config: RunConfig, documents: dict[str, DocumentManifest]) -> list[TrainingPart]:
    return [
        TrainingPart(documents[name], config.domains[name].held_out_fraction, config.domains[name].format == "chat")
        for name in trained_domains(config)
    ]


def _template(config: RunConfig) -> str | None:
    chat = any(config.domains[name].format == "chat" for name in used_domains(config))
    return chosen_template(config.model.tokenizer, chat=chat)


def _tokenizer_folder(config: RunConfig, shared: Storage, documents: dict[str, DocumentManifest]) -> Storage:
    name = tokenizer_folder_name(config.model, _training_parts(config, documents), template=_template(config))
    return shared.child("tokenizers", name)


def _build_tokenizer(
    config: RunConfig, shared: Storage, documents: dict[str, DocumentManifest], progress: Progress
) -> tuple[Storage, TokenizerManifest]:
    folder = _tokenizer_folder(config, shared, documents)
    with _locks(shared, [f"tokenizers-{folder.name}"]):
        manifest = find_tokenizer(folder)
        if manifest is None:
            parts = _training_parts(config, documents)
            manifest = build_tokenizer(config.model, parts, folder, progress=progress, template=_template(config))
    return folder, manifest


# --- tokens ----------------------------------------------------------------------------------------------------------


def _layouts(config: RunConfig, tokenizer: Storage, names: Iterable[str]) -> dict[str, ChatLayout | None]:
    """How the conversations of each domain become rows; None for text. Raises ConfigError without a chat template."""
    chat = [name for name in names if config.domains[name].format == "chat"]
    if not chat:
        return dict.fromkeys(names)
    template = template_fingerprint(tokenizer)
    if template is None:
        raise ConfigError(
            f"model.tokenizer.chat_template: {pretrained_name(config.model)} has no chat template, which "
            f"domains.{chat[0]}.format='chat' needs; set it to `default`, or to a file with a Jinja template"
        )
    layout = ChatLayout(template, config.training.seq_len)
    return {name: layout if name in chat else None for name in names}


def _tokens_folder(
    config: RunConfig, shared: Storage, documents: DocumentManifest, tokenizer: str, layout: ChatLayout | None
) -> Storage:
    fraction = config.domains[documents.domain].held_out_fraction
    name = tokens_folder_name(documents, tokenizer, fraction, config.data.shard_tokens, layout)
    return shared.child("tokens", name)


def _token_drafts(
    config: RunConfig,
    shared: Storage,
    documents: DocumentManifest,
    tokenizer: TokenizerManifest,
    layout: ChatLayout | None,
) -> dict[str, TokenManifest]:
    """Manifest of each split as far as it exists, cut to the batches of `documents`; an empty one to start from."""
    folder = _tokens_folder(config, shared, documents, tokenizer.fingerprint, layout)
    fraction = config.domains[documents.domain].held_out_fraction
    drafts = {}
    for split in SPLITS:
        if folder.exists(split, MANIFEST_FILE):
            drafts[split] = load_manifest(folder.child(split)).batch_prefix(len(documents.batches))
            continue
        drafts[split] = TokenManifest(
            domain=documents.domain,
            split=split,
            root=folder.uri,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            shards=(),
            base=base_fingerprint(split, tokenizer.fingerprint, fraction, layout),
            batches=0,
            seq_len=None if layout is None else layout.seq_len,
        )
    return drafts


def _build_tokens(
    config: RunConfig,
    shared: Storage,
    documents: dict[str, DocumentManifest],
    folder: Storage,
    tokenizer: TokenizerManifest,
    progress: Progress,
) -> tuple[dict[str, dict[str, TokenManifest]], int]:
    """The manifests of each domain and split, and how many tokens were encoded for them."""
    layouts = _layouts(config, folder, documents)
    names = [
        _tokens_folder(config, shared, manifest, tokenizer.fingerprint, layouts[name]).name
        for name, manifest in documents.items()
    ]
    with _locks(shared, [f"tokens-{name}" for name in names]):
        drafts = {name: _token_drafts(config, shared, documents[name], tokenizer, layouts[name]) for name in documents}
        missing = [
            draft
            for name in documents
            for draft in drafts[name].values()
            if draft.batches < len(documents[name].batches)
        ]
        plans = [
            plan_shards(
                documents[draft.domain],
                draft,
                held_out_fraction=config.domains[draft.domain].held_out_fraction,
                shard_tokens=config.data.shard_tokens,
                tokenizer=folder,
                layout=layouts[draft.domain],
            )
            for draft in missing
        ]
        if missing:
            progress(f"tokens: encoding {', '.join(dict.fromkeys(draft.domain for draft in missing))}")
        specs = [spec for plan in plans for spec in plan]
        written = run_tasks(write_shard, specs, cost=lambda spec: spec.text_bytes, progress=progress, label="tokens")
        made = iter(written)
        parts = [[next(made) for _ in plan] for plan in plans]
        for name, layout in layouts.items():
            if layout is not None:
                pairs = zip(missing, parts, strict=True)
                mine = [item for draft, part in pairs if draft.domain == name for item in part]
                _check_dropped(name, layout, mine, progress)
        for draft, own in zip(missing, parts, strict=True):
            stats = {
                "tokens_dropped": sum(item.tokens_dropped for item in own),
                "eos_in_text": sum(item.eos_in_text for item in own),
                **{key: sum(item.dropped[key] for item in own) for key in DROPPED if layouts[draft.domain]},
            }
            batches = len(documents[draft.domain].batches)
            manifest = draft.extended([item.shard for item in own], batches=batches, stats=stats)
            save_manifest(manifest)
            drafts[draft.domain][draft.split] = manifest
    return drafts, sum(item.shard.tokens for own in parts for item in own)


def _check_dropped(domain: str, layout: ChatLayout, written: list[WrittenShard], progress: Progress) -> None:
    """Say which conversations were left out. Raises DataError if that is more than half of them."""
    counts = {key: sum(item.dropped[key] for item in written) for key in DROPPED}
    dropped, kept = sum(counts.values()), sum(item.shard.documents for item in written)
    if not dropped:
        return
    too_long, refused = counts[TOO_LONG], dropped - counts[TOO_LONG]
    reasons = []
    if too_long:
        longest = max(item.longest for item in written)
        reasons.append(f"{too_long} longer than training.seq_len={layout.seq_len} (the longest has {longest} tokens)")
    if refused:
        first = next(item.refused for item in written if item.refused)
        reasons.append(f"{refused} not fit for the chat template (the first, {first})")
    found = f"domains.{domain}: {dropped} of {dropped + kept} conversations left out: {' and '.join(reasons)}"
    if dropped > kept:
        way = "raise training.seq_len" if too_long >= refused else "choose another model.tokenizer.chat_template"
        raise DataError(f"{found}; {way}, or mend the records")
    progress(f"warning: {found}")


# --- the result ----------------------------------------------------------------------------------------------------


def _prepared(
    config: RunConfig,
    folder: Storage,
    tokenizer: TokenizerManifest,
    documents: dict[str, DocumentManifest],
    drafts: dict[str, dict[str, TokenManifest]],
) -> PreparedData:
    domains = {}
    for name, manifest in documents.items():
        source = config.domains[name].source
        train, held_out = drafts[name]["train"], drafts[name]["held_out"]
        keys = ("tokens_dropped", "eos_in_text", *(DROPPED if train.seq_len is not None else ()))
        tokens: dict[str, float] = {key: train.stats.get(key, 0) + held_out.stats.get(key, 0) for key in keys}
        if train.seq_len is not None:
            tokens |= {"answer_tokens": train.targets, "padding_tokens": train.padding}
            tokens["packing_efficiency"] = round(train.packing_efficiency, 4)
        domains[name] = PreparedDomain(
            name=name,
            documents=manifest.folder,
            train=train,
            held_out=held_out,
            license=source.license or manifest.license,
            attribution=source.attribution or manifest.attribution,
            source=manifest.label,
            stats={**manifest.stats, **tokens},
            manifest=manifest,
        )
    return PreparedData(
        tokenizer=folder,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        domains=domains,
        tokenizer_source=tokenizer.source,
    )


@contextlib.contextmanager
def _locks(shared: Storage, names: Sequence[str]) -> Iterator[None]:
    """Several locks at once, always in the same order, so that two builders cannot wait for each other."""
    with contextlib.ExitStack() as stack:
        for name in sorted(set(names)):
            stack.enter_context(shared.lock(f"locks/{name}", LOCK_TIMEOUT_S))
        yield
