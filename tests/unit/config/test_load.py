"""Loading, stages' own configs, resolving, and what a fingerprint notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.config import (
    Hardware,
    fingerprint,
    json_schema,
    load_config,
    parse_config,
    resolve,
    stage_config,
    to_yaml,
)
from nexus_ray.config.validators import JudgeConfig
from tests.configs import TWO_STAGES, two_stages, write_two_stages

PLAIN, AMX = Hardware(cpus=4), Hardware(cpus=4, amx_bf16=True)


def test_a_config_loads_from_a_file_with_overrides(tmp_path: Path) -> None:
    config = load_config(write_two_stages(tmp_path), ["training.seq_len=128", "name=other"])
    assert (config.name, config.training.seq_len, config.stages[1].name) == ("other", 128, "code")


def test_a_resolved_config_round_trips_through_yaml_and_resolves_to_itself() -> None:
    config = resolve(two_stages("stages.1.override={training.learning_rate: 3.0e-4}"), AMX)
    again = parse_config(yaml.safe_load(to_yaml(config)))
    assert again == config
    assert resolve(again, PLAIN) == config, "the machine no longer matters"


@pytest.mark.parametrize(
    ("overrides", "hardware", "expected"),
    [
        ([], PLAIN, ("fp32", 0, 4)),
        ([], AMX, ("bf16", 1, 4)),
        (["training.zero_stage=0"], AMX, ("fp32", 0, 4)),
        (["training.precision=fp32", "training.zero_stage=3"], AMX, ("fp32", 3, 4)),
        (["training.offload_optimizer=true"], PLAIN, ("fp32", 1, 4)),
        (["cluster.num_workers=3"], PLAIN, ("fp32", 0, 1)),
        (["cluster.num_workers=9"], PLAIN, ("fp32", 0, 1)),
        (["cluster.use_gpu=true"], PLAIN, ("bf16", 1, 4)),
        (["cluster.cpus_per_worker=7"], PLAIN, ("fp32", 0, 7)),
    ],
)
def test_autos_become_explicit(overrides: list[str], hardware: Hardware, expected: tuple[Any, ...]) -> None:
    config = resolve(two_stages(*overrides), hardware)
    assert (config.training.precision, config.training.zero_stage, config.cluster.cpus_per_worker) == expected


def test_autos_follow_a_stage_that_overrides_what_they_depend_on() -> None:
    config = resolve(two_stages("stages.1.override={training.precision: bf16, cluster.num_workers: 2}"), PLAIN)
    first, second = stage_config(config, 0), stage_config(config, 1)
    assert (first.training.zero_stage, first.cluster.cpus_per_worker) == (0, 4)
    assert (second.training.precision, second.training.zero_stage, second.cluster.cpus_per_worker) == ("bf16", 1, 2)


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve(two_stages("model.init_from=runs/x/model"), PLAIN)
    assert config.storage == str(tmp_path / "runs")
    assert config.domains["letters"].source.paths == [str(tmp_path / "letters.txt")]  # type: ignore[union-attr]
    assert config.model.init_from == str(tmp_path / "runs/x/model")
    assert resolve(two_stages("storage=s3://bucket/runs"), PLAIN).storage == "s3://bucket/runs"


def test_files_that_verdicts_refer_to_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = """{generator: {kind: openai, model: m}, recipe: r.yaml, judge: {kind: openai, model: m}, anchor: code,
      filters: {safety: {classifier: {model: harm, unsafe: [BAD]}, max_classifier: 0.5},
                prior: {reference: prior.json}, perplexity: {reference: s3://b/p.json},
                contamination: {benchmarks: {b: {paths: [b/*.jsonl, s3://b/c.jsonl]}}}},
      validators: [{kind: judge}, {kind: judge, rubric: rubrics/own.yaml, golden: own.jsonl}]}"""
    (tmp_path / "harm").mkdir()
    own = "domains.own={source: {kind: synthesis}}"
    found = resolve(two_stages(own, f"synthesis.own={job}"), PLAIN).synthesis["own"]
    assert found.filters.prior is not None and found.filters.prior.reference == str(tmp_path / "prior.json")
    assert found.filters.perplexity is not None and found.filters.perplexity.reference == "s3://b/p.json"
    assert found.filters.safety is not None and found.filters.safety.classifier is not None
    assert found.filters.safety.classifier.model == str(tmp_path / "harm")
    assert found.filters.contamination is not None
    assert found.filters.contamination.benchmarks["b"].paths == [str(tmp_path / "b/*.jsonl"), "s3://b/c.jsonl"]
    shipped, own_judge = found.validators
    assert isinstance(shipped, JudgeConfig) and (shipped.rubric, shipped.golden) == ("faithful", "default")
    assert isinstance(own_judge, JudgeConfig)
    assert (own_judge.rubric, own_judge.golden) == (str(tmp_path / "rubrics/own.yaml"), str(tmp_path / "own.jsonl"))
    nothing = "{generator: {kind: openai, model: m}, recipe: r.yaml, filters: {contamination: null, safety: null}}"
    resolve(two_stages(own, f"synthesis.own={nothing}"), PLAIN)


def test_a_stage_sees_its_overrides_and_the_others_do_not() -> None:
    config = two_stages("stages.1.override={training.learning_rate: 3.0e-4, training.schedule.kind: wsd}")
    assert stage_config(config, 0) is config
    second = stage_config(config, 1)
    assert (second.training.learning_rate, second.training.schedule.kind) == (3.0e-4, "wsd")
    assert second.stages == config.stages and config.training.learning_rate == 1.0e-3


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "storage=/elsewhere",
        "tracking.wandb.mode=offline",
        "report.temperature=0",
        "cluster.address=head:6379",
        "cluster.num_workers=2",
        "cluster.cpus_per_worker=3",
        "training.checkpoint.every_steps=5",
        "training.max_restarts=9",
        "domains.letters.source.paths=[/moved/letters.txt]",
        "stages.1.override={report.sample_tokens: 3}",
    ],
)
def test_the_fingerprint_ignores_what_changes_no_number(override: str) -> None:
    assert fingerprint(resolve(two_stages(override), PLAIN)) == fingerprint(resolve(two_stages(), PLAIN))


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "training.learning_rate=2.0e-3",
        "training.seq_len=128",
        "training.precision=bf16",
        "continual.replay_ratio=0.2",
        "continual.warmup_steps=21",
        "model.architecture.num_layers=3",
        "domains.letters.source.paths=[other.txt]",
        "domains.code.held_out_fraction=0.1",
        "stages.1.name=python",
        "stages.1.domains.letters=1",
        "stages.1.override={training.learning_rate: 3.0e-4}",
        "evaluation.max_tokens=1000",
        "data.shuffle_window_rows=16",
    ],
)
def test_the_fingerprint_notices_what_changes_numbers(override: str) -> None:
    assert fingerprint(resolve(two_stages(override), PLAIN)) != fingerprint(resolve(two_stages(), PLAIN))


@given(st.randoms())
def test_the_fingerprint_does_not_depend_on_key_order(random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            items = list(value.items())
            random.shuffle(items)
            return {key: shuffled(item) for key, item in items}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    data = yaml.safe_load(TWO_STAGES)
    assert fingerprint(parse_config(shuffled(data))) == fingerprint(parse_config(data))


def test_the_fingerprint_is_12_hex_digits() -> None:
    text = fingerprint(two_stages())
    assert len(text) == 12 and int(text, 16) >= 0


def test_the_json_schema_describes_and_closes_every_section() -> None:
    schema = json_schema()
    assert schema["required"] == ["name", "domains", "stages"]
    sections = [definition for definition in schema["$defs"].values() if definition["type"] == "object"]
    assert sections and all(section["additionalProperties"] is False for section in sections)
    assert "replay" in schema["$defs"]["ContinualConfig"]["properties"]["replay_ratio"]["description"].lower()
