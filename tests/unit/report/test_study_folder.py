"""What a study leaves in its folder, from a log that a laboratory wrote."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from nexus_ray.cli import main
from nexus_ray.config import fingerprint, load_config
from nexus_ray.report.study_folder import show_study, study_view, write_study
from nexus_ray.study.course import Course
from nexus_ray.study.load import Study
from nexus_ray.study.log import StudyLog
from tests.studies import Lab, a_study, smooth

ASHA = {"rule": "asha", "eta": 3, "rungs": [0.2, 0.4]}
BOUND = {"kind": "new_under_forgetting", "max_forgetting": 0.85}


class Kept(Lab):
    """A laboratory whose log is the study's own."""

    def fill(self) -> None:
        with StudyLog(self.study) as log:
            log.events = list(log.events)
            self.run(log)  # type: ignore[arg-type]

    def course(self, log: StudyLog) -> Course:  # type: ignore[override]
        return Course(self.study, events=log.events, write=log.write)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    made = a_study(tmp_path, stopping=ASHA, objective=BOUND)
    Kept(made, smooth).fill()
    return made


def test_results_page_and_best_config_are_written(study: Study, tmp_path: Path) -> None:
    assert write_study(study.folder).endswith("report.html")
    place = study.folder.local_path
    results = json.loads((place / "results.json").read_text())
    assert len(results["trials"]) == 12 and results["winner"] in results["front"]
    assert results["share_of_full_budgets"] < 0.5
    lines = (place / "results.csv").read_text().splitlines()
    assert lines[0].endswith("continual.replay_ratio,continual.warmup_steps") and len(lines) == 13
    page = (place / "report.html").read_text()
    assert "Pareto front" in page and "promoted" not in results
    best = load_config(place / "best.yaml")
    [point] = {t["trial"]: t for t in results["trials"] if t["point"] == results["winner"]}.values()
    assert best.continual.replay_ratio == point["params"]["continual.replay_ratio"]
    assert best.name == f"s-{point['trial']}-again"


def test_the_command_on_the_page_repeats_the_trial(study: Study) -> None:
    """Its overrides turn the study's base into the very run, simulated epoching included."""
    view, again = study_view(study.folder)
    assert view.front is not None
    trial = view.representative(view.front.winner.id)
    pairs = [f"{path}={json.dumps(value)}" for path, value in view.settings(trial).items()]
    there = again.config_of(trial.point, trial.seed)
    own = load_config(view.base, pairs)
    assert own.continual == there.continual and own.seed == there.seed and own.data == there.data
    assert {d.action for d in view.decisions} == {"paused", "continued", "promoted"} - (
        set() if any(d.action == "continued" for d in view.decisions) else {"continued"}
    )
    assert {decision.tokens for decision in view.decisions} == {200_000, 400_000}


def test_simulated_epoching_is_in_the_best_config(tmp_path: Path) -> None:
    study = a_study(tmp_path, full_tokens=1_800_000, common={"training.token_budget": 225_000})
    Kept(study, smooth).fill()
    write_study(study.folder)
    place = study.folder.local_path
    best = load_config(place / "best.yaml")
    assert best.data.fraction == 0.25
    view, again = study_view(study.folder)
    trial = view.representative(view.front.winner.id)  # type: ignore[union-attr]
    assert fingerprint(best) == fingerprint(again.config_of(trial.point, trial.seed))
    assert view.settings(trial)["data.fraction"] == 0.25


@pytest.mark.parametrize("by_file", [False, True])
def test_compare_shows_a_study(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], by_file: bool) -> None:
    target = str(tmp_path / "study.yaml") if by_file else study.folder.uri
    page = tmp_path / "page.html"
    assert main(["compare", target, "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert "12 trials" in out and "again: nexus-ray roadmap" in out and "Pareto front" in page.read_text()
    assert main(["compare", target, "runs/other"]) == 2
    assert "is a study, which is shown by itself" in capsys.readouterr().err


def test_a_study_without_trials_says_so(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    with StudyLog(study):
        pass
    with pytest.raises(Exception, match="has no trial yet"):
        show_study(study.folder, console=Console(file=io.StringIO()))
