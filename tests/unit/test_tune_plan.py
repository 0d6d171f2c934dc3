"""What a study will do, in lines; and how many trials find room on a head of this machine."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from nexus_ray.cli import main
from nexus_ray.config import Hardware
from nexus_ray.config.study import rung_shares
from nexus_ray.session import DATA_CPUS
from nexus_ray.study.load import load_study
from nexus_ray.study.placement import Need, capacity
from nexus_ray.tune import local_demand, local_trials, study_need
from nexus_ray.tune.plan import expected_share, plan_lines
from tests.studies import a_study, write_study

ROOT = Path(__file__).resolve().parents[2]
ASHA = {"rule": "asha", "eta": 3}


def test_the_plan_names_points_rungs_tokens_and_room(tmp_path: Path) -> None:
    study = a_study(tmp_path, stopping=ASHA, objective={"kind": "new_under_forgetting", "max_forgetting": 0.5})
    text = "\n".join(plan_lines(study, Need(1, 2), 1))
    assert "12 points x 1 seeds, search grid" in text and "rungs at 0.111 (100,000 tokens), 0.333" in text
    assert "continual.replay_ratio: 0.0, 0.05, 0.25" in text and "forgetting at most 0.5" in text
    assert "1 worker(s) x 2 CPUs, 1 CPU for data" in text and "1 at once on this machine" in text
    assert text.count("900,000 tokens  continual") == 12


def test_tokens_are_those_of_the_points_where_the_budget_is_a_knob(tmp_path: Path) -> None:
    space = {"training.token_budget": {"choice": [45_000, 90_000]}, "continual.replay_ratio": {"choice": [0.0, 0.1]}}
    study = a_study(tmp_path, space=space, stopping={"rule": "asha", "rungs": [0.5]}, seeds=[0, 1])
    text = "\n".join(plan_lines(study, Need(1, 2), 1))
    assert "tokens  1,080,000 at full budgets\n" in text, "two stages, two ratios, two seeds"
    assert "tokens  21,600,000 at full budgets, of which promotion spends" in "\n".join(
        plan_lines(a_study(tmp_path, stopping=ASHA, seeds=[0, 1]), Need(1, 2), 1)
    )


def test_promotion_spends_what_the_judge_promises(tmp_path: Path) -> None:
    study = a_study(tmp_path, stopping=ASHA)
    assert [float(share) for share in rung_shares(study.config.stopping)] == pytest.approx([1 / 9, 1 / 3])
    assert expected_share(study, 24) == Fraction(24 * 1 + 8 * 2 + 2 * 6, 9 * 24)
    assert expected_share(a_study(tmp_path, stopping={"rule": "none"}), 24) == 1


@pytest.mark.parametrize(("cores", "workers", "each"), [(2, 1, 1), (2, 1, 2), (8, 2, 1), (16, 2, 3), (4, 3, 4)])
def test_a_local_head_has_room_for_what_runs_on_it(tmp_path: Path, cores: int, workers: int, each: int) -> None:
    need = Need(workers, each)
    study = load_study(write_study(tmp_path), hardware=Hardware(cpus=cores))
    trials = local_trials(study, need)
    assert trials == max(1, cores // (workers * each))
    head = {"CPU": float(local_demand(need, trials).cpus + DATA_CPUS)}
    assert capacity(need, [head]) >= trials


def test_the_hungriest_point_counts(tmp_path: Path) -> None:
    space = {"size": {"options": {"one": {}, "two": {"cluster.num_workers": 2, "cluster.cpus_per_worker": 1}}}}
    assert study_need(a_study(tmp_path, space=space)).workers == 2


def test_a_dry_run_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(write_study(tmp_path)), "--dry-run"]) == 0
    assert "12 points" in capsys.readouterr().out and not (tmp_path / "runs").exists()


def test_bad_studies_exit_2_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        "space": {"continual.replay_ration": {"choice": [0.1]}},
        "stopping": {**ASHA, "max_signal": {"gradnorm": 1.0}},
    }
    for name, value in bad.items():
        assert main(["tune", str(write_study(tmp_path, **{name: value})), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert "did you mean continual.replay_ratio" in err and "stopping.max_signal.gradnorm" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("study*.yaml")), ids=lambda path: path.name)
def test_committed_studies_load(path: Path) -> None:
    study = load_study(path, hardware=Hardware(cpus=2))
    assert len(list(plan_lines(study, study_need(study), 1))) > 10
