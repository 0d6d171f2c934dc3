"""Rules between fields of a config: names that must exist, settings that exclude each other, stage overrides."""

from __future__ import annotations

from collections.abc import Iterator

from nexus_ray.config.faults import Check, Fault
from nexus_ray.config.paths import choice, nearest_path, setting_paths
from nexus_ray.config.tree import FIXED_ACROSS_STAGES, OVERRIDABLE, RunConfig


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


def later_release(config: RunConfig) -> Iterator[Fault]:
    """Settings that are declared but do nothing yet. A setting leaves this list when it works."""
    if config.continual.use_lora:
        yield Fault("continual.use_lora", "=True: LoRA comes with a later release; set continual.use_lora: false")
    if config.continual.expand_blocks:
        yield Fault(
            "continual.expand_blocks",
            f"={config.continual.expand_blocks}: block expansion comes with a later release; "
            "set continual.expand_blocks: 0",
        )


RUN_CHECKS: tuple[Check, ...] = (
    _domains_exist,
    _stage_names_differ,
    _anchors_untrained,
    _new_is_not_replayed,
    _evaluated_have_held_out,
    _overrides_fit,
    _sequence_fits_model,
    _model_sources_agree,
    later_release,
)
"""Checked once per run."""

STAGE_CHECKS: tuple[Check, ...] = (_domains_exist, _model_sources_agree, later_release)
"""Checked again with each stage's overrides applied."""
