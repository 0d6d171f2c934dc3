"""A study on Ray Tune, whole: rungs, promotion, what is shared, what it leaves; and clusters of several sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from nexus_ray.config import fingerprint, load_config
from nexus_ray.errors import ConfigError
from nexus_ray.report.page import write_report
from nexus_ray.report.study_folder import write_study
from nexus_ray.tune import run_study
from tests.tuned import (
    EVERY,
    RATE,
    RATIO,
    SPACE,
    STEPS,
    base_fits,
    decided,
    events,
    finished,
    read,
    record,
    write_tiny_study,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
TOKENS = 8 * 32
"""Of a step."""


def run(file: Path) -> tuple[int, list[str]]:
    said: list[str] = []
    return run_study(file, say=said.append, report=write_report, summarise=write_study), said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four points, one at a time, two of which are promoted."""
    folder = tmp_path_factory.mktemp("study")
    code, _ = run(write_tiny_study(folder, run={"tracking__wandb": {"mode": "offline"}}))
    assert code == 0
    return folder


def trial_records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in (folder / "runs").glob("s-*-s0/run.json")]


def corpus(folder: Path) -> dict[str, int]:
    """Documents and tokens of all domains, as the manifests have them, and first models."""
    shared = folder / "runs" / "_shared"
    scored = len(list(shared.glob("base_scores/*/stage.json")))
    documents = [json.loads(file.read_text())["documents"] for file in shared.glob("documents/*/manifest.json")]
    shards = [json.loads(file.read_text())["shards"] for file in shared.glob("tokens/*/*/manifest.json")]
    tokens = sum(shard["tokens"] for own in shards for shard in own)
    return {"documents": sum(documents), "tokens": tokens, "scored": scored}


def stamps(folder: Path, *parts: str) -> dict[str, int]:
    """When each file below was last written."""
    files = (file for part in parts for file in (folder / "runs" / part).rglob("*") if file.is_file())
    return {str(file): file.stat().st_mtime_ns for file in files if file.suffix != ".lock"}


def test_half_of_the_points_are_promoted_and_all_resume_from_their_checkpoints(whole: Path) -> None:
    states = list(finished(events(whole)).values())
    assert sorted(states) == ["finished", "finished", "paused", "paused"]
    for run_ in (whole / "runs").glob("s-*-s0"):
        lines = (run_ / "metrics.jsonl").read_text().splitlines()
        done = json.loads((run_ / "run.json").read_text())["outcome"]
        assert len(lines) == {"done": STEPS, "paused": EVERY}[done], f"{run_} ({done}) trained a step twice"
    assert base_fits(whole) == base_fits(whole, "s-study") == 1, "the base is scored once, before the first trial"
    assert read(whole, "results.json")["made"] == corpus(whole), "read and encoded once for all trials"
    assert {tuple(run["made"].values()) for run in trial_records(whole)} == {(0, 0)}, "and by no trial"
    kinds = [event["event"] for event in events(whole)]
    assert kinds.index("prepared") < kinds.index("started") and kinds.count("prepared") == 1, "before it is handed out"
    timed = [event for event in events(whole) if event["event"] == "timed"]
    assert len(timed) == kinds.count("started") >= 5
    assert all(event["to_first_step_s"] > 0 for event in timed)


def test_scores_reports_and_costs_are_what_the_runs_say(whole: Path) -> None:
    trials = {trial["trial"]: trial for trial in read(whole, "results.json")["trials"]}
    assert sum(trial["tokens"] for trial in trials.values()) == (2 * STEPS + 2 * EVERY) * TOKENS
    for name, trial in trials.items():
        if trial["status"] != "finished":
            assert trial["tokens"] == EVERY * TOKENS
            continue
        scores = load_scores(whole / "runs" / f"s-{name}")
        assert trial["new"] == pytest.approx(-scores["bits_per_byte"][-1][scores["domains"].index("south")])
        assert trial["forgetting"] == pytest.approx(scores["forgetting"]["per_domain"]["north"])
    costs = {trial["cost"] for trial in trials.values() if trial["status"] == "finished"}
    assert len(costs) == 1 and costs.pop() > 0


def load_scores(run_: Path) -> dict[str, Any]:
    return json.loads((run_ / "scores.json").read_text())


def test_what_a_study_leaves_is_complete(whole: Path) -> None:
    place = record(whole)
    results = read(whole, "results.json")
    assert results["share_of_full_budgets"] == pytest.approx((2 * STEPS + 2 * EVERY) / (4 * STEPS))
    assert {"to_begin_s", "to_first_step_s", "since_last_end_s"} <= set(results["seconds_besides_training"])
    assert (place / "results.csv").read_text().count("\n") == 5 and "Pareto" in (place / "report.html").read_text()
    best = load_config(place / "best.yaml")
    [own] = [t for t in results["trials"] if t["point"] == results["winner"]]
    assert best.continual.replay_ratio == own["params"][RATIO]
    there = load_config(whole / "runs" / f"s-{own['trial']}" / "config.yaml")
    assert fingerprint(best) == fingerprint(there) and best.name != there.name
    written = {path.name for path in (place / "wandb" / "written").iterdir()}
    assert {f"trial-{name}" for name in finished(events(whole))} == written


