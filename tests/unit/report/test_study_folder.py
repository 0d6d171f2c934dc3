"""What a study leaves in its folder, from a log that a laboratory wrote."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nexus_ray.cli import main
from nexus_ray.config import fingerprint, load_config
from nexus_ray.report.study_folder import show_study, study_view, wall_clock
from nexus_ray.report.study_folder import write_study as write_study_folder
from nexus_ray.study.course import Course, Job
from nexus_ray.study.load import Study, load_study
from nexus_ray.study.log import NAME, StudyLog
from nexus_ray.study.records import Objectives, Point, Report
from nexus_ray.synthesis.append_log import LogWriter, read_log
from tests.studies import Lab, a_study, smooth, write_study
from tests.study_views import law_truth
from tests.unit.test_storage import RemoteStorage

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
    assert write_study_folder(study.folder).endswith("report.html")
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


def test_a_study_goes_on_from_its_folder_with_the_command_lines_settings(tmp_path: Path) -> None:
    """They come after `common`, and stay after it: in the folder's own study file and in best.yaml."""
    common = {"training.learning_rate": 2.0e-3, "training.token_budget": 225_000}
    file = write_study(tmp_path, common=common)
    ours = load_study(file, ["training.learning_rate=5.0e-4", "training.token_budget=450000"])
    Kept(ours, smooth).fill()
    write_study_folder(ours.folder)
    place = ours.folder.local_path
    best, again = load_config(place / "best.yaml"), load_study(place / "study.yaml")
    assert (best.training.learning_rate, best.training.token_budget) == (5.0e-4, 450_000)
    assert again.base_fingerprint == ours.base_fingerprint
    with StudyLog(again) as log:
        assert log.events


def test_forgetting_that_is_nought_everywhere_leaves_a_whole_folder(tmp_path: Path) -> None:
    def score(point: Point, seed: int, share: float) -> Objectives:
        return dataclasses.replace(smooth(point, seed, share), forgetting=0.0)

    study = a_study(tmp_path, search={"kind": "random", "trials": 9}, objective=BOUND)
    Kept(study, score).fill()
    write_study_folder(study.folder)
    results = json.loads((study.folder.local_path / "results.json").read_text())
    assert results["winner"] and results["laws"] is None
    assert show_study(study.folder, tmp_path / "page.html") is not None


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
    write_study_folder(study.folder)
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


def test_a_study_in_an_object_store_has_the_same_results(study: Study, tmp_path: Path) -> None:
    write_study_folder(study.folder)
    (tmp_path / "bucket").mkdir()
    there = RemoteStorage(f"remote://{tmp_path / 'bucket'}")
    for name in ("study.yaml", "base.yaml", "study.json"):
        there.write_text(study.folder.read_text(name), name)
    there.filesystem.create_dir(there.path(NAME))  # object stores have no folders to make
    with LogWriter(there, NAME) as log:
        for event in read_log(study.folder, NAME):
            log.write({key: value for key, value in event.items() if key != "crc"})
    assert write_study_folder(there) == f"remote://{tmp_path / 'bucket'}/report.html"
    assert there.read_json("results.json") == study.folder.read_json("results.json")
    assert there.read_text("best.yaml") == study.folder.read_text("best.yaml")


RATIOS = [0.0, 0.01, 0.05, 0.1, 0.25]


