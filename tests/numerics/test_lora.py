"""LoRA starts as the identity, merges to `W + scale B A`, comes apart to the bit, and loads in plain `peft`."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from nexus_ray.errors import ConfigError
from nexus_ray.models.fingerprint import base_sha256
from nexus_ray.models.lora import (
    adapter_parts,
    add_lora,
    export_adapter,
    export_stacked,
    load_adapter,
    merge_lora,
    merged_state,
    unmerge_lora,
)
from nexus_ray.models.targets import trainable_report
from tests.numerics.architectures import ARCHITECTURES, frozen_bytes, logits, same_bits, tiny, tokens, train
from tests.tiny import tiny_tokenizer

NAMES = list(ARCHITECTURES)
VARIANTS = [{}, {"rslora": True}, {"dora": True}]


def adapted(name: str = "Llama", *, steps: int = 5, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    model = add_lora(tiny(name, dtype=dtype), **{"rank": 4, "alpha": 8, "seed": 1, **options})
    if steps:
        train(model, steps=steps, learning_rate=1e-2)
    return model.eval()


def lora_layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


# --- start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_adapted_model_starts_as_its_base(name: str, options: dict[str, Any]) -> None:
    base = tiny(name)
    before, hash_before = logits(base), base_sha256(base)
    state = torch.get_rng_state()
    model = add_lora(base, rank=4, alpha=8, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), before)
    assert base_sha256(model) == hash_before
    assert not model.training and model.config._attn_implementation == "eager" and model.dtype == torch.float32


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_bfloat16_base_has_float32_adapters_and_the_same_logits(options: dict[str, Any]) -> None:
    base = tiny("Llama", dtype=torch.bfloat16)
    before = logits(base)
    model = add_lora(base, rank=4, alpha=8, seed=1, **options)
    assert torch.equal(logits(model), before) and model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert base_sha256(model) == base_sha256(tiny("Llama", dtype=torch.bfloat16).float())


def test_adapters_are_a_function_of_the_seed() -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        return {k: v for k, v in adapted(steps=0, seed=seed).state_dict().items() if "lora_A" in k}

    torch.manual_seed(7)
    one = state(1)
    torch.manual_seed(8)
    again, other = state(1), state(2)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        ("Phi3", "down_proj gate_up_proj o_proj qkv_proj"),
        ("Mixtral", "k_proj o_proj q_proj v_proj"),
    ],
)
def test_default_targets(name: str, expected: str) -> None:
    model = adapted(name, steps=0)
    assert " ".join(sorted(model.peft_config["default"].target_modules)) == expected
    assert len(lora_layers(model)) == 2 * len(expected.split())


def test_names_that_other_modules_share_are_spelled_out() -> None:
    model = tiny("Llama")
    model.q_proj = nn.Linear(32, 32)  # outside the blocks
    assert "model.layers.0.self_attn.q_proj" in add_lora(model, rank=2, alpha=2, seed=0).targeted_module_names
    assert not hasattr(model.q_proj, "lora_A")


def test_chosen_targets() -> None:
    layers = lora_layers(adapted(steps=0, targets=["self_attn.q_proj", "up_proj"]))
    assert sorted({name.rpartition(".")[2] for name in layers}) == ["q_proj", "up_proj"] and len(layers) == 4
    assert len(lora_layers(adapted(steps=0, targets="all-linear"))) == 14


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_frozen_bytes_stay_and_the_loss_falls(name: str) -> None:
    model = adapted(name, steps=0)
    kept = frozen_bytes(model)
    assert kept and all("lora_" not in key for key in kept)
    losses = train(model, steps=5, learning_rate=1e-2)
    assert same_bits(model, kept)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_learn(options: dict[str, Any]) -> None:
    losses = train(adapted(steps=0, **options), steps=20, learning_rate=1e-2)
    assert losses[-1] < losses[0] - 0.2


def test_dropout_is_for_training_only() -> None:
    model = adapted(dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Olmo2", "Mixtral"])
def test_activation_checkpointing_gives_the_same_gradients(name: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = adapted(name, steps=2)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        ids = tokens()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 2 * len(lora_layers(adapted(name, steps=0)))
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[key], checkpointed[key]) and plain[key].abs().sum() > 0 for key in plain)


def test_report_counts_what_is_trained() -> None:
    model = adapted(steps=0)
    rows = {row.kind: row for row in trainable_report(model)}
    assert list(rows) == ["embeddings", "attention", "feed-forward", "norms", "head", "all"]
    assert rows["attention"].trainable == 2 * 4 * (4 * 32 + 2 * 32 + 2 * 16)
    assert rows["feed-forward"].trainable == 2 * 4 * 3 * (32 + 48)
    assert rows["embeddings"].trainable == 0 and rows["embeddings"].total == 64 * 32
    assert rows["all"].trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert rows["all"].total == sum(p.numel() for p in model.parameters())
    assert rows["all"].share == rows["all"].trainable / rows["all"].total
    kinds = {row.kind: row.total for row in trainable_report(tiny("Mixtral"))}
    assert kinds["experts"] == 2 * 4 * 3 * 32 * 48 and kinds["routers"] == 2 * 4 * 32


# --- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_merge_is_exact_idempotent_and_undone_to_the_bit(name: str, options: dict[str, Any]) -> None:
    model = adapted(name, **options)
    kept, apart = frozen_bytes(model), logits(model)
    scale = 8 / math.sqrt(4) if "rslora" in options else 8 / 4
    expected = {}
    for key, layer in lora_layers(model).items():
        total = layer.base_layer.weight + scale * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        if "dora" in options:
            total = total * (layer.lora_magnitude_vector["default"].weight / total.norm(dim=1))[:, None]
        expected[key.removeprefix("base_model.model.")] = total.detach()
    state = merged_state(model)
    assert same_bits(model, kept)

    base = merge_lora(model)
    assert type(base).__name__ == f"{name}ForCausalLM" and not lora_layers(base)
    assert state.keys() == base.state_dict().keys() == tiny(name).state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    assert all(torch.equal(base.get_submodule(key).weight, value) for key, value in expected.items())
    assert all(p.requires_grad for p in base.parameters())
    torch.testing.assert_close(logits(base), apart, rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(base), logits(tiny(name)))

    merged = {key: p.detach().clone() for key, p in base.named_parameters()}
    assert merge_lora(base) is base and merge_lora(model) is base
    assert same_bits(base, merged)

    assert unmerge_lora(base) is model
    assert same_bits(model, kept) and torch.equal(logits(model), apart)
    assert frozen_bytes(model).keys() == kept.keys()
    assert base_sha256(model) == base_sha256(tiny(name))


def test_merge_in_bfloat16_adds_in_float32() -> None:
    model = adapted(dtype=torch.bfloat16)
    layer = lora_layers(model)["base_model.model.model.layers.0.mlp.up_proj"]
    update = 2 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    expected = (layer.base_layer.weight.float() + update).bfloat16()
    base = merge_lora(model, keep_base=False)
    assert torch.equal(base.model.layers[0].mlp.up_proj.weight, expected)
    with pytest.raises(ConfigError, match="keep_base=True"):
        unmerge_lora(base)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_model_saves_and_keeps_its_ties(tied: bool, tmp_path: Path) -> None:
    model = add_lora(tiny("Llama", tie_word_embeddings=tied), rank=4, alpha=8, seed=1)
    train(model, steps=3, learning_rate=1e-2)
    state = merged_state(model)
    assert (state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()) == tied
    base = merge_lora(model)
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied
    base.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert torch.equal(logits(loaded), logits(base))


def test_merged_model_takes_another_adapter() -> None:
    base = merge_lora(adapted(), keep_base=False)
    before = logits(base)
    again = add_lora(base, rank=2, alpha=2, seed=2)
    assert torch.equal(logits(again), before)
    assert train(again, steps=3, learning_rate=1e-2)[-1] < train(again, steps=1, learning_rate=0.0)[0] + 1.0


def test_adapted_model_generates_as_its_merged_form() -> None:
    model = adapted(steps=20)
    apart = model.generate(input_ids=tokens(rows=1), max_new_tokens=8, do_sample=False)
    together = merge_lora(model).generate(input_ids=tokens(rows=1), max_new_tokens=8, do_sample=False)
    assert torch.equal(apart, together)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Phi3", "Mixtral"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_adapter_loads_in_plain_peft(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path / "base")
    model = adapted(name, **options)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer") if name == "Llama" else tmp_path / "base"
    reference = str(tmp_path / "base")
    folder = export_adapter(
        model, tmp_path / "a", base_reference=reference, base_sha256=base_sha256(model), tokenizer_dir=tokenizer
    )
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(written) and "config.json" not in written
    assert sum(map(len, written.values())) < 400_000

    apart = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(name), str(folder))), apart)
    ours = load_adapter(tiny(name), folder)
    assert torch.equal(logits(ours), apart) and any(p.requires_grad for p in ours.parameters())
    if name != "Llama":  # whose tiny tokenizer has more entries than the tiny model has embeddings
        found = AutoPeftModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager")
        assert torch.equal(logits(found), apart)

    again = export_adapter(
        ours, tmp_path / "a", base_reference=reference, base_sha256=base_sha256(ours), tokenizer_dir=tokenizer
    )
    assert {path.name: path.read_bytes() for path in again.iterdir()} == written


def test_export_takes_gathered_weights(tmp_path: Path) -> None:
    model = adapted()
    gathered = {key: value.clone() for key, value in model.state_dict().items()}
    apart = logits(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.zero_()
    folder = export_adapter(
        model,
        tmp_path / "a",
        base_reference="nowhere",
        base_sha256=base_sha256(model),
        tokenizer_dir=tiny_tokenizer(tmp_path / "tokenizer"),
        state_dict=gathered,
    )
    assert torch.equal(logits(load_adapter(tiny("Llama"), folder)), apart)
    merged = merged_state(model, gathered)
    base = tiny("Llama")
    base.load_state_dict(merged)
    torch.testing.assert_close(logits(base), apart, rtol=1e-4, atol=1e-4)


def test_another_base_is_refused(tmp_path: Path) -> None:
    model = adapted()
    expected = base_sha256(model)
    folder = export_adapter(
        model,
        tmp_path / "a",
        base_reference="some/base",
        base_sha256=expected,
        tokenizer_dir=tiny_tokenizer(tmp_path / "tokenizer"),
    )
    other = tiny("Llama")
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-6
    with pytest.raises(ConfigError) as error:
        load_adapter(other, folder)
    assert expected in str(error.value) and base_sha256(other) in str(error.value) and "some/base" in str(error.value)
    with pytest.raises(ConfigError, match="no adapter_model"):
        load_adapter(other, tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    with pytest.raises(ConfigError, match=r"has no base\.json"):
        load_adapter(tiny("Llama"), tmp_path / "plain")


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("Llama", {"rank": 17}, ["continual.lora_rank=17", "layers.0.self_attn.k_proj (16)", "at most 16"]),
        ("Llama", {"rank": 0}, ["continual.lora_rank=0", "at least 1"]),
        ("Llama", {"alpha": 0}, ["continual.lora_alpha=0"]),
        ("Llama", {"dropout": 1.0}, ["continual.lora.dropout=1.0"]),
        ("Llama", {"targets": ["q_prj"]}, ["continual.lora.targets", "'q_prj' matches no module", "q_proj"]),
        ("Llama", {"targets": ["q_proj", "lm_head"]}, ["'lm_head' is no matrix inside a decoder block"]),
        ("Llama", {"targets": ["self_attn"]}, ["'self_attn' is no matrix"]),
        ("Llama", {"targets": []}, ["continual.lora.targets", "no linear layer"]),
        ("Mixtral", {"targets": ["gate"]}, ["router model.layers.0.mlp.gate"]),
        ("Mixtral", {"targets": ["gate_up_proj"]}, ["'gate_up_proj' is a stack of experts", "q_proj"]),
        ("Qwen3Moe", {"targets": "all-linear"}, ["all-linear", "stack of experts", "unset"]),
        ("GPT2", {}, ["transformer.h.0.attn.c_attn", "pytorch_utils.Conv1D", "not a torch.nn.Linear"]),
    ],
    ids=str,
)
def test_refusals_name_field_value_and_way_out(name: str, options: dict[str, Any], parts: list[str]) -> None:
    model = tiny(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError) as error:
        add_lora(model, **{"rank": 4, "alpha": 8, "seed": 0, **options})
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert model.state_dict().keys() == before.keys() and all(p.requires_grad for p in model.parameters())


def test_unfit_modules_are_refused() -> None:
    def refusal(model: nn.Module) -> str:
        with pytest.raises(ConfigError, match=r"continual\.lora\.targets") as error:
            add_lora(model, rank=2, alpha=2, seed=0)
        return str(error.value)

    quantised = tiny("Llama")
    quantised.config.quantization_config = {"quant_method": "gptq"}
    assert "quantised" in refusal(quantised)
    stored = tiny("Llama")
    stored.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), False)
    assert "layers.1.mlp.up_proj holds torch.uint8" in refusal(stored)
    shared = tiny("Llama")
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    assert "shared" in refusal(shared)
    assert "adapted already" in refusal(adapted(steps=0))
    assert "lists of None decoder blocks" in refusal(nn.Sequential(nn.Linear(4, 4)))


def test_exported_config_is_readable_by_serving_tools(tmp_path: Path) -> None:
    folder = export_adapter(
        adapted(steps=0),
        tmp_path / "a",
        base_reference="some/base",
        base_sha256="0" * 64,
        tokenizer_dir=tiny_tokenizer(tmp_path / "tokenizer"),
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["task_type"] == "CAUSAL_LM"
    assert config["r"] == 4 and config["lora_alpha"] == 8 and isinstance(config["lora_alpha"], int)
    assert config["target_modules"] == sorted(config["target_modules"]) and config["inference_mode"]


def test_adapters_of_several_stages_stack_into_one(tmp_path: Path) -> None:
    """Each stage's own adapter, merged before the next one starts: the sum of all, as one adapter of the first base,
    computes what the model of the last stage does."""
    model = tiny("Llama")
    start, base, adapters = copy.deepcopy(model), base_sha256(model), []
    for rank, targets in ((4, None), (2, ["q_proj", "up_proj"])):
        stage = add_lora(model, rank=rank, alpha=8.0, targets=targets, seed=rank)
        train(stage, steps=3, learning_rate=1e-2)
        adapters.append(adapter_parts(stage))
        expected = logits(stage)
        model = merge_lora(stage, keep_base=False)
    tiny_tokenizer(tmp_path / "tokenizer")
    folder = export_stacked(
        adapters, tmp_path / "all", base_reference="base", base_sha256=base, tokenizer_dir=tmp_path / "tokenizer"
    )
    assert not torch.allclose(logits(start), expected, atol=1e-3)
    together = PeftModel.from_pretrained(start, str(folder)).eval()
    torch.testing.assert_close(logits(together), expected, rtol=0, atol=1e-5)
