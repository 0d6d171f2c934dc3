"""Building models, freezing, grouping and counting parameters, and the messages when a source does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config.tree import Architecture, ModelConfig
from nexus_ray.errors import ConfigError
from nexus_ray.models import build
from nexus_ray.models.build import (
    apply_freeze,
    build_model,
    context_length,
    count_parameters,
    parameter_groups,
)
from nexus_ray.models.fingerprint import model_fingerprint
from tests.tiny import EOS_ID, VOCAB_SIZE, tiny_model, tiny_model_config


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "hub_answers", lambda: False)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model(seed=4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _build(config: ModelConfig, vocab_size: int = VOCAB_SIZE) -> torch.nn.Module:
    return build_model(config, vocab_size=vocab_size, eos_id=EOS_ID, seed=0)


def test_scratch_depends_on_the_seed_alone_and_leaves_the_global_state() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = tiny_model(seed=7).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    again, other = tiny_model(seed=7).state_dict(), tiny_model(seed=8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_scratch_has_an_end_token_and_no_other_special_token() -> None:
    config = tiny_model().config
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (EOS_ID, None, None)
    assert config.attention_dropout == 0.0
    assert config.max_position_embeddings == context_length(tiny_model_config()) == 128


def test_dtype_is_applied() -> None:
    model = build_model(tiny_model_config(), vocab_size=VOCAB_SIZE, eos_id=EOS_ID, seed=0, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@settings(max_examples=12, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4]),
    kv_share=st.sampled_from([1, 2]),
    layers=st.integers(1, 3),
    width=st.sampled_from([None, 40]),
    tied=st.booleans(),
    vocab_size=st.integers(10, 90),
)
def test_parameter_count_matches_the_real_model(
    heads: int, kv_share: int, layers: int, width: int | None, tied: bool, vocab_size: int
) -> None:
    architecture = Architecture(
        hidden_size=8 * heads,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=max(1, heads // kv_share),
        intermediate_size=width,
        tie_embeddings=tied,
    )
    config = ModelConfig(architecture=architecture)
    real = sum(parameter.numel() for parameter in _build(config, vocab_size).parameters())
    assert count_parameters(config, vocab_size) == real


def test_pretrained_folder_is_loaded_counted_and_measured(saved: Path) -> None:
    config = ModelConfig(source=str(saved))
    model, original = _build(config), tiny_model(seed=4)
    assert all(torch.equal(part, original.state_dict()[name]) for name, part in model.state_dict().items())
    assert count_parameters(config, 1) == sum(parameter.numel() for parameter in original.parameters())
    assert context_length(config) == 128


def test_init_from_starts_with_another_runs_weights(saved: Path) -> None:
    model = _build(tiny_model_config(init_from=str(saved)))
    assert torch.equal(model.lm_head.weight, tiny_model(seed=4).lm_head.weight)


def test_init_from_of_another_shape_is_refused(saved: Path) -> None:
    other = ModelConfig(architecture=Architecture(hidden_size=32, num_layers=3, num_heads=4), init_from=str(saved))
    with pytest.raises(ConfigError, match=r"model\.init_from=.* has num_hidden_layers=2, the config says 3"):
        _build(other)
    with pytest.raises(ConfigError, match=r"model\.init_from=.* has vocab_size=300, the config says 400"):
        _build(tiny_model_config(init_from=str(saved)), 400)


def test_vocabulary_larger_than_the_embeddings_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"300 embeddings, fewer than the tokenizer's 301 entries; use the model's"):
        _build(ModelConfig(source=str(saved)), 301)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "/nowhere/model"}, r"model\.source=/nowhere/model is not a folder"),
        ({"source": "no good"}, r"model\.source=no good is neither a folder nor a Hugging Face id"),
        ({"source": "nobody/nothing"}, r"model\.source=nobody/nothing could not be loaded: .* cannot be reached"),
        ({"init_from": "runs/x/model"}, r"model\.init_from=runs/x/model is not a folder"),
        (
            {"attention": "flash_attention_2"},
            r"model\.attention=flash_attention_2 does not work here.*use sdpa or eager",
        ),
    ],
)
def test_unusable_sources_say_what_to_do(changes: dict[str, str], message: str, no_hub: None) -> None:
    if "flash" in message and torch.cuda.is_available():
        pytest.skip("flash attention may work beside a GPU")
    with pytest.raises(ConfigError, match=message):
        _build(tiny_model_config(**changes))


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json; name a folder that a model was saved to"):
        _build(ModelConfig(source=str(tmp_path)))


def test_recurrent_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    with pytest.raises(ConfigError, match="its state would leak between the documents"):
        _build(ModelConfig(source=str(tmp_path)))


def test_sliding_window_limits_the_context(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mistral", "max_position_embeddings": 4096, "sliding_window": 512}'
    )
    assert context_length(ModelConfig(source=str(tmp_path))) == 512


def test_freeze_stops_exactly_the_named_parameters() -> None:
    model = tiny_model()
    frozen = apply_freeze(model, [r"layers\.0\.", "embed"])
    assert frozen == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert all("layers.0." in name or "embed" in name for name in frozen)
    assert len(frozen) == 10


@pytest.mark.parametrize(("patterns", "message"), [(["layer.0"], "matches no parameter"), ([".*"], "every parameter")])
def test_senseless_freeze_is_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_freeze(tiny_model(), patterns)


def test_only_trainable_matrices_decay() -> None:
    model = tiny_model()
    apply_freeze(model, [r"layers\.0\."])
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    assert {parameter.ndim for parameter in plain["params"]} == {1}
    grouped = {id(parameter) for group in (decayed, plain) for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_fingerprint_follows_what_determines_the_weights(saved: Path) -> None:
    def of(config: ModelConfig, seed: int = 0) -> str:
        return model_fingerprint(config, vocab_size=VOCAB_SIZE, eos_id=EOS_ID, seed=seed)

    assert of(tiny_model_config()) == of(tiny_model_config())
    assert of(tiny_model_config()) != of(tiny_model_config(), seed=1)
    before = of(ModelConfig(source=str(saved)))
    assert before == of(ModelConfig(source=str(saved)), seed=1)
    tiny_model(seed=5).save_pretrained(saved)
    assert before != of(ModelConfig(source=str(saved)))
