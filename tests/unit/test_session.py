"""What a cluster must have for a run, decided without starting Ray."""

from __future__ import annotations

import os

import pytest

from nexus_ray import session
from nexus_ray.config import Hardware, resolve
from nexus_ray.errors import ConfigError
from nexus_ray.session import Demand, check_address, check_fits, check_local, quiet_environment, stage_demands
from tests.configs import two_stages


def node(cpus: float, gpus: float = 0) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus, "memory": 1e9}


@pytest.mark.parametrize(
    ("demand", "nodes"),
    [
        (Demand(1, 2, 0), [node(3)]),
        (Demand(2, 1, 0), [node(3)]),
        (Demand(2, 4, 2), [node(4, 1), node(5, 1)]),
        (Demand(3, 1, 1.5), [node(4, 2)]),
        (Demand(2, 2, 0), [node(0), node(2), node(3)]),
    ],
)
def test_a_cluster_with_room_is_accepted(demand: Demand, nodes: list[dict[str, float]]) -> None:
    check_fits(demand, nodes)


@pytest.mark.parametrize(
    ("demand", "nodes", "words"),
    [
        (
            Demand(1, 2, 0),
            [node(2)],
            ["has 2 CPUs", "1 more for data", "lower cluster.cpus_per_worker to 1"],
        ),
        (Demand(4, 1, 0), [node(4)], ["cluster.num_workers=4", "lower cluster.num_workers to 3"]),
        (Demand(2, 1, 2), [node(8, 1)], ["need 2 GPUs", "lower cluster.num_workers to 1"]),
        (Demand(1, 1, 1), [node(8)], ["set cluster.use_gpu: false"]),
        (Demand(1, 4, 0), [node(3), node(3)], ["only 0 such workers", "lower cluster.cpus_per_worker"]),
        (Demand(2, 4, 2), [node(8, 0), node(2, 2)], ["only 0 such workers"]),
        (Demand(4, 1, 2.4), [node(8, 3)], ["only 3 such workers"]),
    ],
)
def test_a_cluster_without_room_is_refused(demand: Demand, nodes: list[dict[str, float]], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fits(demand, nodes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_local_head_accepts_logical_cores_within_reason() -> None:
    check_local([Demand(2, 4, 0)], Hardware(cpus=2))
    with pytest.raises(ConfigError, match=r"num_workers=9 .* 2 cores .* lower cluster.num_workers to 2"):
        check_local([Demand(9, 1, 0)], Hardware(cpus=2))


def test_the_hungriest_stage_counts() -> None:
    config = resolve(two_stages("stages.1.override={cluster.num_workers: 3}"), Hardware(cpus=6))
    assert stage_demands(config) == [Demand(1, 6, 0), Demand(3, 2, 0)]
    shared = resolve(two_stages("cluster.use_gpu=true", "cluster.gpus_per_worker=0.25"), Hardware(cpus=8))
    assert stage_demands(shared)[0] == Demand(1, 4, 0.25)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "ray://head:10001", "http://head:8265"])
def test_addresses_where_nothing_answers_are_refused_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.address="):
        check_address(address)


def test_the_users_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "9")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    quiet_environment()
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "9" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_kept_memory_is_for_children_alone_and_the_users_choice_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    with session._environment(session.KEEP_MEMORY):
        assert os.environ["MALLOC_ARENA_MAX"] == "3" and os.environ["MALLOC_MMAP_MAX_"] == "0"
    assert os.environ["MALLOC_ARENA_MAX"] == "3" and "MALLOC_MMAP_MAX_" not in os.environ
