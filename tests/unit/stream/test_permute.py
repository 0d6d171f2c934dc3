"""Each epoch visits every row once, in an order that is a pure function of key, epoch and position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.stream.permute import RowOrder, key_of, shuffle_index

orders = st.builds(
    RowOrder,
    num_rows=st.integers(1, 3000),
    group_rows=st.integers(1, 300),
    window_rows=st.integers(1, 1000),
    key=st.integers(0, 2**63),
)


@given(st.integers(1, 5000), st.integers(0, 2**63))
def test_shuffling_an_index_is_a_bijection(size: int, key: int) -> None:
    assert sorted(shuffle_index(np.arange(size), size, key).tolist()) == list(range(size))


@given(orders, st.integers(0, 5))
@settings(deadline=None)
def test_every_epoch_visits_every_row_once(order: RowOrder, epoch: int) -> None:
    counter = np.arange(order.num_rows) + epoch * order.num_rows
    assert sorted(order(counter).tolist()) == list(range(order.num_rows))


@given(orders, st.data())
@settings(deadline=None)
def test_a_position_does_not_depend_on_what_was_asked_before(order: RowOrder, data: st.DataObject) -> None:
    counter = np.asarray(data.draw(st.lists(st.integers(0, 4 * order.num_rows), min_size=1, max_size=40)))
    together = order(counter)
    assert [int(order(np.asarray([c]))[0]) for c in counter] == together.tolist()


def test_epochs_differ_and_rows_move_far() -> None:
    order = RowOrder(50_000, 512, 4096, key_of("seed", 1))
    first, second = order(np.arange(50_000)), order(np.arange(50_000, 100_000))
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(np.arange(50_000), first)[0, 1]) < 0.3


def test_reads_stay_within_a_bounded_window_of_groups() -> None:
    order = RowOrder(100_000, 1000, 4000, 7)
    rows = order(np.arange(4000))
    assert len(np.unique(rows // 1000)) <= 5  # four groups, and the tail if it falls here


@given(orders, st.data())
@settings(deadline=None)
def test_a_cut_domain_reads_the_beginning_of_the_first_epoch_again_and_again(
    order: RowOrder, data: st.DataObject
) -> None:
    used = data.draw(st.integers(1, order.num_rows))
    fewer = data.draw(st.integers(1, used))
    cut, shorter = replace(order, used=used), replace(order, used=fewer)
    begin = order(np.arange(used))
    assert cut(np.arange(used)).tolist() == begin.tolist(), "as the whole domain begins"
    assert shorter(np.arange(fewer)).tolist() == begin[:fewer].tolist(), "nested"
    again = cut(np.arange(used) + 3 * used)
    assert sorted(again.tolist()) == sorted(begin.tolist()), "every row once in each pass"
    position = data.draw(st.integers(0, 5 * used))
    assert int(cut(np.asarray([position]))[0]) == int(cut(np.arange(position + 1))[-1])


def test_passes_over_a_cut_domain_differ_and_stay_in_windows() -> None:
    cut = RowOrder(100_000, 1000, 4000, 7, used=20_000)
    first, second = cut(np.arange(20_000)), cut(np.arange(20_000, 40_000))
    assert (first == second).mean() < 0.01
    assert len(np.unique(second[:4000] // 1000)) <= 6
