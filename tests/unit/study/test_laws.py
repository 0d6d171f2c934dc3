"""Laws of replay: fits, predictions, held-out errors and advice, on worlds whose truth is known."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.study.advice import best_ratio, fit_laws, held_out, left_out
from nexus_ray.study.fitting import fit, huber
from nexus_ray.study.law_forms import LAWS
from nexus_ray.study.laws import Measurement, fit_law, outside, settings_of
from nexus_ray.study.measured import BUDGET, from_run, from_trials
from tests.study_views import RATIO, law_measurements, law_truth, study_trials, trial

THIRD = 2.5e6
PUBLISHED = {0.0: (7.581, 2.801), 0.01: (5.304, 2.805), 0.05: (4.574, 2.824), 0.25: (3.936, 2.929)}
"""Loss on the old and new domain after 1,024,000 tokens, means of three seeds: experiments/replay/RESULT.md."""
BASE = 3.509


def _third(noise: float = 1.0, seed: int = 9) -> list[Measurement]:
    return law_measurements(seed, budgets=(THIRD,), noise=noise) + [
        Measurement(THIRD, ratio, *law_truth(THIRD, ratio)) for ratio in (0.02, 0.15)
    ]


def test_huber_is_a_parabola_and_then_a_line() -> None:
    assert huber(np.array([0.5]), 1.0) == 0.125 and huber(np.array([3.0]), 1.0) == 2.5


def test_the_fitter_finds_an_exponential_from_bad_starts_despite_an_outlier() -> None:
    x = np.linspace(0, 3, 20)
    target = 2.0 * np.exp(-0.7 * x)
    target[4] += 5.0
    starts = np.random.default_rng(0).uniform(-3, 3, size=(40, 2))
    box = np.array([[-5.0, 5.0], [-5.0, 5.0]])
    found = fit(
        lambda t: np.exp(t[:, :1]) * np.exp(-np.exp(t[:, 1:]) * x), starts, target, np.ones(20), box, delta=0.01
    )
    assert np.exp(found.best()) == pytest.approx([2.0, 0.7], rel=5e-3)


def test_a_parameter_stays_inside_its_box() -> None:
    found = fit(
        lambda t: t * np.ones(3), np.zeros((4, 1)), np.full(3, 9.0), np.ones(3), np.array([[-1.0, 2.0]]), delta=1.0
    )
    assert found.best() == 2.0


@pytest.mark.parametrize("name", list(LAWS))
def test_each_law_predicts_a_world_of_its_own(name: str) -> None:
    """Prediction is what can be recovered: parameters of the truth are only asked for where the data determine them."""
    law, (centre, _) = LAWS[name], LAWS[name].centre()
    generator = np.random.default_rng(0)
    truth = centre + (0.3 if law.of == "new" else 0.2)
    budgets, ratios = np.array(list(itertools.product((4e5, 1e6, 2.5e6), (0.0, 0.01, 0.05, 0.1, 0.25)))).T
    values = 3.0 * law.curve(truth[None], budgets / 1e6, ratios)[0]
    rows = [
        Measurement(d, r, v * (1 + 0.001 * generator.normal()), v * (1 + 0.001 * generator.normal()), s)
        for d, r, v in zip(budgets, ratios, values, strict=True)
        for s in range(3)
    ]
    fitted = fit_law(name, settings_of([m for m in rows if m.tokens < 2e6], law.of), draws=60)
    tested = held_out(fitted, settings_of([m for m in rows if m.tokens > 2e6], law.of))
    assert tested.error < 0.02 and tested.error < tested.baseline / 4
    assert sum(bool(row.covered) for row in tested.rows) >= 4
    amplitudes = [p for p in fitted.parameters() if law.priors[p.name].amplitude]
    assert all(p.interval[0] <= p.value <= p.interval[1] for p in amplitudes)


def test_two_budgets_leave_the_floor_and_the_exponent_open() -> None:
    parameters = {p.name: p for p in fit_law("tokens", settings_of(law_measurements(), "new"), draws=80).parameters()}
    assert not parameters["E"].determined and not parameters["b"].determined
    many = law_measurements(budgets=tuple(1e5 * 10 ** (k / 2) for k in range(7)))  # three decades
    wide = {p.name: p for p in fit_law("tokens", settings_of(many, "new"), draws=80).parameters()}
    assert wide["E"].determined and wide["b"].determined and wide["b"].value == pytest.approx(0.32, rel=0.1)
    assert wide["E"].value == pytest.approx(1.6, rel=0.1)


def test_a_third_budget_is_predicted_far_better_than_by_the_nearest_run() -> None:
    """A world that follows none of the laws exactly, at two and a half times the longest budget."""
    new_covered = lost_covered = count = 0
    for seed in range(4):
        laws = fit_laws(law_measurements(seed), draws=80)
        new, lost = (held_out(f, settings_of(_third(seed=seed + 50), f.law.of)) for f in (laws.new, laws.forgetting))
        assert new.error < 0.02 and new.error < new.baseline / 3
        assert lost.error < 0.10 and lost.error < lost.baseline / 2
        new_covered += sum(bool(row.covered) for row in new.rows)
        lost_covered += sum(bool(row.covered) for row in lost.rows)
        count += len(new.rows)
    assert new_covered / count >= 0.85 and lost_covered / count >= 0.6


def test_ratios_left_out_beat_the_baseline_and_have_an_interval() -> None:
    laws = fit_laws(law_measurements(), draws=40)
    for error in (laws.new_error, laws.forgetting_error):
        assert error is not None
        assert error.error < error.baseline and error.interval is not None
        assert error.interval[0] <= error.error <= error.interval[1]
        assert {row.ratio for row in error.rows} == {0.0, 0.01, 0.05, 0.1, 0.25}
    by_budget = settings_of(law_measurements(), "new")
    assert left_out("tokens", by_budget, by="tokens").error < 0.25  # one budget alone says little: see its prior


def test_too_few_ratios_to_leave_one_out_give_the_simpler_law_and_no_error() -> None:
    rows = [m for m in law_measurements() if m.ratio in (0.0, 0.05, 0.25)]
    laws = fit_laws(rows, draws=20)
    assert (laws.new.law.name, laws.forgetting.law.name) == ("tokens", "injected")
    assert laws.new_error is None and laws.forgetting_error is None
    with pytest.raises(DataError, match="at least four"):
        fit_laws([m for m in rows if m.tokens > 5e5])


def test_the_best_ratio_is_that_of_the_truth_and_the_interval_holds_it() -> None:
    laws = fit_laws(law_measurements(), draws=100)
    fine = np.linspace(0, 0.9, 3601)
    for tokens, bound in ((1e6, 0.8), (THIRD, 0.8)):
        true = float(fine[np.argmax(np.array([law_truth(tokens, r)[1] for r in fine]) <= bound)])
        advice = best_ratio(laws, tokens=tokens, max_forgetting=bound)
        assert advice.ratio == pytest.approx(true, rel=0.15) and advice.interval is not None
        assert advice.interval[0] * 0.9 <= true <= advice.interval[1] * 1.1
    assert not best_ratio(laws, tokens=1e6, max_forgetting=0.8).warnings


def test_outside_the_fitted_range_it_says_by_how_far() -> None:
    laws = fit_laws(law_measurements(), draws=40)
    far = best_ratio(laws, tokens=4e6, max_forgetting=0.5)
    assert "4,000,000 tokens are 4 times the longest fitted budget (1,000,000)" in far.warnings
    assert any("above the highest fitted (0.25)" in warning for warning in far.warnings)
    none = best_ratio(laws, tokens=1e6, max_forgetting=-2.0)
    assert none.ratio is None and none.new is None and "no replay ratio up to 0.9" in none.warnings[-1]
    settings = settings_of(law_measurements(), "new")
    assert outside(settings, 1e6, 0.1) == [] and "of the shortest" in outside(settings, 1e5, 0.1)[0]
    one = settings_of(law_measurements(budgets=(1e6,)), "new")
    assert "this fit says nothing about 2,000,000" in outside(one, 2e6, 0.1)[0]


def test_the_published_experiment_is_fitted() -> None:
    """One budget: ratios can be predicted, and a budget is refused in words."""
    rows = [Measurement(1_024_000, ratio, new, old) for ratio, (old, new) in PUBLISHED.items()]
    forgetting = fit_law("injected", settings_of(rows, "forgetting", BASE), draws=60)
    fitted = forgetting.curve(np.full(4, 1_024_000.0), np.array(list(PUBLISHED)))
    measured = np.array([old - BASE for old, _ in PUBLISHED.values()])
    assert np.abs(fitted / measured - 1).max() < 0.05
    assert "this fit says nothing" in forgetting.predict(4e6, 0.1).warnings[0]


def test_too_few_settings_and_bad_values_are_refused() -> None:
    rows = law_measurements(budgets=(1e6,))
    with pytest.raises(DataError, match="at least four"):
        fit_law("tokens", settings_of([m for m in rows if m.ratio < 0.05], "new"))
    with pytest.raises(DataError, match="leave failed runs out"):
        settings_of([Measurement(1e6, 0.1, float("nan"), 1.0)], "new")
    with pytest.raises(DataError, match=r"no ratio can be left out"):
        left_out("tokens", settings_of([m for m in rows if m.ratio <= 0.05], "new"), by="ratio")


def test_measurements_of_trials_and_of_runs(tmp_path: Path) -> None:
    rows = from_trials(study_trials(), fixed={"method": "full", "continual.warmup_steps": 0})
    assert len(rows) == 9 and {row.ratio for row in rows} == {0.0, 0.05, 0.25} and rows[0].tokens == 1_000_000
    assert rows[0].new > 0 and from_trials([trial({RATIO: 0.1}, 0, -2.0, 0.3, status="stopped")]) == []
    with pytest.raises(DataError, match="settings of other knobs"):
        from_trials(study_trials())
    two = [trial({RATIO: r, BUDGET: b}, 0, -2.0, 0.3) for r in (0.0, 0.1) for b in (1, 2)]
    assert len(from_trials(two)) == 4
    named = [trial({RATIO: r, "budget": b}, 0, -2.0, 0.3) for r in (0.0, 0.1) for b in ("short", "long")]
    assert len(from_trials(named, budgets=["budget"])) == 4
    run = {"outcome": "done", "stages": [{"tokens": 9}], "seeds": {"seed": 3}}
    scores = {"domains": ["fr", "en"], "bits_per_byte": [[4.0, 1.5], [2.0, 2.25]]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"continual": {"replay_ratio": 0.05}}))
    folder = Storage(str(tmp_path))
    assert from_run(folder, new="fr", old="en") == (Measurement(9.0, 0.05, 2.0, 2.25, 3), 1.5)
    with pytest.raises(DataError, match="none of the evaluated domains"):
        from_run(folder, new="de", old="en")
    (tmp_path / "run.json").write_text(json.dumps({**run, "outcome": "failed"}))
    with pytest.raises(DataError, match="'failed'"):
        from_run(folder, new="fr", old="en")
