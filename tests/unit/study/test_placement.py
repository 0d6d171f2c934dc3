"""As many trials as always find room with a data CPU each; refused with numbers and a way out where none does."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.errors import ConfigError
from nexus_ray.session import Demand
from nexus_ray.study.placement import DRIVER_CPUS, Need, Node, capacity, concurrent_trials, need_of


@pytest.mark.parametrize(("cpus", "trials"), [(2, 0), (3, 1), (4, 1), (5, 2), (6, 2), (7, 3)])
def test_one_worker_of_one_cpu_on_one_node(cpus: int, trials: int) -> None:
    assert capacity(Need(1, 1), [{"CPU": cpus}]) == trials


@pytest.mark.parametrize(
    ("need", "nodes", "trials"),
    [
        (Need(2, 2), [{"CPU": 11}], 2),
        (Need(1, 4), [{"CPU": 5}, {"CPU": 5}], 1),
        (Need(1, 4), [{"CPU": 6}, {"CPU": 6}], 2),
        (Need(1, 4), [{"CPU": 4}, {"CPU": 2}], 0),
        (Need(1, 4), [{"CPU": 5}, {"CPU": 2}], 1),
        (Need(2, 8), [{"CPU": 8}, {"CPU": 8}, {"CPU": 2}], 0),
        (Need(2, 8), [{"CPU": 8}, {"CPU": 9}, {"CPU": 2}], 0),
        (Need(2, 8), [{"CPU": 9}, {"CPU": 9}], 1),
        (Need(1, 1), [{"CPU": 404}], 200),  # 201 drivers take a little of a third CPU
        (Need(1, 1), [{"CPU": 405}], 201),
        (Need(1, 5), [{"CPU": 4}, {"CPU": 4}], 0),
        (Need(2, 1, 1.0), [{"CPU": 32, "GPU": 8}], 4),
        (Need(1, 1, 0.5), [{"CPU": 32, "GPU": 2}], 4),
        (Need(1, 1, 0.4), [{"CPU": 32, "GPU": 2}], 4),
        (Need(1, 1, 1.0), [{"CPU": 32}], 0),
    ],
)
def test_workers_stay_on_a_node_and_share_gpus(need: Need, nodes: Sequence[Node], trials: int) -> None:
    assert capacity(need, nodes) == trials


@settings(deadline=None, max_examples=60)
@given(
    st.builds(Need, st.integers(1, 3), st.integers(1, 3)),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.data(),
)
def test_wherever_ray_puts_things_all_find_room(need: Need, cpus: list[int], data: st.DataObject) -> None:
    """Drivers and then workers go to any node with room, as an adversary likes; each trial has its workers, a lone one
    to begin with, and its data CPU."""
    trials = capacity(need, [{"CPU": count} for count in cpus])
    free = [float(count) for count in cpus]
    for amount, many in ((DRIVER_CPUS, trials), (need.cpus_per_worker, trials * need.workers)):
        for _ in range(many):
            fitting = [place for place, room in enumerate(free) if room >= amount]
            assert fitting, f"no room for {amount} CPUs: {free} of {cpus} are left"
            free[data.draw(st.sampled_from(fitting))] -= amount
    assert sum(int(room + 1e-9) for room in free) >= trials


def test_one_trial_alone_always_fits_when_any_does() -> None:
    for cpus in range(3, 12):
        for per_worker in range(1, cpus - 1):
            assert capacity(Need(1, per_worker), [{"CPU": cpus}]) >= 1


def test_the_hungriest_stage_counts() -> None:
    assert need_of([Demand(1, 4, 0), Demand(2, 1, 2)]) == Need(2, 4, 1.0)


def test_trials_with_a_share_of_a_gpu_lie_side_by_side() -> None:
    assert capacity(Need(1, 1, 0.3), [{"CPU": 64, "GPU": 2}]) == 6
    assert capacity(Need(1, 1, 1.0), [{"CPU": 64, "GPU": 2}]) == 2


def test_at_most_as_many_as_asked_for() -> None:
    assert concurrent_trials(Need(1, 1), [{"CPU": 64}], 3) == 3
    assert concurrent_trials(Need(1, 1), [{"CPU": 6}], None) == 2
    assert concurrent_trials(Need(1, 1), [{"CPU": 6}], 9) == 2


@pytest.mark.parametrize(
    ("need", "nodes", "message"),
    [
        (Need(2, 2), [{"CPU": 4}], "set cluster.num_workers=2 and cluster.cpus_per_worker=1, or add nodes"),
        (Need(1, 1), [{"CPU": 2}], "add 1 CPUs; a study needs 3 at the least"),
        (Need(1, 1, 1.0), [{"CPU": 9}], "set cluster.use_gpu: false, or add GPU nodes"),
        (Need(4, 1), [{"CPU": 2}, {"CPU": 2}], "set cluster.num_workers=2 and cluster.cpus_per_worker=1"),
    ],
)
def test_too_small_a_cluster_is_refused_with_numbers(need: Need, nodes: Sequence[Node], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        concurrent_trials(need, nodes, None)
    total = sum(int(node["CPU"]) for node in nodes)
    assert f"the cluster has {total} CPUs" in str(error.value) and f"{need.workers} workers" in str(error.value)
