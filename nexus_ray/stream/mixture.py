"""Exact mixtures: which domain stands at each position, as a repeating cycle with integer counts.

The cycle is a proportionate-fair schedule (Baruah et al. 1996; Steiner and Yeomans 1993): after any number of
positions, the count of every domain is less than one away from its exact share. So 1 % replay is 1 % replay over any
length, never 0 % for a while and never an error because a batch is small.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np
from numpy.typing import NDArray

MAX_CYCLE = 20_000
"""Longest cycle, in sequences; shares finer than this are rounded inside the new or the replayed group."""


def stage_counts(
    new: Mapping[str, Fraction], replay: Mapping[str, Fraction], replay_ratio: Fraction
) -> tuple[dict[str, int], int]:
    """Integer counts per cycle of each domain, and the cycle's length.

    The replay ratio is kept exactly; the shares of the domains inside the new and the replayed group are exact where
    the cycle stays within `MAX_CYCLE`, else rounded to the nearest count (at least one). A domain may stand in both
    groups; its counts add up.
    """
    ratio = replay_ratio if replay else Fraction(0)
    shares = {("new", name): share * (1 - ratio) for name, share in _normalised(new).items()}
    shares |= {("replay", name): share * ratio for name, share in _normalised(replay).items()}
    shares = {key: share for key, share in shares.items() if share}
    cycle = lcm(*(share.denominator for share in shares.values()))
    if cycle > MAX_CYCLE:
        cycle = ratio.denominator * max(1, -(-MAX_CYCLE // 2 // ratio.denominator))
        counts: dict[tuple[str, str], int] = {}
        for group in ("new", "replay"):
            members = {key: share for key, share in shares.items() if key[0] == group}
            counts |= _largest_remainder(members, int(cycle * sum(members.values(), Fraction(0))))
    else:
        counts = {key: int(share * cycle) for key, share in shares.items()}
    merged: dict[str, int] = {}
    for (_, name), count in sorted(counts.items(), key=lambda item: item[0][1]):  # not the order of a YAML file
        merged[name] = merged.get(name, 0) + count
    return merged, cycle


def _normalised(weights: Mapping[str, Fraction]) -> dict[str, Fraction]:
    total = sum(weights.values(), Fraction(0))
    return {name: Fraction(weight) / total for name, weight in weights.items()}


def _largest_remainder(shares: Mapping[tuple[str, str], Fraction], total: int) -> dict[tuple[str, str], int]:
    whole = sum(shares.values(), Fraction(0))
    exact = {key: share / whole * total for key, share in shares.items()}
    counts = {key: max(1, int(value)) for key, value in exact.items()}
    order = sorted(exact, key=lambda key: (counts[key] - exact[key], key))
    for key in order[: max(0, total - sum(counts.values()))]:
        counts[key] += 1
    for _ in range(sum(counts.values()) - total):  # the minimum of one was granted too often: the largest gives
        counts[max(counts, key=lambda key: (counts[key], key))] -= 1
    return counts


@lru_cache(maxsize=64)
def fair_cycle(counts: tuple[int, ...]) -> NDArray[np.int16]:
    """One cycle of sum(counts) positions in which every prefix is fair; entry = index of the domain.

    Unit j of a domain with share w may stand at positions floor(j/w) ... ceil((j+1)/w) - 1; serving the earliest
    deadline among the released units always meets all deadlines.
    """
    length = sum(counts)
    releases: list[list[tuple[int, int]]] = [[] for _ in range(length)]
    for domain, count in enumerate(counts):
        for j in range(count):
            releases[j * length // count].append((-(-(j + 1) * length // count), domain))
    order = np.empty(length, dtype=np.int16)
    ready: list[tuple[int, int]] = []
    for position in range(length):
        for unit in releases[position]:
            heapq.heappush(ready, unit)
        deadline, domain = heapq.heappop(ready)
        assert position < deadline, f"no fair schedule for {counts}"
        order[position] = domain
    order.setflags(write=False)
    return order


@lru_cache(maxsize=64)
def cycle_ranks(counts: tuple[int, ...]) -> NDArray[np.int64]:
    """For each position of the cycle, how often its domain stood at earlier positions of the cycle."""
    order = fair_cycle(counts)
    ranks = np.empty(order.size, dtype=np.int64)
    for domain in range(len(counts)):
        chosen = order == domain
        ranks[chosen] = np.arange(int(chosen.sum()))
    ranks.setflags(write=False)
    return ranks