class Replay(Kept):
    """A world with a law, in which a budget is a share of a million tokens, with reports at the ends alone."""

    def __init__(self, study: Study) -> None:
        def score(point: Point, seed: int, share: float) -> Objectives:
            tokens = study.budget(point)
            new, lost = law_truth(tokens, float(point.params["continual.replay_ratio"]))  # type: ignore[arg-type]
            return Objectives(-new * (1 + 1e-4 * seed), lost, tokens * 1e6)

        super().__init__(study, score, steps=1)

    def step(self, course: Course, job: Job, number: int) -> bool:
        tokens = self.study.budget(job.point)
        course.finish(job.trial, Report(tokens // 1000, tokens, self.score(job.point, job.seed, 1.0)))
        return False


def a_replay_study(folder: Path, **changes: Any) -> Study:
    """Ratios at budgets that a knob sets together with the warm-up."""
    short = {"training.token_budget": 200_000, "continual.warmup_steps": 2}
    long = {"training.token_budget": 500_000, "continual.warmup_steps": 5}
    space = {
        "continual.replay_ratio": {"choice": RATIOS},
        "budget": {"options": {"short": short, "long": long}},
    }
    bound = {"kind": "new_under_forgetting", "max_forgetting": 0.5}
    made = a_study(folder, **{"space": space, "objective": bound, "simulated_epoching": False, **changes})
    Replay(made).fill()
    return made


def test_laws_are_fitted_over_ratio_and_budget_and_advise(tmp_path: Path) -> None:
    study = a_replay_study(tmp_path)
    write_study_folder(study.folder)
    results = study.folder.read_json("results.json")
    law = results["laws"]["forgetting"]
    assert law["name"] in ("injected", "replayed") and {"E", "A", "b"} <= {p["name"] for p in law["parameters"]}
    assert all(p["interval"][0] <= p["interval"][1] for p in law["parameters"])
    assert 0 < law["ratios_left_out"]["error"] < law["ratios_left_out"]["baseline"]
    assert {row["ratio"] for row in law["ratios_left_out"]["rows"]} == set(RATIOS)
    assert study.base_tokens == 900_000  # of two stages, as are the budgets: 400,000 and 1,000,000
    assert [advice["tokens"] for advice in results["advice"]] == [1_000_000, 2_000_000]
    assert all(advice["max_forgetting"] == 0.5 for advice in results["advice"])
    page = study.folder.read_text("report.html")
    assert '<section id="laws">' in page and "1,000,000 tokens, forgetting at most 0.5" in page
    view, _ = study_view(study.folder)
    assert not view.remarks


def test_why_there_is_no_law_is_said(study: Study, tmp_path: Path) -> None:
    view, _ = study_view(study.folder)  # three ratios, each other knob at the winner's value, one budget
    assert view.laws is None and "No law of replay" in view.remarks[0] and "a fit takes 4 with 3" in view.remarks[0]
    console = Console(file=io.StringIO(), width=300)
    show_study(study.folder, console=console)
    assert "No law of replay" in console.file.getvalue()  # type: ignore[attr-defined]
    (tmp_path / "other").mkdir()
    other = a_study(tmp_path / "other", space={"continual.warmup_steps": {"choice": [1, 5]}})
    Kept(other, lambda point, seed, share: Objectives(-2.0, 0.1, 1.0)).fill()
    assert study_view(other.folder)[0].remarks == [], "nothing about replay where it is not searched"


def test_what_a_law_does_not_say_is_said(tmp_path: Path) -> None:
    study = a_replay_study(tmp_path, simulated_epoching=True, objective={"kind": "weighted"})
    view, _ = study_view(study.folder)
    assert view.laws is not None and not view.advice
    assert "read different shares of the rows" in view.remarks[0] and "the laws name no ratio" in view.remarks[1]


def test_wall_clock_is_split_at_stops() -> None:
    def timed(began: float, ended: float) -> dict[str, Any]:
        return {"event": "timed", "trial": "t", "seconds": ended - began, "time": ended}

    events = [{"event": "planned", "time": 99.0}, timed(100, 110), timed(105, 120), timed(500, 530)]
    assert wall_clock(events) == {"first_to_last_event": 431.0, "with_a_turn": 50.0}
    assert wall_clock([]) == {"first_to_last_event": 0.0, "with_a_turn": 0.0}


def test_a_study_without_trials_says_so(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    with StudyLog(study):
        pass
    with pytest.raises(Exception, match="has no trial yet"):
        show_study(study.folder, console=Console(file=io.StringIO()))
