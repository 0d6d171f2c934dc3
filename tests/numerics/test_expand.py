"""Block expansion, for a tiny model of each accepted architecture: the identity at the start, exactly; what is frozen
stays; what is saved comes back; what is removed was never there; what cannot be done is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from nexus_ray.errors import ConfigError
from nexus_ray.models.block_file import base_fingerprint, load_blocks, save_blocks
from nexus_ray.models.blocks import SILENCE, decoder_blocks
from nexus_ray.models.expand import (
    Expansion,
    expand_blocks,
    expansion_positions,
    only_new_blocks,
    remove_blocks,
    unfreeze_names,
)
from nexus_ray.models.export_stage import export_stage
from nexus_ray.models.identity import check_identity, check_start, first_step_drift, still_logits
from nexus_ray.models.methods import Adapted
from nexus_ray.models.score import Rows, decode_rows, token_nll
from tests.expandable import CONFIGS, LAYERS, VOCAB, expandable, random_rows
from tests.tiny import tiny_tokenizer

each_architecture = pytest.mark.parametrize("name", CONFIGS)


def _expand(model: Any, positions: tuple[int, ...] | None = (0, 1, 3)) -> Expansion:
    return expand_blocks(model, 2 if positions is None else len(positions), positions=positions)


def _bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def _generate(model: Any) -> torch.Tensor:
    """Greedy continuation with a key-value cache, and the logits of each step; longer than the sliding windows."""
    prompt = random_rows(seed=5).input_ids[:, :9]
    answer = model.generate(
        prompt, max_new_tokens=8, do_sample=False, use_cache=True, return_dict_in_generate=True, output_logits=True
    )
    return torch.cat([answer.sequences.float(), *answer.logits], dim=1)


def _aligned(model: Any) -> Any:
    """The same model with every weight at the start of a cache line, as torch allocates them. In a mapped file they lie
    at multiples of 8 bytes, and on some processors MKL adds in another order there (its own condition for equal results
    is an alignment of 64 bytes)."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _train(model: Any, rows: Rows, *, steps: int, learning_rate: float) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        token_nll(model, rows).mean().backward()
        optimizer.step()


