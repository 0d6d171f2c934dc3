"""Scores of a model before any training, kept among the shared artefacts: runs that start alike score it once.

Invariant: what is found under a key is what scoring would give again: the key holds the weights, the held-out text and
every setting that the scores, samples and counts of `base/` depend on. The folder's `stage.json` is written last.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from typing import Any

from nexus_ray.config.tree import RunConfig
from nexus_ray.corpora.prepare import LOCK_TIMEOUT_S, PreparedData, shared_storage
from nexus_ray.evaluate.hooks import START
from nexus_ray.models.fingerprint import model_fingerprint
from nexus_ray.storage import Storage

FILES = ("evaluation.npz", START, "samples.json")
RESULT = "stage.json"


def base_folder(config: RunConfig, data: PreparedData) -> Storage:
    """Where the scores of a run's first model belong, `config.model` being one that loads."""
    evaluation, report, training, cluster = config.evaluation, config.report, config.training, config.cluster
    weights = model_fingerprint(config.model, vocab_size=data.vocab_size, eos_id=data.eos_id, seed=config.seed)
    drawn = report.sample_tokens and report.temperature > 0  # else the samples are the likeliest tokens
    content = {
        "model": weights,
        "tokenizer": data.tokenizer_fingerprint,
        "held_out": {name: data.domains[name].held_out.fingerprint for name in config.evaluated_domains},
        "rows": [training.seq_len, evaluation.batch_size, evaluation.max_tokens],
        "sample": evaluation.during_tokens if evaluation.every_steps else None,
        "engine": [str(training.precision), training.zero_stage, cluster.use_gpu],
        "workers": [cluster.num_workers, cluster.cpus_per_worker],  # they change rounding
        "osft": config.continual.method == "osft",  # whose result also says what leaked
        "texts": [report.prompts, report.sample_tokens, report.temperature, config.seed if drawn else 0],
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return shared_storage(config).child("base_scores", key)


def lock(shared: Storage) -> AbstractContextManager[None]:
    """Held by whoever scores into a shared folder."""
    return Storage(shared.uri.rpartition("/")[0]).lock(shared.name, LOCK_TIMEOUT_S)


def fetch(shared: Storage, folder: Storage) -> dict[str, Any] | None:
    """Copy shared scores into a run's folder; the result of scoring, or None if nobody has done so yet."""
    if not shared.exists(RESULT):
        return None
    for name in FILES:
        if shared.exists(name):
            folder.write_bytes(shared.read_bytes(name), name)
    return dict(shared.read_json(RESULT))
