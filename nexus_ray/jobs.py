"""What a run's workers are asked to do, as a job for `nexus_ray.train.launch.fit`; and the first such job, which all
runs that start alike share: scoring the model before any training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nexus_ray.config import RunConfig, fingerprint, stage_config
from nexus_ray.corpora.prepare import PreparedData, check_prepared
from nexus_ray.corpora.tokenizer import check_init_tokenizer
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.evaluate import shared
from nexus_ray.evaluate.hooks import ScoringHooks
from nexus_ray.storage import Storage
from nexus_ray.stream.rows import StageStream
from nexus_ray.train.launch import fit
from nexus_ray.train.lineage import Earlier
from nexus_ray.train.loop import StageJob

BASE = "base"
"""Name of the "stage" before the first, which trains nothing."""

Say = Callable[[str], None]


def check_model(config: RunConfig, data: PreparedData) -> None:
    """Raise ConfigError for what would only fail in the workers otherwise, once they have started."""
    from nexus_ray.models.build import check_init_from, context_length, meta_model
    from nexus_ray.models.methods import rehearse, trains_all

    check_init_tokenizer(config.model, data.tokenizer)
    check_init_from(config.model, vocab_size=data.vocab_size)
    stages = [stage_config(config, index) for index in range(len(config.stages))]
    if not all(trains_all(stage) for stage in stages):
        rehearse(meta_model(config.model, data.vocab_size), stages)
    limit = context_length(config.model)
    if limit is not None and config.training.seq_len > limit:
        raise ConfigError(
            f"training.seq_len={config.training.seq_len} exceeds the {limit} positions of "
            f"model.source={config.model.source!r}; use at most {limit}"
        )


def stage_job(
    config: RunConfig,
    data: PreparedData,
    name: str,
    index: int,
    *,
    run: Storage,
    folder: Storage,
    fingerprint: str,
    attempt: int = 0,
    stream: StageStream | None = None,
    history: tuple[Earlier, ...] = (),
    export: bool = True,
    domains: tuple[str, ...] | None = None,
) -> StageJob:
    """The job of a stage: training on `stream` (None: no training), then scoring.

    Scores and the export go into `folder`; logs and what Ray leaves into `run`. `fingerprint` is the run's. With
    `domains` only these are scored, and nothing is sampled.
    """
    evaluation, report = config.evaluation, config.report
    hooks = ScoringHooks(
        folder=folder,
        tokenizer=data.tokenizer,
        held_out={d: data.domains[d].held_out for d in domains or config.evaluated_domains},
        seq_len=config.training.seq_len,
        batch_size=evaluation.batch_size,
        max_tokens=evaluation.max_tokens,
        during_tokens=evaluation.during_tokens,
        prompts=report.prompts,
        sample_tokens=report.sample_tokens if domains is None else 0,
        temperature=report.temperature,
        sample_seed=config.seed,
        export=export,
        old=tuple(dict.fromkeys([*config.earlier_domains(max(0, index)), *config.anchors])),
        sample=index < 0 and evaluation.every_steps is not None,
    )
    return StageJob(
        config=config,
        stage=name,
        stage_index=index,
        attempt=attempt,
        run=run,
        folder=folder,
        fingerprint=fingerprint,
        vocab_size=data.vocab_size,
        eos_id=data.eos_id,
        hooks=hooks,
        stream=stream,
        history=history,
    )


def score_base(config: RunConfig, data: PreparedData, *, run: Storage, folder: Storage, say: Say) -> dict[str, Any]:
    """Score a run's model before any training, into `folder`; returns what its `stage.json` is to hold."""
    say("scoring the base model")
    job = stage_job(config, data, BASE, -1, run=run, folder=folder, fingerprint=fingerprint(config), export=False)
    return {"name": BASE, "index": -1, **fit(job)}


def base_scores(config: RunConfig, data: PreparedData, *, run: Storage, folder: Storage, say: Say) -> dict[str, Any]:
    """The same, taken over from another run that starts alike if there is one, and else kept for the next."""
    place = shared.base_folder(config, data)
    with shared.lock(place):
        if place.exists(shared.RESULT):
            say("the base model was scored before")
        else:
            _score_shared(config, data, place, run=run, say=say)
        found = shared.fetch(place, folder)
    if found is None:
        raise DataError(f"{place.uri}: the base model's scores are gone since they were written; start again")
    return found


def score_ahead(
    config: RunConfig, data: PreparedData, *, run: Storage, say: Say, wanted: Callable[[], bool] = lambda: True
) -> bool:
    """Score a run's first model for whoever starts alike, if nobody has; returns whether it was done now.

    `data` is what `prepare` returned for `config`, whose model is one that loads. `wanted` is asked again once others
    that do the same have been waited for.

    Raises as the run itself would, ConfigError for what `check_model` finds.
    """
    if shared.base_folder(config, data).exists(shared.RESULT):
        return False
    check_model(config, data)
    data = check_prepared(data, config.data.on_corrupt, progress=say)
    place = shared.base_folder(config, data)
    with shared.lock(place):
        if place.exists(shared.RESULT) or not wanted():
            return False
        _score_shared(config, data, place, run=run, say=say)
    return True


def _score_shared(config: RunConfig, data: PreparedData, place: Storage, *, run: Storage, say: Say) -> None:
    place.write_json(score_base(config, data, run=run, folder=place, say=say), shared.RESULT)
