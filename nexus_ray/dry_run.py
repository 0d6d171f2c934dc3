"""`--dry-run`: the resolved plan of a run in figures, without Ray and without training anything.

Token counts of corpora that have been prepared are exact; those of others are shown as not known yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nexus_ray.config import Curriculum, RunConfig, fingerprint, stage_config
from nexus_ray.config.tree import ContinualConfig
from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.stream.curriculum import replay_weights, stage_segments
from nexus_ray.train.schedule import factor

CURVE_POINTS = 7


def print_plan(config: RunConfig, console: Console | None = None) -> None:
    """Print what a resolved config would do: stages, mixture, learning rates, memory, and what to look out for."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    manifests = _manifests(config)
    console.print(f"[bold]{config.name}[/bold]  fingerprint {fingerprint(config)}  seed {config.seed}")
    console.print(f"record  {config.storage}/{config.name}", soft_wrap=True)
    console.print(f"shared  {config.storage}/_shared", soft_wrap=True)
    console.print(_stage_table(config, manifests))
    console.print(_method_table(config))
    console.print(_curve_table(config))
    console.print(_domain_table(config, manifests))
    console.print(_memory_line(config), soft_wrap=True)
    for warning in plan_warnings(config, manifests):
        console.print(f"[yellow]warning[/yellow] {warning}", soft_wrap=True)


def _manifests(config: RunConfig) -> dict[str, TokenManifest]:
    from nexus_ray.corpora.prepare import find_prepared  # loads the tokenizer libraries
    from nexus_ray.models.local import if_converted

    config = if_converted(config)
    try:
        prepared = find_prepared(config)
    except DataError:  # what cannot be read yet, such as a ledger before its job, is not known yet
        return {}
    return {name: domain.train for name, domain in prepared.domains.items()} if prepared else {}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _stage_table(config: RunConfig, manifests: dict[str, TokenManifest]) -> Table:
    table = _table("stages", "", "stage", "trains on", "tokens", "steps", "rows", "loss weights")
    for index, stage in enumerate(config.stages):
        own = stage_config(config, index)
        training, alpha = own.training, own.continual.alpha
        new = _shares({name: Fraction(weight) for name, weight in stage.domains.items()})
        table.add_row(
            str(index),
            f"{stage.name} ({stage.kind})",
            f"{new}\nreplay: {_replay(own, index, manifests)}",
            f"{training.steps * training.global_batch_tokens:,}",
            f"{training.steps:,} x {training.global_batch_tokens:,} tokens",
            f"{training.steps * training.rows_per_step:,} x {training.seq_len} tokens",
            "token mean" if alpha is None else f"new {alpha:g}, replay {1 - alpha:g}",
        )
    return table


def _method_table(config: RunConfig) -> Table:
    """What of the model each stage trains."""
    table = _table("methods", "stage", "method", "parameters", "trained", "share")
    for stage, own, (every, trained) in zip(config.stages, _own_configs(config), _counts(config), strict=True):
        figures = (f"{every:,}", f"{trained:,}", f"{trained / every:.2%}") if every else ("not known yet", "", "")
        frozen = " but " + ", ".join(own.training.freeze) if own.training.freeze else ""
        table.add_row(stage.name, own.continual.method + frozen, *figures)
    return table


def _own_configs(config: RunConfig) -> list[RunConfig]:
    return [stage_config(config, index) for index in range(len(config.stages))]


def _counts(config: RunConfig) -> list[tuple[int, int]]:
    """All and trained parameters of every stage; zeros where the model cannot be looked at yet, as a file to convert.

    Raises:
        ConfigError: a method does not fit the model.
    """
    from nexus_ray.models.build import meta_model
    from nexus_ray.models.local import if_converted, needs_conversion
    from nexus_ray.models.methods import rehearse

    config = if_converted(config)
    unknown = [(0, 0)] * len(config.stages)
    if needs_conversion(config.model):
        return unknown
    try:
        model = meta_model(config.model, config.model.tokenizer.vocab_size)
    except ConfigError:  # the line on memory says why
        return unknown
    return rehearse(model, _own_configs(config))


def _replay(config: RunConfig, index: int, manifests: dict[str, TokenManifest]) -> str:
    if config.continual.curriculum is Curriculum.INTERLEAVED:
        return "all domains mixed"
    ratio = f"{config.continual.replay_ratio:.4g}"
    sources = _replay_sources(config, index)
    if not sources:
        return "0 (nothing earlier)"
    if config.stages[index].replay is None and not all(name in manifests for name in sources):
        return f"{ratio} of {', '.join(sources)}, by tokens"
    weights = replay_weights(config, index, {name: manifest.tokens for name, manifest in manifests.items()})
    return f"{ratio} of {_shares(weights)}"


def _replay_sources(config: RunConfig, index: int) -> list[str]:
    stage = config.stages[index]
    if stage.replay is not None:
        return list(stage.replay)
    return [name for name in config.earlier_domains(index) if name not in stage.domains]


def _shares(weights: dict[str, Fraction]) -> str:
    total = sum(weights.values())
    if len(weights) == 1:
        return next(iter(weights))
    return ", ".join(f"{name} {float(weight / total):.3g}" for name, weight in weights.items())


