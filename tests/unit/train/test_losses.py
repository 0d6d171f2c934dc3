"""The weighted loss is alpha L_new + (1 - alpha) L_replay in expectation; sums per domain are exact."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.train.losses import domain_sums, loss_by_domain, row_weights, weighted_sum

ratios = st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.75, 0.99])


def replayed(*rows: int) -> torch.Tensor:
    return torch.tensor([bool(row) for row in rows])


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.floats(0, 1))
def test_without_alpha_every_row_weighs_one(rows: list[bool], ratio: float) -> None:
    """The default is the plain token mean, whatever the batch happens to hold."""
    assert torch.equal(row_weights(torch.tensor(rows), alpha=None, replay_ratio=ratio), torch.ones(len(rows)))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_where_nothing_is_replayed_or_nothing_is_new_every_row_weighs_one(ratio: float) -> None:
    """A stage without replay (the first one) ignores alpha instead of scaling its learning rate."""
    assert torch.equal(row_weights(replayed(0, 1), alpha=0.9, replay_ratio=ratio), torch.ones(2))


@given(ratios)
def test_alpha_of_one_minus_the_ratio_is_the_token_mean(ratio: float) -> None:
    """The default value, stated explicitly, changes nothing beyond the rounding of float32."""
    weights = row_weights(replayed(0, 1), alpha=1.0 - ratio, replay_ratio=ratio)
    torch.testing.assert_close(weights, torch.ones(2), rtol=1e-6, atol=0)


@given(ratios, st.floats(0, 1))
def test_weights_are_those_of_the_formula(ratio: float, alpha: float) -> None:
    """A new token weighs alpha / (1 - r), a replayed one (1 - alpha) / r."""
    new, old = row_weights(replayed(0, 1), alpha=alpha, replay_ratio=ratio).tolist()
    assert math.isclose(new, alpha / (1 - ratio), rel_tol=1e-6, abs_tol=1e-7)
    assert math.isclose(old, (1 - alpha) / ratio, rel_tol=1e-6, abs_tol=1e-7)


@given(st.floats(0, 1), st.integers(0, 2**16))
def test_a_batch_that_holds_the_planned_share_has_exactly_the_weighted_loss(alpha: float, seed: int) -> None:
    """With r of the tokens replayed, sum(w nats) / tokens = alpha mean_new + (1 - alpha) mean_replay."""
    generator = torch.Generator().manual_seed(seed)
    nll_BT = torch.rand(8, 5, generator=generator, dtype=torch.float64)
    mask = replayed(1, 0, 0, 0, 1, 0, 0, 0)
    weights = row_weights(mask, alpha=alpha, replay_ratio=0.25)
    loss = weighted_sum(nll_BT, weights) / nll_BT.numel()
    expected = alpha * nll_BT[~mask].mean() + (1 - alpha) * nll_BT[mask].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_a_batch_with_less_replay_than_planned_does_not_inflate_it() -> None:
    """The denominator is all targets: a lone replayed row counts by the plan's ratio, not by the batch's."""
    nll_BT = torch.ones(10, 4)
    weights = row_weights(replayed(1, *[0] * 9), alpha=0.5, replay_ratio=0.25)
    assert weights[0] == 2.0
    torch.testing.assert_close(weighted_sum(nll_BT, weights) / 40, torch.tensor((2.0 + 9 * 2 / 3) / 10))


def test_micro_batches_add_up_to_the_batch() -> None:
    """Sums, not means, are accumulated: any cut of the rows gives the same loss."""
    nll_BT, weights = torch.rand(12, 7, dtype=torch.float64), torch.rand(12)
    parts = sum(weighted_sum(nll_BT[i : i + 5], weights[i : i + 5]) for i in range(0, 12, 5))
    torch.testing.assert_close(torch.as_tensor(parts), weighted_sum(nll_BT, weights))


def test_domain_sums_count_nats_targets_and_rows_and_leave_padding_out() -> None:
    """Padded rows (domain -1) belong to nobody; a domain that does not occur has no loss."""
    nll_BT = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.5, 0.5], [9.0, 9.0]])
    targets_B, domain_B = torch.tensor([2, 1, 2, 2]), torch.tensor([2, 0, 2, -1], dtype=torch.int16)
    sums = domain_sums(nll_BT, targets_B, domain_B, 3)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [[3.0, 1.0, 1.0], [0.0, 0.0, 0.0], [4.0, 4.0, 2.0]]
    assert loss_by_domain(sums, ["a", "b", "c"]) == {"a": 3.0, "c": 1.0}
