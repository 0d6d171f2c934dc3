"""The worker loop on a GPU, and the same checks on the CPU, so that they are known to run where there is no GPU.

The reference is always the CPU in fp32. The loss is near 5; fp32 kernels of two devices differ by rounding, bf16 by
about three digits, and a wrong gradient, scale or optimizer moves it by more within these eight steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_ray.config.tree import RunConfig
from tests.stage import STEPS, Workers, column, make_job, rewound, tiny_config, tiny_manifests

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NEAR = {"fp32": 2e-4, "bf16": 2e-2}
"""Largest relative difference from the CPU's fp32 losses over the stage."""
SLOW = pytest.mark.slow


@dataclass
class Lab:
    """One worker per device, started when first needed."""

    root: Path
    _workers: dict[str, Workers] = field(default_factory=dict)
    _losses: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.manifests = tiny_manifests(self.root)

    def run(self, config: RunConfig, device: str) -> dict[str, Any]:
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no GPU")
        if device not in self._workers:
            self._workers[device] = Workers(1, device)
        result = self._workers[device].run(make_job(config, self.manifests))
        assert "error" not in result, result["error"]["message"]
        return result

    def config(self, name: str, device: str, **changes: Any) -> RunConfig:
        return tiny_config(self.root, name=name, cluster__use_gpu=device == "cuda", **changes)

    def reference(self) -> list[float]:
        if not self._losses:
            config = self.config("reference", "cpu")
            self.run(config, "cpu")
            self._losses["cpu"] = column(config, "train/loss")
        return self._losses["cpu"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("devices"))
    yield made
    for workers in made._workers.values():
        workers.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("precision", "zero_stage"),
    [("fp32", 0), ("bf16", 1), pytest.param("bf16", 2, marks=SLOW), pytest.param("bf16", 3, marks=SLOW)],
)
def test_losses_are_those_of_the_cpu(lab: Lab, device: str, precision: str, zero_stage: int) -> None:
    config = lab.config(
        f"{device}-{precision}-{zero_stage}", device, training__precision=precision, training__zero_stage=zero_stage
    )
    lab.run(config, device)
    assert column(config, "train/loss") == pytest.approx(lab.reference(), rel=NEAR[precision], abs=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_stage_goes_on_as_the_whole_one(lab: Lab, device: str) -> None:
    """In bf16 with ZeRO-2 and activation checkpointing, from the checkpoint of step 3: the CPU to the last bit, a GPU,
    whose sums have no fixed order, within bf16 rounding."""
    changes = {"training__precision": "bf16", "training__zero_stage": 2, "training__activation_checkpointing": True}
    config = lab.config(f"{device}-whole", device, **changes)
    lab.run(config, device)
    again = rewound(config, f"{device}-again", to_step=3)
    lab.run(again, device)
    whole, resumed = column(config, "train/loss"), column(again, "train/loss")
    assert len(resumed) == STEPS
    if device == "cpu":
        assert resumed == whole
    else:
        assert resumed == pytest.approx(whole, rel=5e-3, abs=0)
    assert column(again, "data/batch_hash") == column(config, "data/batch_hash")


@pytest.mark.gpu
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_optimizer_state_in_host_memory(lab: Lab, zero_stage: int) -> None:
    config = lab.config(
        f"offload-{zero_stage}",
        "cuda",
        training__precision="bf16",
        training__zero_stage=zero_stage,
        training__offload_optimizer=True,
    )
    lab.run(config, "cuda")
    assert column(config, "train/loss") == pytest.approx(lab.reference(), rel=NEAR["bf16"], abs=0)