@pytest.mark.slow
def test_a_wider_space_goes_on_without_touching_what_is_done(whole: Path) -> None:
    """Nothing is tokenised again, nothing finished is run again, no logged event changes."""
    before = events(whole)
    shared = stamps(whole, "_shared/documents", "_shared/tokens", "_shared/tokenizers", "_shared/base_scores")
    runs = stamps(whole, *(f"s-{name}/stages" for name, state in finished(before).items() if state == "finished"))
    wider = {**SPACE, RATIO: {"choice": [0.0, 0.25, 0.1]}}
    changes = {"search": {"kind": "grid"}, "space": {RATIO: wider[RATIO], RATE: SPACE[RATE]}}
    code, said = run(write_tiny_study(whole, run={"tracking__wandb": {"mode": "offline"}}, **changes))
    assert code == 0
    after = events(whole)
    assert after[: len(before)] == before and len(finished(after)) == 6
    assert {**stamps(whole, "_shared/documents", "_shared/tokens", "_shared/tokenizers")}.items() <= shared.items()
    assert runs.items() <= stamps(whole, *(f"s-{name}/stages" for name in finished(before))).items()
    assert not [line for line in said if line.startswith(("documents", "tokens", "tokenizer"))]
    assert base_fits(whole) == 1
    assert read(whole, "results.json")["made"] == corpus(whole)
    assert {tuple(run["made"].values()) for run in trial_records(whole)} == {(0, 0)}


@pytest.mark.slow
def test_a_trial_that_fails_is_recorded_and_leaves_the_others_alone(whole: Path) -> None:
    """The other one is, under another name, a trial that finished undisturbed, and comes to the same scores."""
    strict = {"continual.max_forgetting": 1e-9, "continual.on_forgetting": "stop", RATIO: 0.0}
    undisturbed = next(t for t in read(whole, "results.json")["trials"] if t["status"] == "finished")
    space = {"gate": {"options": {"bad": strict, "fine": undisturbed["params"]}}}
    file = write_tiny_study(whole, name="gate", space=space, stopping={"rule": "none"})
    code, said = run(file)
    assert code == 1
    before = events(whole, "gate")
    states = finished(before)
    assert sorted(states.values()) == ["failed", "finished"]
    assert any("failed" in line and "max_forgetting" in line for line in said)
    [survivor] = [trial for trial, state in states.items() if state == "finished"]
    scores = load_scores(whole / "runs" / f"gate-{survivor}")
    assert scores == load_scores(whole / "runs" / f"s-{undisturbed['trial']}")
    again, _ = run(file)
    assert again == 1 and decided(events(whole, "gate")) == decided(before)
    assert [e["event"] for e in events(whole, "gate")].count("started") == 2, "a failed trial is not run by itself"


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[int]:
    ray.shutdown()
    ray.init(address="local", num_cpus=request.param, include_dashboard=False, log_to_driver=False)
    yield request.param
    ray.shutdown()


CLUSTERS = [pytest.param(count, marks=pytest.mark.slow) for count in (3, 4, 6)]


@pytest.mark.parametrize("cluster", CLUSTERS, indirect=True)
def test_more_trials_than_find_room_wait_their_turn(cluster: int, tmp_path: Path) -> None:
    """No deadlock, and as many at once as the cluster holds: one of 3 or 4 CPUs, two of 6."""
    space = {RATIO: {"choice": [0.0, 0.1, 0.25]}}
    file = write_tiny_study(tmp_path, space=space, stopping={"rule": "none"}, max_concurrent=None)
    code, said = run(file)
    assert code == 0 and list(finished(events(tmp_path)).values()) == ["finished"] * 3
    at_once = 2 if cluster == 6 else 1
    assert f"{at_once} trial{'s' if at_once > 1 else ''} at once" in said[0]
    assert most_at_once(tmp_path) == at_once
    left = [group for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
    assert not left, "a turn left its placement group behind"


def most_at_once(folder: Path) -> int:
    running = most = 0
    for event in events(folder):
        running += (event["event"] == "started") - (event["event"] == "timed")
        most = max(most, running)
    return most


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_a_cluster_without_room_for_one_trial_is_refused(cluster: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"one trial takes 1 workers x 1 CPUs.*2 CPUs"):
        run(write_tiny_study(tmp_path))
    assert not record(tmp_path).exists()
