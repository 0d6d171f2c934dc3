"""Every method under every engine: the same losses, exact resume, and frozen weights that keep their bytes.

The real worker loop over DeepSpeed and gloo, without Ray, two workers. `make test` runs a slice, `make test-all` all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nexus_ray.config.tree import RunConfig
from tests.lab import HASHES, LOSSES, MOVED, Lab, losses_agree
from tests.stage import STEPS, checkpoints, column, manifest, rewound

SLOW = pytest.mark.slow
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"continual__use_lora": True, "continual__lora_rank": 4},
    "expansion": {"continual__expand_blocks": 1, "continual__expansion__max_drift": 0.5},
    "osft": {"continual__use_osft": True},
    "l2": {"continual__keep__l2": 1.0},
}
ENGINES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
SLICE = {
    ("lora", 2, "bf16"),
    ("expansion", 0, "fp32"),
    ("expansion", 3, "bf16"),
    ("osft", 1, "bf16"),
    ("l2", 0, "fp32"),
}
NEAR = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference from the losses of ZeRO 0 in fp32: rounding, and that of bf16 weights and gradients."""
CASES = [
    pytest.param(method, *engine, marks=() if (method, *engine) in SLICE else SLOW)
    for method in METHODS
    for engine in ENGINES
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("methods"))
    yield made
    made.close()


def whole(lab: Lab, method: str, zero_stage: int, precision: str) -> tuple[RunConfig, dict[str, Any]]:
    changes = {"training__zero_stage": zero_stage, "training__precision": precision, **METHODS[method]}
    return lab.whole(world=2, **changes)


@pytest.mark.parametrize(("method", "zero_stage", "precision"), CASES)
def test_losses_and_resume_under_every_engine(lab: Lab, method: str, zero_stage: int, precision: str) -> None:
    """Against ZeRO 0 in fp32 within rounding; resumed at step 3 on two workers bit for bit, and on one within rounding
    of the training precision. What is frozen has one hash in all checkpoints, and is not in them."""
    config, result = whole(lab, method, zero_stage, precision)
    reference, _ = whole(lab, method, 0, "fp32")
    assert column(config, HASHES) == column(reference, HASHES)
    losses_agree(config, reference, NEAR[precision])
    assert (result["trainable_parameters"] < result["parameters"]) == (method not in ("full", "l2"))

    assert ("leak" in result) == (method == "osft" and zero_stage < 3) and result.get("leak", 0.0) < 1e-3
    assert result["peak_memory_bytes"] > 1e8
    again = rewound(config, f"{config.name}-again", to_step=3)
    resumed = lab.run(again, world=2)
    assert column(again, LOSSES) == column(config, LOSSES)
    assert resumed["weights"] == result["weights"]

    alone = rewound(config, f"{config.name}-alone", to_step=3)
    lab.run(alone, world=1)
    losses_agree(alone, config, MOVED if precision == "fp32" else 5e-3)
    hashes = {manifest(place)["frozen_sha256"] for run in (config, again, alone) for place in checkpoints(run).values()}
    assert len(hashes) == 1


@pytest.mark.parametrize("zero_stage", [0, pytest.param(1, marks=SLOW), 2])
def test_a_later_stage_begins_with_the_chosen_point_between_weights(lab: Lab, zero_stage: int) -> None:
    """The point is a checkpoint like any other: another worker count and another method load it."""
    name = f"between-{zero_stage}"
    config = lab.config(
        name, stages=2, training__zero_stage=zero_stage, continual__keep__interpolate=[0.5], training__weight_decay=0.0
    )
    result = lab.run(config)
    assert result["interpolated"]["factor"] < 1.0
    again = lab.run(config)
    assert again["interpolated"]["factor"] == result["interpolated"]["factor"] and again["weights"] == result["weights"]
    lab.run(config, world=2, stage=1)
    assert len(column(config, LOSSES, 1)) == STEPS


@pytest.mark.parametrize("zero_stage", [0, pytest.param(2, marks=SLOW)])
def test_kept_optimizer_state_starts_at_zero_for_what_was_not_trained_before(lab: Lab, zero_stage: int) -> None:
    """A change of method leaves no moments to keep: the stage goes as one whose optimizer is reset."""
    adapter = {"continual.use_lora": True, "continual.lora_rank": 4}
    settings = {"training__zero_stage": zero_stage, "stages__1__override": adapter}
    kept = lab.two_stages(continual__optimizer_state="keep", **settings)
    reset = lab.two_stages(continual__optimizer_state="reset", **settings)
    for config in (kept, reset):
        lab.run(config, stage=1)
    assert column(kept, HASHES, 1) == column(reset, HASHES, 1)
    assert len(column(kept, LOSSES, 1)) == STEPS and column(kept, LOSSES, 1) == column(reset, LOSSES, 1)
