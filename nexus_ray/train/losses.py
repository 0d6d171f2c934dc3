"""The loss of a stage: token means over the global batch, weighted towards new or replayed text. Pure.

L = alpha L_new + (1 - alpha) L_replay in expectation. With the plan's replay ratio r, a new token weighs
alpha / (1 - r) and a replayed one (1 - alpha) / r, and the sum is divided by all target tokens of the global batch, so
that a batch which happens to hold little replay is not distorted. alpha = 1 - r is the plain token mean.

Dimensions: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_weights(replayed_B: Tensor, *, alpha: float | None, replay_ratio: float) -> Tensor:
    """Loss weight of each row, float32 [B]; ones where alpha is left at its default of 1 - replay_ratio."""
    ones = torch.ones(replayed_B.shape, dtype=torch.float32)
    if alpha is None or replay_ratio in (0.0, 1.0):
        return ones
    new, replay = alpha / (1.0 - replay_ratio), (1.0 - alpha) / replay_ratio
    return torch.where(replayed_B, ones * replay, ones * new)


def weighted_sum(nll_BT: Tensor, weight_B: Tensor) -> Tensor:
    """Sum over tokens of weight x nats; non-targets must already be 0."""
    return (nll_BT.sum(dim=1) * weight_B).sum()


def domain_sums(nll_BT: Tensor, targets_B: Tensor, domain_B: Tensor, num_domains: int) -> Tensor:
    """Nats, target tokens and rows per domain, float64 [num_domains, 3]; padded rows (domain < 0) are left out."""
    sums = torch.zeros(num_domains, 3, dtype=torch.float64)
    kept = domain_B >= 0
    columns = (nll_BT.detach().double().sum(dim=1), targets_B.double(), torch.ones_like(targets_B).double())
    for i, column in enumerate(columns):
        sums[:, i].index_add_(0, domain_B[kept].long(), column.cpu()[kept])
    return sums


def loss_by_domain(sums: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Mean nats per target token of each domain that occurs in the sums."""
    return {name: float(sums[i, 0] / sums[i, 1]) for i, name in enumerate(names) if sums[i, 1] > 0}
