"""`continual.on_forgetting: control`: what it needs and what it refuses, all faults at once, before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from nexus_ray.config import RunConfig, parse_config, stage_config
from nexus_ray.errors import ConfigError


def config(*overrides: str, stages: int = 2, **tree: Any) -> RunConfig:
    names = ("a", "b", "c")
    data = {
        "name": "test",
        "domains": {name: {"source": {"kind": "files", "paths": ["x"]}} for name in names},
        "stages": [{"name": name, "domains": {name: 1}} for name in names[:stages]],
        "training": {"seq_len": 16, "global_batch_tokens": 160, "token_budget": 16_000},
        "continual": {"on_forgetting": "control", "max_forgetting": 0.1},
        "evaluation": {"every_steps": 10},
        **tree,
    }
    return parse_config(data, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("continual.max_forgetting=null", r"continual.max_forgetting is not set.*in bits per byte, such as 0.1"),
        ("continual.max_forgetting=0", r"continual.max_forgetting =0 leaves nothing to control"),
        ("evaluation.every_steps=null", r"evaluation.every_steps is not set.*such as 5 for twenty evaluations"),
        ("evaluation.every_steps=50", r"every_steps=50 gives 1 evaluations inside a stage of 100 steps.*at most 33"),
        ("continual.curriculum=progressive", r"curriculum='progressive' sets the weights.*use sequential"),
        ("continual.curriculum=interleaved", r"curriculum='interleaved' sets the weights"),
        ("continual.alpha=0.5", r"continual.alpha=0.5 weighs.*whatever the replay ratio is.*leave alpha out"),
        ("continual.keep.kl=0.1", r"continual.keep.kl=0.1 stores predictions of the rows that the plan will replay"),
        ("continual.replay_ratio=0.7", r"max_replay_ratio=0.5 is below continual.replay_ratio=0.7"),
        ("continual.control.min_replay_ratio=0.6", r"min_replay_ratio=0.6 is not below max_replay_ratio=0.5"),
        ("continual.control.slack=-1", r"continual.control.slack=-1: must be at least 0"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(override)


def test_steps_of_one_row_leave_two_rows_for_the_probe() -> None:
    with pytest.raises(ConfigError, match=r"every_steps=1 with steps of one row.*use at least 2"):
        config("training.global_batch_tokens=16", "evaluation.every_steps=1")


def test_a_run_with_nothing_to_protect_or_nothing_to_act_with_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"on_forgetting='control' has nothing to protect.*`anchors`"):
        config(stages=1)
    config(stages=1, anchors=["c"])
    config('stages=[{"name": "a", "domains": {"a": 1}, "replay": {"b": 1}}]')
    with pytest.raises(ConfigError, match=r"min_lr_factor=1 leaves the learning rate alone, and no stage"):
        config("continual.control.min_lr_factor=1", stages=1, anchors=["c"])


def test_a_stage_that_alone_is_controlled_is_checked_alone() -> None:
    with pytest.raises(ConfigError, match=r"stages.1.override.*every_steps"):
        config(
            "continual.on_forgetting=warn",
            "evaluation.every_steps=null",
            "stages.1.override={continual.on_forgetting: control}",
        )
    made = config("continual.on_forgetting=warn", "stages.1.override={continual.on_forgetting: control}")
    assert [stage_config(made, k).continual.on_forgetting for k in (0, 1)] == ["warn", "control"]


def test_without_control_none_of_it_is_asked_for() -> None:
    config("continual.on_forgetting=warn", "evaluation.every_steps=null", "continual.alpha=0.5")
