"""Trials of one study see nested data: at equal seeds, what is replayed at 5 % is replayed at 10 %, in that order."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from nexus_ray.corpora.manifest import Shard, TokenManifest
from nexus_ray.stream.curriculum import stage_segments
from nexus_ray.stream.plan import Plan
from nexus_ray.study.load import Study
from nexus_ray.study.records import Point
from tests.studies import a_study


def manifest(domain: str, tokens: int) -> TokenManifest:
    shard = Shard("tokens-00000.parquet", tokens, 10, 4 * tokens, f"hash of {domain}", 0)
    return TokenManifest(domain, "train", "/nowhere", "t", 256, 0, (shard,))


MANIFESTS = {"english": manifest("english", 300_001), "french": manifest("french", 700_001)}
STAGES = [{"name": "french", "domains": {"french": 1}, "replay": {"english": 1}}]


def rows(study: Study, point: Point, seed: int) -> dict[str, list[int]]:
    """Rows of each domain in the order in which a trial reads them."""
    config = study.config_of(point, seed)
    plan = Plan(config.seed, config.training.seq_len, config.data.shuffle_window_rows)
    plan = plan.append(stage_segments(config, 0, MANIFESTS, start_row=0))
    found = plan.sequences(0, plan.rows)
    return {name: found.row[found.domain == i].tolist() for i, name in enumerate(found.domains)}


def test_replayed_rows_are_nested_and_repeat(tmp_path: Path) -> None:
    ratios = [0.0, 0.05, 0.1, 0.25]
    knobs = {"continual.replay_ratio": {"choice": ratios}, "training.token_budget": {"choice": [200_000, 450_000]}}
    study = a_study(tmp_path, space=knobs, base={"stages": STAGES}, seeds=[0, 1])
    for budget in (200_000, 450_000):
        points = [Point({"continual.replay_ratio": ratio, "training.token_budget": budget}) for ratio in ratios]
        read = [rows(study, point, 0) for point in points]
        assert read == [rows(study, point, 0) for point in points]
        for fewer, more in pairwise(read[1:]):
            old, older = fewer["english"], more["english"]
            assert len(old) < len(older) and older[: len(old)] == old
            new, newer = more["french"], fewer["french"]
            assert newer[: len(new)] == new
        assert rows(study, points[3], 1) != read[3]
        assert len(np.unique(read[0]["french"])) == min(len(read[0]["french"]), round(7000 * budget / 450_000))
