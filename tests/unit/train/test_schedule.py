"""Learning-rate schedules have the closed forms of their papers, at every step that matters."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.config.tree import ScheduleConfig
from nexus_ray.train.schedule import factor

TOTAL, WARMUP = 101, 20
LAST = TOTAL - 1


def at(step: int, *, total: int = TOTAL, warmup: int = WARMUP, rewarm: bool = True, **config: Any) -> float:
    return factor(step, total_steps=total, warmup_steps=warmup, config=ScheduleConfig(**config), rewarm=rewarm)


KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "cosine"},
    {"kind": "wsd", "decay_fraction": 0.2},
    {"kind": "infinite"},
    {"kind": "constant"},
)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config["kind"])
def test_warm_up_rises_linearly_to_the_peak(config: dict[str, Any]) -> None:
    """Step 0 is one part of the peak, the last warm-up step is the peak, and the next one is still at it."""
    assert [at(step, **config) for step in range(WARMUP)] == [(step + 1) / WARMUP for step in range(WARMUP)]
    assert at(WARMUP, **config) == 1.0


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config["kind"])
def test_without_warm_up_a_stage_starts_at_the_peak(config: dict[str, Any]) -> None:
    """No division by zero, and no lost first step."""
    assert at(0, warmup=0, **config) == 1.0


@pytest.mark.parametrize(
    ("config", "last"),
    [
        ({"kind": "cosine", "min_factor": 0.1}, 0.1),
        ({"kind": "cosine", "min_factor": 0.0}, 0.0),
        ({"kind": "wsd", "min_factor": 0.1}, 0.1),
        ({"kind": "wsd", "min_factor": 0.0}, 0.0),
        ({"kind": "wsd", "decay_fraction": 0.0}, 1.0),
        ({"kind": "infinite", "min_factor": 0.2}, 0.2),
        ({"kind": "infinite", "constant_factor": 0.0, "min_factor": 0.1}, 0.1),
        ({"kind": "constant"}, 1.0),
    ],
)
def test_the_last_step_is_at_the_final_rate(config: dict[str, Any], last: float) -> None:
    """A decay ends exactly where the config says, at the stage's last step."""
    assert math.isclose(at(LAST, **config), last, abs_tol=1e-12)


def test_cosine_is_ibrahims_equation_2() -> None:
    """eta_min + (eta_max - eta_min) / 2 (cos(pi (t - T_warm) / (T_end - T_warm)) + 1)."""
    for step in range(WARMUP, TOTAL):
        expected = 0.1 + 0.9 / 2 * (math.cos(math.pi * (step - WARMUP) / (LAST - WARMUP)) + 1)
        assert math.isclose(at(step, kind="cosine", min_factor=0.1), expected, rel_tol=1e-12)


def test_wsd_holds_the_peak_and_then_decays_exponentially() -> None:
    """Stable for 80 % of what follows the warm-up, then f ** share; half-way it stands at the geometric mean."""
    plateau = WARMUP + int(0.8 * (LAST - WARMUP))
    config: dict[str, Any] = {"kind": "wsd", "decay_fraction": 0.2, "min_factor": 0.01}
    assert {at(step, **config) for step in range(WARMUP, plateau + 1)} == {1.0}
    assert math.isclose(at((plateau + LAST) // 2, **config), 0.1, rel_tol=1e-9)
    assert at(plateau + 1, **config) < 1.0


def test_infinite_cools_down_to_a_constant_and_anneals() -> None:
    """Ibrahim et al. 2024, section 7.2: cosine cooldown, constant phase, exponential anneal at the very end."""
    config: dict[str, Any] = {
        "kind": "infinite",
        "cooldown_fraction": 0.5,
        "constant_factor": 0.4,
        "decay_fraction": 0.25,
        "min_factor": 0.1,
    }
    quarter = (LAST - WARMUP) // 4
    assert math.isclose(at(WARMUP + quarter, **config), 0.7, rel_tol=1e-12)  # half of the cooldown: the mean of both
    assert {at(step, **config) for step in range(WARMUP + 2 * quarter, WARMUP + 3 * quarter + 1)} == {0.4}
    assert math.isclose(at(WARMUP + 3 * quarter + quarter // 2, **config), 0.2, rel_tol=1e-12)


def test_a_constant_schedule_stays_at_the_peak() -> None:
    assert {at(step, kind="constant") for step in range(WARMUP, TOTAL)} == {1.0}


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config["kind"])
def test_without_re_warming_the_stage_stays_where_the_last_one_ended(config: dict[str, Any]) -> None:
    """Gupta et al. 2023's control: no warm-up and no decay, the final rate throughout."""
    assert {at(step, rewarm=False, min_factor=0.3, **config) for step in range(TOTAL)} == {0.3}


def test_a_warm_up_longer_than_the_stage_is_clipped_to_it() -> None:
    """The peak is reached at the last step instead of never."""
    assert [at(step, total=5, warmup=50) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_a_stage_of_one_step_runs_at_the_peak() -> None:
    assert [at(0, total=1, warmup=warmup) for warmup in (0, 1, 9)] == [1.0, 1.0, 1.0]


fractions = st.floats(0, 1)


@given(
    st.sampled_from(["cosine", "wsd", "infinite", "constant"]),
    st.integers(1, 300),
    st.integers(0, 400),
    fractions,
    fractions,
    fractions,
    fractions,
    st.data(),
)
def test_the_factor_is_always_between_0_and_1(
    kind: str, total: int, warmup: int, low: float, decay: float, cooldown: float, constant: float, data: st.DataObject
) -> None:
    """No setting that the config accepts gives an error, a negative rate or one above the peak."""
    cooldown = min(cooldown, 1.0 - decay)
    step = data.draw(st.integers(0, total - 1))
    value = at(
        step,
        total=total,
        warmup=warmup,
        kind=kind,
        min_factor=low,
        decay_fraction=decay,
        cooldown_fraction=cooldown,
        constant_factor=constant,
    )
    assert 0.0 <= value <= 1.0 + 1e-12


def test_a_constant_phase_next_to_nothing_rises_without_overflow() -> None:
    """1 / 5e-324 is infinite."""
    settings = {"total": 3, "warmup": 0, "kind": "infinite", "min_factor": 1.0, "decay_fraction": 1.0}
    rates = [at(step, cooldown_fraction=0.0, constant_factor=5e-324, **settings) for step in range(3)]
    assert rates == [5e-324, 0.5, 1.0]
