"""Operations per token, against counts by hand for a small Llama."""

from __future__ import annotations

import pytest

from nexus_ray.config.load import parse_config
from nexus_ray.config.tree import RunConfig
from nexus_ray.models.build import build_model
from nexus_ray.models.flops import training_flops
from nexus_ray.models.methods import Adapted, begin

HIDDEN, LAYERS, WIDE, VOCAB, SEQ = 32, 4, 96, 300, 16
BLOCK = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * WIDE)
ATTENTION = 2 * SEQ * HIDDEN
HEAD = 2 * VOCAB * HIDDEN


def flops(**continual: object) -> tuple[float, float, float]:
    architecture = {"hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": 2, "intermediate_size": WIDE}
    config: RunConfig = parse_config(
        {
            "name": "flops",
            "model": {"architecture": architecture, "tokenizer": {"vocab_size": VOCAB}},
            "domains": {"a": {"source": {"kind": "files", "paths": ["a"]}}},
            "stages": [{"name": "a", "domains": {"a": 1}}],
            "continual": continual,
        }
    )
    model = build_model(config.model, vocab_size=VOCAB, eos_id=0, seed=0)
    found = training_flops(begin(Adapted(model), config).model, SEQ)
    return found.forward, found.input_gradients, found.weight_gradients


FORWARD = LAYERS * (BLOCK + ATTENTION) + HEAD


def test_full_training_is_three_times_the_matrices_and_attention() -> None:
    assert flops() == (FORWARD, LAYERS * (BLOCK + 2 * ATTENTION) + HEAD, LAYERS * BLOCK + HEAD)


def test_adapters_need_input_gradients_but_hardly_any_of_weights() -> None:
    rank = 4
    adapters = 2 * rank * (4 * 2 * HIDDEN + 3 * (HIDDEN + WIDE)) * LAYERS
    forward, inputs, weights = flops(use_lora=True, lora_rank=rank)
    assert (forward, weights) == (FORWARD + adapters, adapters)
    assert inputs == LAYERS * (BLOCK + 2 * ATTENTION) + HEAD + adapters


def test_new_blocks_need_nothing_below_the_lowest() -> None:
    """One block behind the last: four blocks forward only, one in full; the head passes gradients on."""
    forward, inputs, weights = flops(expand_blocks=1)
    assert forward == FORWARD + BLOCK + ATTENTION
    assert inputs == BLOCK + 2 * ATTENTION + HEAD
    assert weights == BLOCK


def test_two_thirds_of_full_training_of_the_grown_model() -> None:
    """LLaMA-Pro's proportion (one new block per four) costs about two thirds: 1 forward, gradients of inputs above the
    lowest new block, gradients of weights in few."""
    grown = flops(expand_blocks=2)
    full = 3 * (FORWARD + 2 * (BLOCK + ATTENTION))
    assert sum(grown) / full == pytest.approx(0.7, abs=0.1)
