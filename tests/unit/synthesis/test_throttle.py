"""The throttle falls once per round trip, grows back, waits as it is told, and divides leases among workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.config.generators import ThrottleConfig
from nexus_ray.synthesis.throttle import LEASE_S, RIVAL_S, Outcome, Throttle, retry_after_s, strictest


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def made(**settings: Any) -> tuple[Throttle, Clock]:
    clock = Clock()
    return Throttle(ThrottleConfig(**settings), clock=clock), clock


def test_one_decrease_per_round_trip() -> None:
    throttle, clock = made(max_in_flight=64, decrease=0.5)
    grant = throttle.acquire(100)
    assert (grant.count, throttle.in_flight) == (64, 64)
    throttle.report([Outcome("busy", grant.epoch, retry_after_s=0.0)] * 64)
    assert (throttle.limit, throttle.in_flight) == (32, 0), "64 refusals of one burst count once"
    second = throttle.acquire(100)
    assert second.count == 32
    throttle.report([Outcome("timeout", second.epoch), Outcome("ok", grant.epoch)])
    assert throttle.limit == 16
    throttle.report([Outcome("error", throttle.epoch)])
    assert throttle.limit == 16, "an error that is no matter of load changes nothing"
    assert clock.now == 100.0


def test_falls_to_one_and_grows_by_one_a_round_trip() -> None:
    throttle, clock = made(max_in_flight=8, decrease=0.5)
    for _ in range(10):
        clock.now += 100
        throttle.report([Outcome("busy", throttle.acquire(1).epoch)])
    assert throttle.limit == throttle.lowest == 1
    clock.now += 100
    for wanted in range(1, 8):
        grant = throttle.acquire(8)
        assert grant.count == wanted
        throttle.report([Outcome("ok", grant.epoch)] * (grant.count + 1))
    assert throttle.limit == 8
    throttle.report([Outcome("ok", 0)] * 100)
    assert throttle.limit == 8, "the ceiling holds"


def test_waits_as_the_server_asks() -> None:
    throttle, clock = made(max_in_flight=4)
    throttle.report([Outcome("busy", throttle.acquire(1).epoch, retry_after_s=30.0)])
    grant = throttle.acquire(4)
    assert (grant.count, grant.wait_s) == (0, 30.0)
    clock.now += 29.9
    assert throttle.acquire(4).count == 0
    clock.now += 0.1
    assert throttle.acquire(4).count == 3


def test_pauses_double_without_a_word_of_the_server_until_a_success() -> None:
    throttle, clock = made(max_in_flight=4, cooldown_s=2.0)
    pauses = []
    for _ in range(7):
        throttle.report([Outcome("busy", throttle.acquire(1).epoch)])
        pauses.append(throttle.acquire(1).wait_s)
        clock.now += pauses[-1]
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    grant = throttle.acquire(1)
    assert grant.refused_for_s == sum(pauses[:-1])
    throttle.report([Outcome("ok", grant.epoch)])
    grant = throttle.acquire(1)
    assert grant.refused_for_s == 0.0
    throttle.report([Outcome("busy", grant.epoch)])
    assert throttle.acquire(1).wait_s == 2.0


def test_workers_share_what_there_is() -> None:
    throttle, clock = made(max_in_flight=12)
    assert throttle.acquire(100, "a").count == 12
    assert throttle.acquire(100, "b").count == 0
    throttle.report([Outcome("ok", 0)] * 12, "a")
    assert throttle.acquire(100, "a").count == 6, "b is waiting for its half"
    assert throttle.acquire(100, "b").count == 6
    throttle.report([Outcome("ok", 0)] * 6, "b")
    clock.now += RIVAL_S + 1
    assert throttle.acquire(100, "a").count == 6, "b has not asked again"


def test_a_satisfied_worker_leaves_the_rest_to_others() -> None:
    throttle, _ = made(max_in_flight=12)
    assert throttle.acquire(1, "a").count == 1
    assert throttle.acquire(100, "b").count == 11


def test_a_dead_workers_leases_are_free() -> None:
    throttle, clock = made(max_in_flight=4)
    assert throttle.acquire(4, "a").count == 4
    throttle.forget("a")
    assert throttle.acquire(4, "b").count == 4
    clock.now += LEASE_S + 1
    assert throttle.acquire(4, "c").count == 4, "b was not heard of for too long"
    throttle.report([Outcome("ok", 0)] * 4, "b")
    assert throttle.in_flight == 4, "b's leases are no longer counted"


def test_a_throttle_that_starts_again_is_told_what_is_out() -> None:
    throttle, _ = made(max_in_flight=4)
    assert throttle.acquire(4, "a").count == 4
    throttle.hold(3, "b")
    assert throttle.in_flight == 7 and throttle.acquire(9, "b").count == 0, "more than the limit, for now"
    throttle.report([Outcome("ok", 0)] * 4, "a")
    assert throttle.acquire(9, "b").count == 1


def test_the_strictest_limits_of_several() -> None:
    most = [ThrottleConfig(max_in_flight=64, start_in_flight=8, decrease=0.5), ThrottleConfig(max_in_flight=16)]
    assert strictest(most) == ThrottleConfig(max_in_flight=16, start_in_flight=8, decrease=0.5)
    assert strictest(most[::-1]) == ThrottleConfig(max_in_flight=16, start_in_flight=8)


steps = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 9),
        st.sampled_from(["ok", "busy", "timeout", "error"]),
        st.integers(0, 9),
        st.floats(0, 5),
    ),
    max_size=60,
)


@given(steps, st.integers(1, 20))
def test_never_more_leases_than_the_limit(steps: list[tuple[str, int, Any, int, float]], most: int) -> None:
    throttle, clock = made(max_in_flight=most)
    held: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for name, wanted, kind, ended, later in steps:
        clock.now += later
        before = throttle.in_flight
        grant = throttle.acquire(wanted, name)
        assert 0 <= grant.count <= wanted and (grant.count == 0 or before + grant.count <= throttle.limit)
        assert grant.count == wanted or grant.wait_s > 0
        held[name] += [grant.epoch] * grant.count
        done, held[name] = held[name][:ended], held[name][ended:]
        throttle.report([Outcome(kind, epoch) for epoch in done], name)
        assert throttle.in_flight == sum(map(len, held.values())) and 1 <= throttle.limit <= most


def _cases() -> Iterator[tuple[str | None, float | None]]:
    yield from [(None, None), ("", None), ("3", 3.0), (" 0.5 ", 0.5), ("-1", 0.0), ("inf", None), ("nan", None)]
    yield from [("soon", None), ("Wed, 21 Oct 2026 07:28:30 GMT", 30.0), ("Wed, 21 Oct 2026 07:27:00 GMT", 0.0)]
    yield "Wed, 99 Oct 2026 07:28:30 GMT", None


@pytest.mark.parametrize(("value", "seconds"), list(_cases()))
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, now=1792567680.0) == seconds