def learning_rates(config: RunConfig, index: int) -> list[tuple[int, float]]:
    """(optimizer step counted from 1, learning rate) at the ends, the peak and evenly between, for one stage."""
    own = stage_config(config, index)
    steps, warmup = own.training.steps, own.continual.warmup_steps
    between = (steps * k // (CURVE_POINTS - 3) for k in range(1, CURVE_POINTS - 3))
    shown = sorted({1, steps, min(steps, max(1, warmup)), *(max(1, step) for step in between)})
    rewarm = index == 0 or own.continual.warmup_on_new
    return [
        (
            step,
            own.training.learning_rate
            * factor(step - 1, total_steps=steps, warmup_steps=warmup, config=own.training.schedule, rewarm=rewarm),
        )
        for step in shown
    ]


def _curve_table(config: RunConfig) -> Table:
    table = _table("learning rate", "stage", "schedule", "step: rate")
    for index, stage in enumerate(config.stages):
        own = stage_config(config, index)
        points = "   ".join(f"{step}: {rate:.2e}" for step, rate in learning_rates(config, index))
        kept = index > 0 and not own.continual.warmup_on_new
        table.add_row(f"{index}  {stage.name}", "no re-warm" if kept else own.training.schedule.kind, points)
    return table


def _domain_table(config: RunConfig, manifests: dict[str, TokenManifest]) -> Table:
    table = _table("domains", "domain", "source", "held out", "training tokens", "use")
    for name, domain in config.domains.items():
        known = f"{manifests[name].tokens:,}" if name in manifests else "after `prepare`"
        use = "anchor" if name in config.anchors else "trained" if name in config.evaluated_domains else "not used"
        table.add_row(name, domain.source.kind, f"{domain.held_out_fraction:.1%}", known, use)
    return table


def _memory_line(config: RunConfig) -> str:
    try:
        from nexus_ray.models.memory import memory_estimate
    except ImportError as error:
        return f"memory per worker: not estimated ({error})"
    try:
        parts = memory_estimate(config)
    except ConfigError as error:
        return f"memory per worker: not estimated ({error})"
    mib = {name: size / 2**20 for name, size in parts.items() if size}
    total = mib.pop("total")
    rest = ", ".join(f"{name} {size:,.0f}" for name, size in mib.items())
    cluster, training = config.cluster, config.training
    share = "GPU" if cluster.gpus_per_worker == 1 else f"{cluster.gpus_per_worker:g} of a GPU"
    device = share if cluster.use_gpu else f"{cluster.cpus_per_worker} threads"
    engine = f"{cluster.num_workers} worker(s), {device}, {training.precision}, ZeRO {training.zero_stage}"
    return f"memory per worker: about {total:,.0f} MiB ({rest}); {engine}"


def plan_warnings(config: RunConfig, manifests: dict[str, TokenManifest]) -> Iterable[str]:
    """What is allowed but may surprise: clipped warm-ups, a first stage without replay, many epochs, unused domains."""
    for index, stage in enumerate(config.stages):
        own = stage_config(config, index)
        steps, warmup = own.training.steps, own.continual.warmup_steps
        if warmup > steps and (index == 0 or own.continual.warmup_on_new):
            yield f"stage {stage.name}: continual.warmup_steps={warmup} is clipped to the stage's {steps} steps"
        mixed = own.continual.curriculum is Curriculum.INTERLEAVED
        if own.continual.replay_ratio > 0 and not mixed and not _replay_sources(own, index):
            yield (
                f"stage {stage.name}: continual.replay_ratio={own.continual.replay_ratio:g} has nothing to replay yet; "
                "the stage trains with ratio 0"
            )
        yield from _repetitions(own, index, manifests)
    yield from _idle_settings(config)
    for name in config.domains:
        if name not in config.evaluated_domains:
            yield f"domains.{name} is declared, but no stage and no anchor uses it"


def _idle_settings(config: RunConfig) -> Iterable[str]:
    """Settings of methods that no stage uses."""
    methods = {own.continual.method for own in _own_configs(config)}
    usual, given = ContinualConfig(), config.continual
    for method, switch, names in (
        ("lora", "use_lora: true", ("lora_rank", "lora_alpha", "lora")),
        ("expand", "expand_blocks", ("expansion",)),
        ("osft", "use_osft: true", ("osft",)),
    ):
        idle = [name for name in names if getattr(given, name) != getattr(usual, name)]
        if idle and method not in methods:
            settings = ", ".join(f"continual.{name}" for name in idle)
            yield f"{settings} {'has' if len(idle) == 1 else 'have'} no effect: no stage sets continual.{switch}"


def _repetitions(config: RunConfig, index: int, manifests: dict[str, TokenManifest]) -> Iterable[str]:
    """Sources that a stage reads more than once; a ConfigError of the plan itself (too many epochs) goes up."""
    stage = config.stages[index]
    needed = {*stage.domains, *_replay_sources(config, index)}
    if not all(name in manifests for name in needed):
        return
    drawn: dict[str, int] = {}
    rows: dict[str, int] = {}
    for segment in stage_segments(config, index, manifests, start_row=0):
        for name, count in segment.drawn(segment.rows).items():
            drawn[name] = drawn.get(name, 0) + count
            rows[name] = segment.manifests[name].rows
    for name, count in drawn.items():
        if count > rows[name]:
            times = count / rows[name]
            yield f"stage {stage.name}: reads {name} {times:.1f} times ({count} rows drawn, {rows[name]} there)"
