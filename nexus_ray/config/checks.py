"""Rules between fields of a config: names that must exist, settings that exclude each other, stage overrides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nexus_ray.config.control_checks import control_can_work, control_has_work
from nexus_ray.config.faults import Check, Fault
from nexus_ray.config.paths import choice, nearest_path, setting_paths
from nexus_ray.config.tree import FIXED_ACROSS_STAGES, OVERRIDABLE, RunConfig, StdlibSource, SynthesisSource


def _domains_exist(config: RunConfig) -> Iterator[Fault]:
    used = [(f"anchors.{i}", name) for i, name in enumerate(config.anchors)]
    for i, stage in enumerate(config.stages):
        used += [(f"stages.{i}.domains.{name}", name) for name in stage.domains]
        used += [(f"stages.{i}.replay.{name}", name) for name in stage.replay or {}]
    used += [(f"model.tokenizer.train_on.{i}", name) for i, name in enumerate(config.model.tokenizer.train_on)]
    used += [(f"report.prompts.{name}", name) for name in config.report.prompts]
    for path, name in used:
        if name not in config.domains:
            known = choice(name, config.domains, what="declared are")
            yield Fault(path, f": no domain {name!r} is declared under `domains`; {known}")


def _stage_names_differ(config: RunConfig) -> Iterator[Fault]:
    first: dict[str, int] = {}
    for i, stage in enumerate(config.stages):
        if stage.name in first:
            yield Fault(
                f"stages.{i}.name", f"={stage.name!r} is also the name of stage {first[stage.name]}; rename one"
            )
        first.setdefault(stage.name, i)


def _anchors_untrained(config: RunConfig) -> Iterator[Fault]:
    for i, anchor in enumerate(config.anchors):
        if anchor in config.anchors[:i]:
            yield Fault(f"anchors.{i}", f"={anchor!r} stands twice; drop one")
        for k, stage in enumerate(config.stages):
            if anchor in stage.domains or anchor in (stage.replay or {}):
                yield Fault(
                    f"anchors.{i}",
                    f"={anchor!r} is trained on in stage {k} ({stage.name!r}); an anchor is only evaluated: "
                    "drop it here or there (every trained domain is evaluated anyway)",
                )
                break


def _new_is_not_replayed(config: RunConfig) -> Iterator[Fault]:
    for i, stage in enumerate(config.stages):
        for name in stage.replay or {}:
            if name in stage.domains:
                yield Fault(
                    f"stages.{i}.replay.{name}", " is also a new domain of this stage; name it in one of the two"
                )


def _kind_fits_domains(config: RunConfig) -> Iterator[Fault]:
    """Fine-tuning learns answers of conversations, pre-training learns text; replay may be of either format."""
    for i, stage in enumerate(config.stages):
        wanted = "chat" if stage.kind == "sft" else "text"
        for name in stage.domains:
            domain = config.domains.get(name)
            if domain is not None and domain.format != wanted:
                other = "kind: cpt" if stage.kind == "sft" else "kind: sft"
                yield Fault(
                    f"stages.{i}.kind",
                    f"={stage.kind!r} learns domains of format {wanted!r}, and domains.{name}.format is "
                    f"{domain.format!r}; set {other} here, or format: {wanted} there (replay may be of either format)",
                    related=(f"domains.{name}.format",),
                )


def _chat_sources_fit(config: RunConfig) -> Iterator[Fault]:
    """A chat domain reads records; what only concerns texts, or only conversations, has no place on the other."""
    for name, domain in config.domains.items():
        source, path = domain.source, f"domains.{name}"
        if domain.format == "text":
            if domain.chat is not None:
                yield Fault(f"{path}.chat", f" is used only by format: chat, and {path}.format is 'text'; drop one")
            continue
        if isinstance(source, StdlibSource | SynthesisSource):
            yield Fault(
                f"{path}.format",
                f"='chat' needs records, and source.kind: {source.kind} has none; use a files, hub or wheel source",
                related=(f"{path}.source",),
            )
            continue
        if source.split_on is not None:
            yield Fault(f"{path}.source.split_on", f"={source.split_on!r}: a conversation is never cut; drop it")
        if source.text_field != "text":
            yield Fault(
                f"{path}.source.text_field",
                f"={source.text_field!r} is not read by format: chat; name the fields of a conversation in {path}.chat",
            )
        if source.kind != "hub" and source.format == "text":
            yield Fault(f"{path}.source.format", "='text' holds no conversations; use jsonl, json or parquet (or auto)")
        chat = domain.chat
        if chat is not None and chat.layout == "pair" and chat.turns_field is not None:
            yield Fault(
                f"{path}.chat.turns_field",
                f"={chat.turns_field!r} is not read by layout: pair; drop it, or use layout: messages or sharegpt",
            )


def _evaluated_have_held_out(config: RunConfig) -> Iterator[Fault]:
    for name in config.evaluated_domains:
        domain = config.domains.get(name)
        if domain is not None and domain.held_out_fraction == 0:
            yield Fault(
                f"domains.{name}.held_out_fraction",
                "=0 leaves nothing to evaluate on, and this domain is evaluated; set it above 0, such as 0.05",
            )


def _overrides_fit(config: RunConfig) -> Iterator[Fault]:
    for i, stage in enumerate(config.stages):
        for path, value in stage.override.items():
            problem = override_problem(path)
            if problem:
                yield Fault(f"stages.{i}.override.{path}", f"={value!r}: {problem}")


def override_problem(path: str) -> str | None:
    """Why a stage cannot override the setting at `path`; None if it can."""
    known = [p for p in setting_paths() if p.startswith(OVERRIDABLE) and p not in FIXED_ACROSS_STAGES]
    if path in known:
        return None
    if path in FIXED_ACROSS_STAGES:
        return f"must be the same in all stages; set {path} for the whole run"
    inside = [p for p in known if p.startswith(path + ".")]
    if inside:
        return f"is a section; name a value inside it by its whole path, such as `{inside[0]}: ...`"
    if path in setting_paths():
        return f"cannot differ between stages; only {', '.join(s + '*' for s in OVERRIDABLE)} can"
    near = nearest_path(path, known)
    return "unknown setting" + (f"; did you mean {near}?" if near else f"; {', '.join(OVERRIDABLE)} can be overridden")


def _sequence_fits_model(config: RunConfig) -> Iterator[Fault]:
    limit = config.model.architecture.max_seq_len
    if config.model.source == "scratch" and config.training.seq_len > limit:
        yield Fault(
            "training.seq_len",
            f"={config.training.seq_len} is beyond model.architecture.max_seq_len={limit}; "
            "lower the one or raise the other",
            related=("model.architecture.max_seq_len", "model.source"),
        )


def _model_sources_agree(config: RunConfig) -> Iterator[Fault]:
    model, tokenizer = config.model, config.model.tokenizer
    scratch = model.source == "scratch"
    if (model.source == "wheel") != (model.wheel is not None):
        missing = "says no package" if model.wheel is None else "names a package that is not used"
        yield Fault(
            "model.wheel",
            f" {missing}: model.source={model.source!r}; give `source: wheel` together with "
            "`wheel: {package, version, sha256, member}`, or neither",
            related=("model.source",),
        )
    if model.init_from is not None and not scratch:
        yield Fault(
            "model.init_from",
            f"={model.init_from!r} and model.source={model.source!r} both name weights; "
            "drop init_from, or set model.source: scratch",
            related=("model.source",),
        )
    if tokenizer.source == "model" and scratch and model.init_from is None:
        yield Fault(
            "model.tokenizer.source",
            "='model', but a scratch model brings no tokenizer; use `train`, a directory or a hub id",
            related=("model.source", "model.init_from"),
        )
    if tokenizer.source == "train" and not scratch:
        yield Fault(
            "model.tokenizer.source",
            f"='train', but model.source={model.source!r} has its own vocabulary; set model.tokenizer.source: model",
            related=("model.source",),
        )
    if tokenizer.train_on and tokenizer.source != "train":
        yield Fault(
            "model.tokenizer.train_on",
            f"={tokenizer.train_on} is used only by model.tokenizer.source: train, not {tokenizer.source!r}; drop it",
            related=("model.tokenizer.source",),
        )
    if model.attention == "flash_attention_2" and not config.cluster.use_gpu:
        yield Fault(
            "model.attention",
            "='flash_attention_2' needs GPUs; set cluster.use_gpu: true or model.attention: sdpa",
            related=("cluster.use_gpu",),
        )


def _gpu_shares_agree(config: RunConfig) -> Iterator[Fault]:
    cluster = config.cluster
    if cluster.gpus_per_worker == 1:
        return
    if not cluster.use_gpu:
        yield Fault(
            "cluster.gpus_per_worker",
            f"={cluster.gpus_per_worker:g} is a share of a GPU, and cluster.use_gpu is false; set that, or drop this",
            related=("cluster.use_gpu",),
        )
    elif cluster.num_workers > 1:
        yield Fault(
            "cluster.gpus_per_worker",
            f"={cluster.gpus_per_worker:g} with cluster.num_workers={cluster.num_workers} would put two workers of one "
            "run on one GPU, which NCCL refuses; set cluster.num_workers: 1, or drop the share",
            related=("cluster.num_workers",),
        )


def _methods_agree(config: RunConfig) -> Iterator[Fault]:
    """At most one method per stage, and nothing beside it that does not combine with it."""
    continual, keep = config.continual, config.continual.keep
    chosen = {
        "continual.use_lora": continual.use_lora,
        "continual.expand_blocks": bool(continual.expand_blocks),
        "continual.use_osft": continual.use_osft,
    }
    used = [path for path, on in chosen.items() if on]
    if len(used) > 1:
        yield Fault(
            used[0],
            f" and {' and '.join(used[1:])} exclude each other: each says what a stage trains; keep one per stage "
            "(stages may differ through `override`)",
            related=tuple(used[1:]),
        )
    count, positions = continual.expand_blocks, continual.expansion.positions
    if positions is not None and count and len(positions) != count:
        yield Fault(
            "continual.expansion.positions",
            f"={positions} names {len(positions)} places for continual.expand_blocks={count}; make them agree",
            related=("continual.expand_blocks",),
        )
    if keep.kl and continual.replay_ratio == 0:
        yield Fault(
            "continual.keep.kl",
            f"={keep.kl:g} acts on replayed rows, and continual.replay_ratio is 0; set a ratio, such as 0.05, or kl: 0",
            related=("continual.replay_ratio",),
        )
    if continual.method in ("lora", "expand"):
        for name, value, instead in (
            ("l2", keep.l2, "training.weight_decay pulls an update that starts at zero to its start"),
            ("interpolate", keep.interpolate, "a smaller learning rate or more replay keeps more"),
        ):
            if value:
                yield Fault(
                    f"continual.keep.{name}",
                    f"={value} does not combine with {used[0]}: {instead}; drop it, or train in full",
                    related=tuple(used),
                )
    if continual.use_lora and continual.lora.dora and continual.lora.across_stages == "new":
        yield Fault(
            "continual.lora.across_stages",
            "='new' adds up the adapters of all stages, and updates of continual.lora.dora do not add up; use "
            "`merge` or `carry`, or dora: false",
            related=("continual.lora.dora",),
        )
    if continual.method != "full" and config.training.freeze:
        yield Fault(
            "training.freeze",
            f"={config.training.freeze} does not combine with {used[0]}, which itself says what is trained; drop one",
            related=tuple(used),
        )


def _ledgers_have_jobs(config: RunConfig) -> Iterator[Fault]:
    """A domain that reads this run's own ledger has a job, and a job writes a domain that reads a ledger."""
    for name, domain in config.domains.items():
        source = domain.source
        if isinstance(source, SynthesisSource) and source.ledger is None and name not in config.synthesis:
            yield Fault(
                f"domains.{name}.source",
                f": kind synthesis reads what a job wrote, and there is no job synthesis.{name}; add one, or name the "
                "folder of another run's ledger in `ledger`",
                related=(f"synthesis.{name}",),
            )
    for name in config.synthesis:
        if name not in config.domains:
            known = choice(name, config.domains, what="declared are")
            yield Fault(f"synthesis.{name}", f": no domain {name!r} is declared under `domains`; {known}")
        elif not isinstance(config.domains[name].source, SynthesisSource):
            kind = config.domains[name].source.kind
            yield Fault(
                f"synthesis.{name}",
                f": nothing would read what it writes, since domains.{name}.source is of kind {kind}; set it to "
                "`{kind: synthesis}`, or drop the job",
                related=(f"domains.{name}.source",),
            )