def _refusal(action: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    return str(caught.value)


# --- the identity ----------------------------------------------------------------------------------------------


def test_every_accepted_architecture_has_a_model_here() -> None:
    assert {config().model_type for config in CONFIGS.values()} == set(SILENCE)


@each_architecture
@pytest.mark.parametrize(
    ("positions", "dtype"),
    [(None, torch.float32), ((0, 1, 3), torch.float32), ((0, 1, 3), torch.bfloat16)],
    ids=["even", "chosen", "bfloat16"],
)
def test_logits_and_generation_are_the_bases(name: str, positions: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    model, rows = expandable(name, dtype=dtype), random_rows()
    before, generated = still_logits(model, rows), _generate(model)
    expansion = _expand(model, positions)
    check_identity(before, model, rows)
    torch.testing.assert_close(still_logits(model, rows), before, rtol=0, atol=0)
    torch.testing.assert_close(_generate(model), generated, rtol=0, atol=0)
    assert len(decoder_blocks(model)) == model.config.num_hidden_layers == LAYERS + len(expansion.new_blocks)


@each_architecture
def test_unsilenced_copies_would_be_seen(name: str) -> None:
    """The checks above have something to see: the same copies with their source's weights change the logits."""
    model, rows = expandable(name), random_rows()
    before = still_logits(model, rows)
    expansion = _expand(model)
    blocks = decoder_blocks(model)
    for index in expansion.new_blocks:
        blocks[index].load_state_dict(blocks[index - 1].state_dict())
    assert (still_logits(model, rows) - before).abs().max() > 0.01
    assert "differ by up to" in _refusal(lambda: check_identity(before, model, rows))


@each_architecture
def test_plain_transformers_reloads_the_grown_model(name: str, tmp_path: Path) -> None:
    model, rows = expandable(name), random_rows()
    before, generated = still_logits(model, rows), _generate(model)
    _expand(model)
    model.save_pretrained(tmp_path)
    loaded = _aligned(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert _same_bits(_bits(model), _bits(loaded))
    torch.testing.assert_close(still_logits(loaded, rows), before, rtol=0, atol=0)
    torch.testing.assert_close(_generate(loaded), generated, rtol=0, atol=0)


@each_architecture
def test_config_and_indices_follow_the_layers(name: str) -> None:
    """Each copy is of its source's kind: attention pattern, positions, dense or sparse; in memory as in the config."""
    model = expandable(name)
    kinds = [_kind(model, index) for index in range(LAYERS)]
    expansion = _expand(model)
    assert expansion.new_blocks == (1, 3, 6)
    origins = [0, 0, 1, 1, 2, 3, 3]
    assert [_kind(model, index) for index in range(len(origins))] == [kinds[layer] for layer in origins]
    for index, block in enumerate(decoder_blocks(model)):
        assert {module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")} == {index}
        assert all(module.config is model.config for module in block.modules() if hasattr(module, "config"))


def _kind(model: Any, index: int) -> tuple[Any, ...]:
    fresh = type(model)(model.config).get_decoder().layers[index]  # as the config says
    here = decoder_blocks(model)[index]
    found = [
        (type(b.mlp), *(getattr(b.self_attn, n, None) for n in ("sliding_window", "use_rope", "layer_type")))
        for b in (fresh, here)
    ]
    assert found[0] == found[1]
    types = getattr(model.config, "layer_types", None)
    return (*found[0], types and types[index])


def test_window_rule_follows_too() -> None:
    model = expandable("qwen2")
    _expand(model)
    assert model.config.max_window_layers == 4  # layers 0 and 1 with a copy each
    assert model.config.layer_types == ["full_attention"] * 4 + ["sliding_attention"] * 3
    again = type(model.config)(**{**model.config.to_dict(), "layer_types": None})
    assert again.layer_types == model.config.layer_types


def test_dense_layers_are_listed_where_the_rule_no_longer_says_them() -> None:
    model = expandable("qwen2_moe")  # sparse: layer 1 alone (every second, without 3)
    _expand(model)
    assert (model.config.decoder_sparse_step, model.config.mlp_only_layers) == (1, [0, 1, 4, 5, 6])


@each_architecture
def test_removed_blocks_leave_the_base(name: str) -> None:
    model = expandable(name)
    config, bits, generated = copy.deepcopy(model.config.to_dict()), _bits(model), _generate(model)
    expansion = _expand(model)
    only_new_blocks(model, expansion)
    _train(model, random_rows(), steps=2, learning_rate=1e-2)
    remove_blocks(model, Expansion.from_dict(json.loads(json.dumps(expansion.to_dict()))))
    model.requires_grad_(True)  # torch.matmul multiplies by frozen weights in another kernel, with another last bit
    assert _same_bits(_bits(model), bits)
    assert model.config.to_dict() == config
    torch.testing.assert_close(_generate(model), generated, rtol=0, atol=0)


@each_architecture
def test_meta_models_grow_without_storage(name: str) -> None:
    with torch.device("meta"):
        sketch = AutoModelForCausalLM.from_config(CONFIGS[name]())
    model = expandable(name)
    assert _expand(sketch) == _expand(model)
    assert all(parameter.device.type == "meta" for parameter in sketch.parameters())
    shapes = [[(n, p.shape) for n, p in grown.named_parameters()] for grown in (sketch, model)]
    assert shapes[0] == shapes[1]


def test_hidden_states_of_new_blocks_are_recorded() -> None:
    model, rows = expandable("qwen3"), random_rows()
    model(rows.input_ids, output_hidden_states=True)  # from here on transformers has hooks in the blocks
    _expand(model)
    assert len(model(rows.input_ids, output_hidden_states=True).hidden_states) == LAYERS + 3 + 1


# --- training --------------------------------------------------------------------------------------------------


@each_architecture
def test_only_new_blocks_move_and_all_of_them_do(name: str) -> None:
    model = expandable(name)
    expansion = _expand(model)
    assert only_new_blocks(model, expansion) == expansion.parameters
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    token_nll(model, random_rows(count=8)).mean().backward()
    silenced = {
        f"model.layers.{index}.{own}"
        for index in expansion.new_blocks
        for own in SILENCE[expansion.model_type].parameters(decoder_blocks(model)[index])
    }
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n, gradient in gradients.items() if gradient.any()} == silenced

    _train(model, random_rows(count=8), steps=5, learning_rate=1e-2)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(expansion.parameters)


def test_unfreeze_names() -> None:
    model = expandable("llama")
    expansion = _expand(model, (1,))  # copy at index 2
    own = [name for name in dict(model.named_parameters()) if name.startswith("model.layers.2.")]
    around = unfreeze_names(model, expansion, "neighbours")
    assert {name.split(".")[2] for name in around} == {"1", "3"} and len(around) == 2 * len(own)
    everything = unfreeze_names(model, expansion, "all")
    assert set(everything) | set(own) == set(dict(model.named_parameters())) and not set(everything) & set(own)
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < set(everything)
    last = _expand(expandable("llama"), (3,))
    grown = expandable("llama")
    _expand(grown, (3,))
    assert {name.split(".")[2] for name in unfreeze_names(grown, last, "neighbours")} == {"3"}


@each_architecture
def test_first_step_stays_within_the_bound_and_leaves_no_trace(name: str) -> None:
    model, old, new = expandable(name), random_rows(1), random_rows(2)
    base_logits = still_logits(model, old)
    expansion = _expand(model)
    only_new_blocks(model, expansion)
    model.train()
    bits, state = _bits(model), torch.random.get_rng_state()
    drift = check_start(model, expansion.parameters, base_logits, old_rows=old, new_rows=new, learning_rate=2e-4)
    assert abs(drift.nats) < 0.05 and drift.loss_after != drift.loss_before
    assert _same_bits(_bits(model), bits) and torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_drift_is_that_of_a_real_step() -> None:
    model, old, new = expandable("qwen3"), random_rows(1), random_rows(2)
    expansion = _expand(model)
    drift = first_step_drift(model, expansion.parameters, old_rows=old, new_rows=new, learning_rate=1e-3)
    only_new_blocks(model, expansion)
    _train(model, new, steps=1, learning_rate=1e-3)
    with torch.no_grad():
        after = token_nll(model, old).sum() / (old.targets >= 0).sum()
    assert drift.loss_after == pytest.approx(after.item(), abs=1e-6)


def test_too_large_a_step_is_refused() -> None:
    model, old = expandable("llama"), random_rows(1)
    base_logits = still_logits(model, old)
    old = replace(old, targets=base_logits.argmax(dim=-1))  # text that the base knows
    expansion = _expand(model)
    message = _refusal(
        lambda: check_start(
            model, expansion.parameters, base_logits, old_rows=old, new_rows=random_rows(2), learning_rate=1.0
        )
    )
    assert "training.learning_rate=1 " in message and "more than 0.05 allowed" in message
    assert "lower training.learning_rate" in message and "continual.expansion.positions" in message


def _learnable_rows(seed: int) -> Rows:
    """Text with rules: each token is followed by one of two, by a rule that depends on `seed` // 100."""
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randint(1, VOCAB, (VOCAB, 2), generator=torch.Generator().manual_seed(seed // 100))
    wire = torch.randint(1, VOCAB, (16, 33), generator=generator)
    for column in range(1, wire.shape[1]):
        choice = torch.randint(0, 2, (16,), generator=generator)
        wire[:, column] = rule[wire[:, column - 1], choice]
    return decode_rows(wire)


@pytest.mark.parametrize("name", ["olmo2", "gemma3_text", "llama"])
def test_zeroed_projections_break_a_post_norm_model_at_the_first_step(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both recipes start as the identity; where a norm follows the projection, one of them does not stay near it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    for step in range(40):
        _train(model, _learnable_rows(100 + step), steps=1, learning_rate=1e-2)
    old, new = _learnable_rows(190), _learnable_rows(290)
    base_logits = still_logits(model, old)
    expansion = _expand(model, None)
    steps: dict[str, Any] = {"old_rows": old, "new_rows": new, "learning_rate": 2e-4}
    ours = check_start(model, expansion.parameters, base_logits, **steps)

    for index in expansion.new_blocks:  # the recipe for pre-norm models
        block = decoder_blocks(model)[index]
        block.load_state_dict(decoder_blocks(model)[index - 1].state_dict())
        for own in SILENCE["llama"].parameters(block).values():
            torch.nn.init.zeros_(own)
    check_identity(base_logits, model, old)
    naive = first_step_drift(model, expansion.parameters, **steps)
    with capsys.disabled():
        print(
            f"\n{name}: loss {ours.loss_before:.3f}, first step {ours.nats:+.4f}, zeroed projections {naive.nats:+.4f}"
        )
    if name == "llama":
        assert naive == ours
    else:
        assert abs(ours.nats) < 0.01 and naive.nats > 0.05
        assert "moves the loss on old text" in _refusal(
            lambda: check_start(model, expansion.parameters, base_logits, **steps)
        )


# --- files and stacks ------------------------------------------------------------------------------------------


@each_architecture
def test_blocks_alone_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, base = expandable(name), expandable(name)
    expansion = _expand(model)
    only_new_blocks(model, expansion)
    _train(model, random_rows(), steps=2, learning_rate=1e-2)
    assert base_fingerprint(model, expansion) == base_fingerprint(base)
    file = save_blocks(model, expansion, tmp_path / "new" / "blocks.safetensors")
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert load_blocks(base, file) == expansion
    assert _same_bits(_bits(base), _bits(model)) and base.config.to_dict() == model.config.to_dict()


def test_a_stage_leaves_its_new_blocks_alone_beside_the_model(tmp_path: Path) -> None:
    model, base = expandable("llama"), expandable("llama")
    expansion = _expand(model)
    only_new_blocks(model, expansion)
    _train(model, random_rows(), steps=2, learning_rate=1e-2)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    adapted = Adapted(model, expansions=(expansion,))
    written = export_stage(adapted, tokenizer, tmp_path / "stage", state_dict=model.state_dict())
    assert [path.name for path in written] == ["model", "blocks.safetensors"]
    assert load_blocks(base, written[1]) == expansion and _same_bits(_bits(base), _bits(model))
    whole = AutoModelForCausalLM.from_pretrained(written[0])
    assert _same_bits(_bits(whole), _bits(model))

    model.requires_grad_(True)  # a stage that trained more than the blocks: they alone would not rebuild it
    written = export_stage(adapted, tokenizer, tmp_path / "opened", state_dict=model.state_dict())
    assert [path.name for path in written] == ["model"]


def test_blocks_file_of_a_bfloat16_base_fits_its_float32_copy_but_not_the_reverse(tmp_path: Path) -> None:
    model = expandable("qwen3", dtype=torch.bfloat16)
    wide = copy.deepcopy(model).float()
    expansion = _expand(model)
    assert load_blocks(wide, save_blocks(model, expansion, tmp_path / "b")) == expansion
    file = save_blocks(wide, expansion, tmp_path / "w")
    assert "load the base as float32" in _refusal(lambda: load_blocks(expandable("qwen3", dtype=torch.bfloat16), file))


def test_state_dict_stands_in_for_the_weights(tmp_path: Path) -> None:
    model, base = expandable("qwen2-tied"), expandable("qwen2-tied")
    expansion = _expand(model)
    weights = _bits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_blocks(base, save_blocks(model, expansion, tmp_path / "b", state_dict=weights))
    assert _same_bits(_bits(base), weights)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "smollm3-sliding", "gemma3_text"])
def test_expansions_stack_and_unstack(name: str, tmp_path: Path) -> None:
    model, rows = expandable(name), random_rows()
    config, bits = copy.deepcopy(model.config.to_dict()), _bits(model)
    first = _expand(model)
    only_new_blocks(model, first)
    _train(model, rows, steps=2, learning_rate=1e-2)
    middle, middle_logits, generated = _bits(model), still_logits(model, rows), _generate(model)

    second = expand_blocks(model, 3)
    torch.testing.assert_close(still_logits(model, rows), middle_logits, rtol=0, atol=0)
    torch.testing.assert_close(_generate(model), generated, rtol=0, atol=0)
    only_new_blocks(model, second)
    _train(model, random_rows(1), steps=2, learning_rate=1e-2)
    both = _bits(model)
    upper = save_blocks(model, second, tmp_path / "second")
    assert "remove the last one first" in _refusal(lambda: remove_blocks(model, first))

    remove_blocks(model, second)
    assert _same_bits(_bits(model), middle)
    lower = save_blocks(model, first, tmp_path / "first")
    remove_blocks(model, first)
    assert _same_bits(_bits(model), bits) and model.config.to_dict() == config

    assert "holds blocks for a" in _refusal(lambda: load_blocks(model, upper))
    assert load_blocks(model, lower) == first and load_blocks(model, upper) == second
    assert _same_bits(_bits(model), both)


# --- positions and refusals ------------------------------------------------------------------------------------


@given(st.data())
def test_positions_are_spread_evenly(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 80))
    count = data.draw(st.integers(1, layers))
    positions = expansion_positions(layers, count)
    assert len(positions) == count and positions[-1] == layers - 1
    gaps = {right - left for left, right in zip((-1, *positions), positions, strict=False)}
    assert gaps <= {layers // count, layers // count + 1}
    assert expansion_positions(layers, count, positions) == positions


def test_positions_of_llama_pro() -> None:
    assert expansion_positions(32, 8) == (3, 7, 11, 15, 19, 23, 27, 31)
    assert expansion_positions(30, 4) == (6, 14, 21, 29)


@pytest.mark.parametrize(
    ("count", "positions", "words"),
    [
        (0, None, "expand_blocks=0 is outside 1..4"),
        (5, None, "expand_blocks=5 is outside 1..4: each of the model's 4 layers"),
        (2, (0, 4), "[0, 4]: 4 is no layer of the model; use numbers in 0..3"),
        (1, (-1,), "[-1]: -1 is no layer"),
        (2, (1, 1), "[1, 1]: 1 is repeated"),
        (2, (3, 1), "[3, 1]: 3 stands before 1"),
        (3, (0, 1), "[0, 1] names 2 layers, continual.expand_blocks=3"),
    ],
)
def test_positions_out_of_range(count: int, positions: tuple[int, ...] | None, words: str) -> None:
    model = expandable("llama")
    bits = _bits(model)
    assert words in _refusal(lambda: expand_blocks(model, count, positions=positions))
    assert _same_bits(_bits(model), bits)


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4),
        transformers.FalconH1Config(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            mamba_d_ssm=32,
            mamba_n_heads=4,
        ),
    ],
    ids=["gpt2", "falcon_h1"],
)
def test_unknown_architectures_are_refused_with_the_known_ones(config: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    message = _refusal(lambda: expand_blocks(model, 1))
    assert f"model type {config.model_type} is not known" in message
    assert all(kind in message for kind in SILENCE) and "continual.use_lora" in message


def test_unknown_per_layer_fields_are_refused() -> None:
    model = expandable("llama")
    model.config.layer_scales = [1.0, 0.5, 0.5, 1.0]
    assert "layer_scales=[1.0, 0.5, 0.5, 1.0] has one entry per layer (4)" in _refusal(lambda: _expand(model))
    assert len(model.get_decoder().layers) == LAYERS
    model = expandable("llama")
    model.config.eos_token_id = [1, 2, 3, 4]  # as long as the layers, by chance
    _expand(model)


def test_wrappers_adapters_and_other_precisions_are_refused() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(expandable("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    assert "before it is wrapped" in _refusal(lambda: expand_blocks(adapted, 1))
    assert "holds adapters" in _refusal(lambda: expand_blocks(adapted.base_model.model, 1))
    half = expandable("llama", dtype=torch.float16)
    assert "has dtype float16" in _refusal(lambda: expand_blocks(half, 1))


def test_a_model_that_is_not_the_identity_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose output does not follow the table (here: a bias outside of it) is caught by the check at the end."""
    model = expandable("llama")
    for block in decoder_blocks(model):
        block.register_forward_hook(lambda module, inputs, output: output + 0.1)
    bits, config = _bits(model), model.config.to_dict()
    assert "does not start as its base" in _refusal(lambda: expand_blocks(model, 2))
    assert _same_bits(_bits(model), bits) and model.config.to_dict() == config


def test_another_base_is_refused_with_both_hashes(tmp_path: Path) -> None:
    model, other = expandable("llama"), expandable("llama", seed=1)
    expansion = _expand(model)
    file = save_blocks(model, expansion, tmp_path / "b")
    bits = _bits(other)
    message = _refusal(lambda: load_blocks(other, file))
    assert base_fingerprint(model, expansion) in message and base_fingerprint(other) in message
    assert _same_bits(_bits(other), bits)
    assert "4 layers, the model is a mistral of 4" in _refusal(lambda: load_blocks(expandable("mistral"), file))


def test_broken_block_files_are_refused(tmp_path: Path) -> None:
    model = expandable("llama")
    assert "is no file" in _refusal(lambda: load_blocks(model, tmp_path / "none"))
    expandable("llama").save_pretrained(tmp_path / "model")
    assert "holds no expansion blocks" in _refusal(lambda: load_blocks(model, tmp_path / "model" / "model.safetensors"))
    file = save_blocks(model, _expand(model), tmp_path / "b")
    file.write_bytes(file.read_bytes()[:-100])
    assert "no whole safetensors file" in _refusal(lambda: load_blocks(expandable("llama"), file))
