"""The memory estimate: ZeRO's table, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from nexus_ray.config.tree import RunConfig
from nexus_ray.models.build import count_parameters
from nexus_ray.models.memory import memory_estimate
from tests.tiny import VOCAB_SIZE, tiny_model_config


def _config(workers: int = 1, **training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "m",
            "model": tiny_model_config().model_dump(),
            "domains": {"a": {"source": {"kind": "stdlib"}}},
            "stages": [{"name": "s", "domains": {"a": 1}}],
            "cluster": {"num_workers": workers},
            "training": training,
        }
    )


PARAMETERS = count_parameters(tiny_model_config(), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("precision", "zero_stage", "workers", "weights", "gradients", "optimizer"),
    [
        ("fp32", 0, 2, 4, 4, 8),
        ("fp32", 1, 2, 4, 4, 4),
        ("bf16", 1, 1, 2, 2, 12),
        ("bf16", 1, 4, 2, 2, 3),
        ("bf16", 2, 4, 2, 0.5, 3),
        ("bf16", 3, 4, 0.5, 0.5, 3),
    ],
)
def test_bytes_per_parameter(
    precision: str, zero_stage: int, workers: int, weights: float, gradients: float, optimizer: float
) -> None:
    estimate = memory_estimate(_config(workers, precision=precision, zero_stage=zero_stage), VOCAB_SIZE)
    shares = [estimate[key] / PARAMETERS for key in ("weights", "gradients", "optimizer")]
    assert shares == pytest.approx([weights, gradients, optimizer], abs=1e-3)
    assert estimate["total"] == sum(v for key, v in estimate.items() if key not in ("total", "host"))


def test_frozen_weights_need_no_gradients_and_offload_moves_the_optimizer() -> None:
    frozen = memory_estimate(_config(freeze=["embed"]), VOCAB_SIZE)
    assert frozen["gradients"] == 4 * (PARAMETERS - VOCAB_SIZE * 32)
    offloaded = memory_estimate(_config(zero_stage=2, offload_optimizer=True), VOCAB_SIZE)
    assert (offloaded["optimizer"], offloaded["host"]) == (0, 8 * PARAMETERS)


def test_checkpointing_saves_activations() -> None:
    plain, saving = memory_estimate(_config()), memory_estimate(_config(activation_checkpointing=True))
    assert saving["activations"] < plain["activations"]
    assert memory_estimate(_config(micro_batch_size=16))["activations"] == 2 * plain["activations"]
