"""OSFT starts as the identity, learns, and never moves what it preserves, whatever the optimizer does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import nexus_ray.models.osft as osft
from nexus_ray.errors import ConfigError
from nexus_ray.models.fingerprint import base_sha256
from nexus_ray.models.osft import OsftLinear, add_osft, leak, merge_osft, merged_state, model_leak, preserved
from nexus_ray.models.targets import trainable_report
from tests.numerics.architectures import ARCHITECTURES, frozen_bytes, logits, same_bits, tiny, tokens, train

NAMES = list(ARCHITECTURES)
SHAPES = {"square": (24, 24), "tall": (40, 24), "wide": (24, 40)}


def layers(model: Any) -> dict[str, OsftLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, OsftLinear)}


def adapted(name: str = "Llama", *, ratio: float = 0.25, steps: int = 0, **options: Any) -> Any:
    model = add_osft(tiny(name, **options), unfreeze_rank_ratio=ratio)
    if steps:
        train(model, steps=steps, learning_rate=1e-2)
    return model


def random_layer(shape: str, *, ratio: float = 0.25, bias: bool = True) -> OsftLinear:
    """A layer whose update is not zero."""
    outputs, inputs = SHAPES[shape]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = OsftLinear(nn.Linear(inputs, outputs, bias=bias).requires_grad_(False), ratio)
        nn.init.normal_(layer.osft_core)
    return layer


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [0, 4096])
def test_starts_as_its_base_and_trains_the_cores_alone(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(osft, "TYPICAL_TOKENS", limit)
    base = tiny(name)
    before, weights = logits(base), frozen_bytes(base.requires_grad_(False))
    model = adapted(name)
    assert {layer.adds_first for layer in layers(model).values()} == {limit > 0}
    assert torch.equal(logits(model), before)
    kept = frozen_bytes(model)
    assert kept.keys() == weights.keys() and all(torch.equal(kept[key], weights[key]) for key in kept)
    losses = train(model, steps=5, learning_rate=1e-2)
    assert same_bits(model, kept) and losses[-1] < losses[0]
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {f"{k}.osft_core" for k in layers(model)}
    assert model_leak(model) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_merge_gives_plain_weights_that_have_not_leaked(name: str) -> None:
    start = tiny(name).state_dict()
    model = adapted(name, steps=5)
    apart, names = logits(model), list(layers(model))
    state = merged_state(model)
    assert list(layers(model)) == names
    merged = merge_osft(model)
    assert merged is model and not layers(merged) and all(p.requires_grad for p in merged.parameters())
    assert merged.state_dict().keys() == start.keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in merged.state_dict().items())
    torch.testing.assert_close(logits(merged), apart, rtol=1e-4, atol=1e-4)
    for key in start:
        if key.removesuffix(".weight") in names:
            before, after = start[key], merged.state_dict()[key]
            assert not torch.equal(before, after)
            assert leak(before, after, *preserved(before, 0.25)) < 1e-3
        else:
            assert torch.equal(start[key], merged.state_dict()[key])
    once = {key: p.detach().clone() for key, p in merged.named_parameters()}
    assert same_bits(merge_osft(merged), once)


def test_merged_model_loads_in_plain_transformers_with_its_ties(tmp_path: Path) -> None:
    model = merge_osft(adapted("Llama", steps=3, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")), logits(model)
    )


def test_a_second_stage_preserves_what_the_first_learned() -> None:
    start = tiny("Llama").state_dict()
    first = merge_osft(adapted(ratio=0.5, steps=10))
    middle = copy.deepcopy(first.state_dict())
    before = logits(first)
    second = add_osft(first, unfreeze_rank_ratio=0.25)
    assert torch.equal(logits(second), before)
    train(second, steps=10, learning_rate=1e-2)
    assert model_leak(second) < 1e-5
    end = merge_osft(second).state_dict()
    key = "model.layers.0.mlp.up_proj.weight"
    assert preserved(start[key], 0.5)[0].shape[1] == 16 and preserved(middle[key], 0.25)[0].shape[1] == 24
    assert leak(middle[key], end[key], *preserved(middle[key], 0.25)) < 1e-3
    # What the second stage preserves is not what the first one did.
    assert leak(middle[key], end[key], *preserved(start[key], 0.25)) > 1e-2


def test_saved_bases_belong_to_the_saved_cores() -> None:
    model = adapted(steps=3)
    other = adapted()
    with torch.no_grad():
        for layer in layers(other).values():  # as another LAPACK may have it
            layer.osft_left.mul_(-1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Olmo2"])
def test_activation_checkpointing_gives_the_same_gradients(name: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = adapted(name, steps=2)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        ids = tokens()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 14 and plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[key], checkpointed[key]) and plain[key].abs().sum() > 0 for key in plain)


def test_hash_and_report_see_through_the_layers() -> None:
    model = adapted(steps=1)
    rows = {row.kind: row for row in trainable_report(model)}
    # r = 8 of 32, 4 of 16: q and o are square (r x r), k and v wide (r x 32); up and gate tall (48 x r), down wide.
    assert rows["attention"].trainable == 2 * (2 * 8 * 8 + 2 * 4 * 32)
    assert rows["feed-forward"].trainable == 2 * 3 * 48 * 8
    assert rows["all"].trainable == sum(layer.osft_core.numel() for layer in layers(model).values())
    assert rows["norms"].trainable == rows["embeddings"].trainable == 0
    kept = {key: p for key, p in model.named_parameters() if "osft_core" not in key}
    assert kept.keys() == dict(tiny("Llama").named_parameters()).keys()
    assert base_sha256(model) == base_sha256(tiny("Llama"))


# --- leaks ---------------------------------------------------------------------------------------------------------


def train_projected(model: Any, ratio: float, *, steps: int, learning_rate: float) -> list[float]:
    """Full weights of all targets under AdamW, their gradients projected, as `peft`'s OSF does it."""
    names = list(layers(adapted(ratio=ratio)))
    model.requires_grad_(False)
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in names]
    bases = [preserved(weight, ratio) for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    ids, losses = tokens(rows=8), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        for weight, (left, right) in zip(weights, bases, strict=True):
            weight.grad -= left @ (left.T @ weight.grad)
            weight.grad -= (weight.grad @ right.T) @ right
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_projected_gradients_leak_under_adamw_and_ours_do_not() -> None:
    ratio, steps = 0.25, 30
    start = {name: p.detach().clone() for name, p in tiny("Llama").named_parameters()}

    def leaks(state: dict[str, Tensor]) -> list[float]:
        keys = [f"{name}.weight" for name in layers(adapted(ratio=ratio))]
        return [leak(start[key], state[key], *preserved(start[key], ratio)) for key in keys]

    projected = tiny("Llama")
    theirs = train_projected(projected, ratio, steps=steps, learning_rate=3e-3)
    model = adapted(ratio=ratio)
    ours = train(model, steps=steps, learning_rate=1e-2)
    assert min(leaks(dict(projected.named_parameters()))) > 0.1
    assert model_leak(model) < 1e-5
    assert max(leaks(merged_state(model))) < 1e-4
    assert theirs[-1] < theirs[0] - 0.5 and ours[-1] < ours[0] - 0.5


def test_full_training_leaks_nearly_everything() -> None:
    start, model = tiny("Llama").state_dict(), tiny("Llama")
    train(model, steps=3, learning_rate=1e-3)
    key = "model.layers.1.self_attn.q_proj.weight"
    # 1 - (1/4)^2 of a random update's squares lie outside the quarter that may change on both sides.
    assert leak(start[key], model.state_dict()[key], *preserved(start[key], 0.25)) > 0.8
    assert leak(start[key], start[key], *preserved(start[key], 0.25)) == 0.0


def test_meter_sees_each_side() -> None:
    start = torch.randn(24, 20, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(start)

    def moved(column: int, row: int) -> float:
        now = start + torch.outer(left[:, column], right[row])
        return leak(start, now, *preserved(start, 0.25))  # the last 5 of 20 directions may change

    assert moved(23, 19) < 1e-5 and moved(15, 15) < 1e-5
    assert moved(14, 19) == pytest.approx(1) and moved(23, 14) == pytest.approx(1) and moved(0, 0) == pytest.approx(1)
    now = start + 3 * torch.outer(left[:, 0], right[19]) + 4 * torch.outer(left[:, 20], right[19])
    assert leak(start, now, *preserved(start, 0.25)) == pytest.approx(3 / 5, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_updates_are_orthogonal_on_both_sides(shape: str) -> None:
    layer = random_layer(shape)
    left, right = preserved(layer.weight, 0.25)
    assert left.shape == (SHAPES[shape][0], 18) and right.shape == (18, SHAPES[shape][1])
    update = layer.update()
    assert update.norm() > 1
    assert (left.T @ update).norm() / update.norm() < 1e-5 and (update @ right.T).norm() / update.norm() < 1e-5
    assert torch.linalg.matrix_rank(update) == layer.rank == 6
    anything = torch.randn(SHAPES[shape], generator=torch.Generator().manual_seed(1)).double()
    expected = anything - left @ left.T @ anything.float()
    expected = expected - expected.float() @ right.T @ right
    torch.testing.assert_close(layer.allowed(anything), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_reaches_every_update_that_projected_factors_reach(shape: str) -> None:
    layer = random_layer(shape)
    left_high, right_high = preserved(layer.weight, 0.25)
    generator = torch.Generator().manual_seed(2)
    left = torch.randn(SHAPES[shape][0], 6, generator=generator)
    right = torch.randn(6, SHAPES[shape][1], generator=generator)
    left = left - left_high @ (left_high.T @ left)
    right = right - (right @ right_high.T) @ right_high
    low = layer.weight - left_high @ (left_high.T @ layer.weight)
    wanted = left @ right - low  # from the low part of W to trained, projected factors
    core = layer.osft_left.T @ wanted if not layer.tall else wanted
    core = core @ layer.osft_right.T if not layer.wide else core
    torch.testing.assert_close(layer.update(core), wanted, rtol=1e-4, atol=1e-4)


def test_whole_ratio_may_change_everything() -> None:
    layer = random_layer("tall", ratio=1.0)
    assert layer.osft_left.shape == (40, 0) and layer.rank == 24
    torch.testing.assert_close(layer.allowed(layer.weight), layer.weight, rtol=1e-4, atol=1e-5)
    assert OsftLinear(nn.Linear(30, 30), 0.1).rank == 3  # not 4, as 30 * 0.1 in binary has it rounded up


# --- the layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adds_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_those_of_the_merged_weight(shape: str, adds_first: bool, bias: bool) -> None:
    layer = random_layer(shape, bias=bias).double()
    layer.osft_left, layer.osft_right = layer.osft_left.double(), layer.osft_right.double()
    layer.adds_first = adds_first
    x = torch.randn(2, 5, SHAPES[shape][1], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x.requires_grad_(True)
    core = layer.osft_core.detach().clone().requires_grad_(True)
    left, right = layer.factors(core, torch.float64)
    expected = F.linear(x, layer.weight + left @ right, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    wanted = torch.autograd.grad(expected.square().sum(), (x, core))
    found = torch.autograd.grad(layer(x).square().sum(), (x, layer.osft_core))
    torch.testing.assert_close(found, wanted)


def test_the_way_is_chosen_by_shape_alone() -> None:
    def adds_first(outputs: int, inputs: int) -> bool:
        with torch.device("meta"):
            return OsftLinear(nn.Linear(inputs, outputs), 0.25).adds_first

    assert adds_first(4096, 4096) and adds_first(14336, 4096) and not adds_first(8192, 28672)


def test_casting_a_model_leaves_its_bases_exact() -> None:
    model = adapted(steps=5).bfloat16()
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    assert layer.weight.dtype == layer.osft_core.dtype == torch.bfloat16
    assert layer.osft_left.dtype == layer.osft_right.dtype == torch.float32
    assert model_leak(model) < 1e-5
    wide = add_osft(tiny("Llama", dtype=torch.bfloat16), unfreeze_rank_ratio=0.25)
    assert torch.equal(logits(wide), logits(tiny("Llama", dtype=torch.bfloat16)))
    assert all(layer.osft_core.dtype == torch.float32 for layer in layers(wide).values())
    losses = train(wide, steps=10, learning_rate=1e-2)
    assert losses[-1] < losses[0] and model_leak(wide) < 1e-5
    expected = layers(wide)["model.layers.0.mlp.up_proj"].merged().bfloat16()
    assert torch.equal(merge_osft(wide).model.layers[0].mlp.up_proj.weight, expected)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("Llama", {"unfreeze_rank_ratio": 0.0}, ["continual.osft.unfreeze_rank_ratio=0.0", "(0, 1]", "0.1 to 0.3"]),
        ("Llama", {"unfreeze_rank_ratio": 1.5}, ["continual.osft.unfreeze_rank_ratio=1.5"]),
        ("Llama", {"unfreeze_rank_ratio": float("nan")}, ["continual.osft.unfreeze_rank_ratio=nan"]),
        ("Llama", {"targets": ["lm_head"]}, ["continual.osft.targets", "'lm_head' is no matrix"]),
        ("Mixtral", {"targets": ["experts"]}, ["continual.osft.targets", "'experts' is a stack of experts"]),
        ("GPT2", {}, ["continual.osft.targets", "Conv1D"]),
    ],
    ids=str,
)
def test_refusals_name_field_value_and_way_out(name: str, options: dict[str, Any], parts: list[str]) -> None:
    model = tiny(name)
    with pytest.raises(ConfigError) as error:
        add_osft(model, **{"unfreeze_rank_ratio": 0.25, **options})
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert not layers(model) and all(p.requires_grad for p in model.parameters())


def test_unfit_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="adapted already"):
        add_osft(adapted(), unfreeze_rank_ratio=0.25)
    broken = tiny("Llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj holds values that are not finite"):
        add_osft(broken, unfreeze_rank_ratio=0.25)
    assert not layers(broken) and all(p.requires_grad for p in broken.parameters())