def _jobs_are_sound(config: RunConfig) -> Iterator[Fault]:
    for name, job in config.synthesis.items():
        used = [("anchor", job.anchor)] if job.anchor else []
        used += [(f"unseen.{place}", domain) for place, domain in enumerate(job.unseen or ())]
        for where, domain in used:
            path = f"synthesis.{name}.{where}"
            if domain not in config.domains:
                known = choice(domain, config.domains, what="declared are")
                yield Fault(path, f": no domain {domain!r} is declared under `domains`; {known}")
            elif domain == name:
                yield Fault(path, f"={domain!r} is what the job itself writes; name a domain of real text")
        if job.judge is None and any(one.kind == "judge" for one in job.validators):
            yield Fault(
                f"synthesis.{name}.judge",
                " is missing: a validator of kind judge asks a model; name it here, or drop the validator",
            )
        if job.gpus_per_worker and job.generator.kind in ("openai", "anthropic"):
            yield Fault(
                f"synthesis.{name}.gpus_per_worker",
                f"={job.gpus_per_worker:g} is for models of this cluster, and {job.generator.kind} answers elsewhere; "
                "set it to 0",
                related=(f"synthesis.{name}.generator",),
            )


def _references_are_not_trained(config: RunConfig) -> Iterator[Fault]:
    """A model finds its own text plausible, so a reference that is the student narrows it; the generator may be one."""
    model = config.model
    for name, job in config.synthesis.items():
        reference = job.filters.perplexity
        if reference is None or reference.model is None:
            continue
        started = {"model.init_from": model.init_from} if model.init_from is not None else {}
        if model.source not in ("scratch", "wheel") and model.revision == reference.revision:
            started["model.source"] = model.source
        for path, student in started.items():
            if _same_place(student, reference.model):
                yield Fault(
                    f"synthesis.{name}.filters.perplexity.model",
                    f"={reference.model!r} is {path} too, the model that is trained, which favours its own text; name "
                    "a frozen model that this run does not train, or set perplexity: null",
                    related=(path,),
                )


def _same_place(one: str, other: str) -> bool:
    """Whether two names are the same folder, or the same id on a hub."""
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


RUN_CHECKS: tuple[Check, ...] = (
    _domains_exist,
    _stage_names_differ,
    _anchors_untrained,
    _new_is_not_replayed,
    _kind_fits_domains,
    _chat_sources_fit,
    _evaluated_have_held_out,
    _ledgers_have_jobs,
    _jobs_are_sound,
    _references_are_not_trained,
    _overrides_fit,
    _sequence_fits_model,
    _model_sources_agree,
    _methods_agree,
    _gpu_shares_agree,
    control_can_work,
    control_has_work,
)
"""Checked once per run."""

STAGE_CHECKS: tuple[Check, ...] = (
    _domains_exist,
    _model_sources_agree,
    _methods_agree,
    _gpu_shares_agree,
    control_can_work,
)
"""Checked again with each stage's overrides applied."""
