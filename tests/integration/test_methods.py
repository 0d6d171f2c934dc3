"""Each method by config alone: a roadmap whose stages train in different ways, and what it leaves for others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.errors import ConfigError
from nexus_ray.roadmap import RunOutcome, evaluate_run, run_roadmap
from nexus_ray.session import ray_session
from tests.roadmaps import tiny_roadmap

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ADAPTERS = [
    {},
    {"continual.use_lora": True, "continual.lora_rank": 4, "continual.keep.kl": 0.5, "continual.keep.kl_top_k": 8},
    {"continual.use_lora": True, "continual.lora_rank": 4},
]
"""North in full; south by an adapter, held near the model before; east by the same adapter, carried on."""
GROWING = [
    {"continual.use_osft": True, "continual.keep.interpolate": [0.5, 0.8]},
    {
        "continual.expand_blocks": 1,
        "continual.expansion.max_drift": 0.5,
        "continual.expansion.unfreeze": [{"at": 0.5, "open": "all", "lr_factor": 0.1}],
    },
    {"continual.keep.l2": 5.0},
]
"""North in an orthogonal subspace; south by a new block, all opened half-way; east in full, pulled to its start."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("methods")
    with ray_session(tiny_roadmap(place, stages=3)):
        yield place


def run(folder: Path, name: str, methods: list[dict[str, Any]]) -> RunOutcome:
    overrides = {f"stages__{index}__override": override for index, override in enumerate(methods)}
    return run_roadmap(tiny_roadmap(folder, name=name, stages=3, evaluation__max_tokens=300, **overrides))


@pytest.fixture(scope="module")
def adapters(folder: Path) -> RunOutcome:
    return run(folder, "adapters", ADAPTERS)


@pytest.fixture(scope="module")
def growing(folder: Path) -> RunOutcome:
    return run(folder, "growing", GROWING)


def stage(outcome: RunOutcome, index: int) -> dict[str, Any]:
    return outcome.stages[index]


def test_adapters_train_a_part_and_export_for_peft(adapters: RunOutcome) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert stage(adapters, 0)["trainable_parameters"] == stage(adapters, 0)["parameters"]
    assert stage(adapters, 1)["trainable_parameters"] < stage(adapters, 1)["parameters"] / 4
    lines = [json.loads(line) for line in adapters.folder.read_text("metrics.jsonl").splitlines()]
    divergence = [line["train/kl"] for line in lines if line["stage"] == "south"]
    assert len(divergence) == 12 and divergence[0] == pytest.approx(0.0, abs=1e-3) and divergence[-1] > divergence[0]
    place = adapters.folder.local_path / "stages" / "02-east" / "model"
    assert (place / "adapter_config.json").exists() and not (place / "model.safetensors").exists()
    tokenizer = AutoTokenizer.from_pretrained(place)
    ids = tokenizer("kato mire", return_tensors="pt")
    models = [AutoModelForCausalLM.from_pretrained(place), AutoPeftModelForCausalLM.from_pretrained(place)]
    one, other = (model.generate(**ids, max_new_tokens=4, do_sample=False) for model in models)
    assert one.tolist() == other.tolist()


def test_new_blocks_stay_and_a_subspace_is_merged(growing: RunOutcome) -> None:
    from transformers import AutoModelForCausalLM

    place = growing.folder.local_path / "stages"
    layers = [
        AutoModelForCausalLM.from_pretrained(place / name / "model").config.num_hidden_layers
        for name in ("00-north", "01-south", "02-east")
    ]
    assert layers == [2, 3, 3]
    assert 0.0 <= stage(growing, 0)["interpolated"]["factor"] <= 1.0
    assert stage(growing, 2)["trainable_parameters"] == stage(growing, 2)["parameters"]


@pytest.mark.parametrize("which", ["adapters", "growing"])
def test_exports_score_as_the_stages_did(which: str, request: pytest.FixtureRequest) -> None:
    """The models on disk, loaded again, have the losses that the stages ended with."""
    outcome = request.getfixturevalue(which)
    before = outcome.scores["loss"]
    again = evaluate_run(run_config(outcome))
    for old, new in zip(before, again.scores["loss"], strict=True):
        assert new == pytest.approx(old, rel=1e-5)


def run_config(outcome: RunOutcome) -> Any:
    from nexus_ray.config import load_config

    return load_config(outcome.folder.local_path / "config.yaml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"continual.use_lora": True, "continual.lora_rank": 64}, "continual.lora_rank=64 exceeds"),
        ({"continual.expand_blocks": 1, "continual.expansion.positions": [7]}, "continual.expansion.positions=[7]"),
        ({"continual.use_lora": True, "continual.lora.targets": ["qproj"]}, "continual.lora.targets"),
    ],
)
def test_a_method_that_does_not_fit_is_told_before_any_worker_starts(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        run(folder, f"unfit-{abs(hash(words))}", [{}, changes, {}])
    assert words in str(error.value)
