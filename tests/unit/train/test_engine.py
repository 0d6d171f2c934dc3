"""How a global batch is cut, and the JSON that DeepSpeed gets: reviewed as a diff, one file per ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.config.tree import TrainingConfig
from nexus_ray.train.engine import BatchShape, deepspeed_config


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_the_config_of_deepspeed_is_as_reviewed(golden: Callable[[str, str], None], stage: int, precision: str) -> None:
    """Nothing reaches DeepSpeed that nobody has read."""
    training = TrainingConfig(zero_stage=stage, precision=precision)
    config = deepspeed_config(training, BatchShape(rows=32, world=2, micro=8))
    golden(f"deepspeed.zero{stage}.json", json.dumps(config, indent=2) + "\n")


def test_offloading_is_asked_for_in_the_zero_section() -> None:
    training = TrainingConfig(zero_stage=2, precision="bf16", offload_optimizer=True)
    zero = deepspeed_config(training, BatchShape(8, 1, 8))["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40))
def test_the_parts_of_all_workers_are_the_batch(rows: int, world: int, micro: int) -> None:
    """Contiguous, without overlap, none left out; equally long forward passes everywhere."""
    shape = BatchShape(rows, world, micro)
    parts = [shape.rank_rows(rank) for rank in range(world)]
    assert [row for low, high in parts for row in range(low, high)] == list(range(rows))
    assert all(high - low <= shape.rows_per_rank for low, high in parts)
    assert shape.rows_per_rank <= shape.accumulation * min(micro, shape.rows_per_rank)
    config = deepspeed_config(TrainingConfig(zero_stage=0, precision="fp32"), shape)
    assert config["train_batch_size"] == (
        config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * world
    )
