"""Interpolated weights: exact at the ends, float32 between them; the factor is chosen by held-out losses."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.errors import ConfigError, TrainingError
from nexus_ray.models.interpolate import choose_factor, interpolated
from tests.numerics.architectures import logits, tiny, train


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends_are_exact_and_the_middle_lies_between(dtype: torch.dtype) -> None:
    model = tiny("Gemma2", dtype=dtype)
    start = copy.deepcopy(dict(model.state_dict()))  # tied tensors stay tied
    train(model, steps=3, learning_rate=1e-2)
    end = model.state_dict()
    for state in (start, end):  # values at which `start + factor (end - start)` is not exact
        state["odd"] = torch.tensor([-0.0, -0.0, 1e30, 1.0, 1.0, float("inf")], dtype=dtype)
    end["odd"] = end["odd"].flip(0) * -1
    assert bits(interpolated(start, end, 0.0)) == bits(start)
    assert bits(interpolated(start, end, 1.0)) == bits(end)
    middle = interpolated(start, end, 0.25)
    key = "model.layers.0.mlp.up_proj.weight"
    exact = start[key].double() + 0.25 * (end[key].double() - start[key].double())
    torch.testing.assert_close(middle[key], exact.to(dtype), rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=1e-8)
    assert middle[key].dtype == dtype and middle[key].data_ptr() != end[key].data_ptr()
    assert middle["lm_head.weight"].data_ptr() == middle["model.embed_tokens.weight"].data_ptr()
    del middle["odd"]
    model.load_state_dict(middle)
    assert logits(model).isfinite().all()


def test_inputs_stay_and_integers_are_those_of_the_end() -> None:
    start = {"w": torch.zeros(2), "steps": torch.tensor([1])}
    end = {"w": torch.ones(2), "steps": torch.tensor([2])}
    result = interpolated(start, end, 0.5)
    assert result["w"].tolist() == [0.5, 0.5] and result["steps"].tolist() == [2]
    result["w"].fill_(9)
    interpolated(start, end, 0.0)["w"].fill_(9)
    assert start["w"].tolist() == [0, 0] and end["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("end", "factor", "message"),
    [
        ({"w": torch.ones(2)}, 1.5, "factor=1.5"),
        ({"w": torch.ones(2)}, float("nan"), "factor=nan"),
        ({"w": torch.ones(2), "v": torch.ones(1)}, 0.5, "v is in only one"),
        ({"w": torch.ones(3)}, 0.5, r"w is \(2,\) before and \(3,\) after"),
    ],
)
def test_models_that_do_not_fit_are_refused(end: dict[str, torch.Tensor], factor: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        interpolated({"w": torch.zeros(2)}, end, factor)


def test_lowest_weighted_mean_wins_and_ties_go_to_the_larger_factor() -> None:
    losses = {0.0: {"old": 1.0, "new": 3.0}, 0.5: {"old": 1.5, "new": 2.0}, 1.0: {"old": 2.5, "new": 1.0}}
    assert choose_factor(losses, {"old": 1, "new": 1}) == 1.0  # 3.5 twice
    assert choose_factor(losses, {"old": 2, "new": 1}) == 0.5  # 5 twice
    assert choose_factor(losses, {"old": 9, "new": 1}) == 0.0
    assert choose_factor(losses, {"old": 0, "new": 1}) == 1.0
    assert choose_factor({**losses, 1.0: {"old": float("nan"), "new": 0.0}}, {"old": 1, "new": 1}) == 0.5
    assert choose_factor({1.0: {"a": 1.0, "b": 9.0}, 0.0: {"a": 2.0}}, {"a": 1}) == 1.0


@given(
    rows=st.dictionaries(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.tuples(*[st.floats(0, 10)] * 3), min_size=1),
    weights=st.tuples(*[st.floats(0.125, 8)] * 3),
)
def test_no_factor_is_better_than_the_chosen_one(
    rows: dict[float, tuple[float, ...]], weights: tuple[float, ...]
) -> None:
    losses = {factor: dict(zip("abc", row, strict=True)) for factor, row in rows.items()}
    named = dict(zip("abc", weights, strict=True))
    chosen = choose_factor(losses, named)
    assert choose_factor(dict(reversed(losses.items())), dict(reversed(named.items()))) == chosen

    def mean(factor: float) -> float:
        return sum(named[domain] * losses[factor][domain] for domain in "abc") / sum(weights)

    assert all(mean(chosen) <= mean(other) + 1e-9 for other in losses)


@pytest.mark.parametrize(
    ("losses", "weights", "error", "message"),
    [
        ({}, {"a": 1.0}, ConfigError, "of 0 factors"),
        ({0.0: {"a": 1.0}}, {}, ConfigError, "positive weights"),
        ({0.0: {"a": 1.0}}, {"a": -1.0}, ConfigError, "positive weights"),
        ({0.0: {"a": 1.0}, 0.5: {}}, {"a": 1.0}, ConfigError, "factor 0.5 has no loss on a"),
        ({0.0: {"a": float("nan")}}, {"a": 1.0}, TrainingError, "no factor has finite"),
    ],
)
def test_losses_that_decide_nothing_are_refused(losses: dict, weights: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        choose_factor(losses, weights)
