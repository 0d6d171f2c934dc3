"""The main job, whole: its record is as documented, its models load anywhere, and the same config gives the same
bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config import load_config, parse_config
from nexus_ray.errors import ConfigError, ForgettingError
from nexus_ray.report.page import write_report
from nexus_ray.roadmap import RunOutcome, evaluate_run, run_roadmap
from nexus_ray.session import ray_session
from tests.chats import conversations, talk, write_jsonl
from tests.roadmaps import tiny_roadmap

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Ray session, and one storage, for the module."""
    place = tmp_path_factory.mktemp("roadmaps")
    with ray_session(tiny_roadmap(place)):
        yield place


@pytest.fixture(scope="module")
def whole(folder: Path) -> RunOutcome:
    """Two stages, with from-scratch runs for forward transfer."""
    config = tiny_roadmap(folder, name="whole", evaluation__forward_transfer=True)
    return run_roadmap(config, report=write_report)


def read(outcome: RunOutcome, *parts: str) -> Any:
    return json.loads(outcome.folder.read_text(*parts))


def test_every_step_is_a_line_and_every_artefact_is_in_its_place(whole: RunOutcome) -> None:
    lines = [json.loads(line) for line in whole.folder.read_text("metrics.jsonl").splitlines()]
    mine = [(line["stage"], line["step"]) for line in lines if not line["stage"].startswith("scratch")]
    assert mine == [(stage, step) for stage in ("north", "south") for step in range(1, 13)]
    for line in lines:
        assert {"train/loss", "train/lr", "train/replay_fraction", "perf/tokens_per_second", "tokens"} <= set(line)
    assert "eval/bits_per_byte/north" in lines[5]
    run = read(whole, "run.json")
    assert run["outcome"] == "done" and run["fingerprint"] == whole.fingerprint
    assert run["data"]["north"]["license"] == "CC0-1.0"
    assert whole.folder.exists("report.html") and whole.folder.exists("config.yaml")
    plan = [json.loads(line) for line in whole.folder.read_text("plan.jsonl").splitlines()]
    assert [(s["stage"], s["start_row"], s["rows"], s["weights"]) for s in plan] == [
        ("north", 0, 96, {"north": 1}),
        ("south", 96, 96, {"north": 1, "south": 3}),
    ]


def test_learning_forgetting_and_transfer_are_in_the_matrix(whole: RunOutcome) -> None:
    scores = read(whole, "scores.json")
    assert scores == whole.scores
    assert (scores["domains"], scores["stages"]) == (["north", "south"], ["base", "north", "south"])
    bits = scores["bits_per_byte"]
    assert bits[1][0] < bits[0][0] and bits[2][1] < bits[1][1], "a stage lowers its own domain's bits per byte"
    best = min(bits[0][0], bits[1][0])
    assert scores["forgetting"]["per_domain"]["north"] == pytest.approx(bits[2][0] - best)
    assert scores["backward_transfer"] == pytest.approx(bits[1][0] - bits[2][0])
    assert set(scores["forward_transfer"]) == {"south"}


def test_every_export_loads_in_plain_transformers_and_generates(whole: RunOutcome) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for stage in ("00-north", "01-south"):
        place = whole.folder.local_path / "stages" / stage / "model"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
        ids = tokenizer("kato mire", return_tensors="pt")
        assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]


@pytest.mark.slow
def test_the_saved_config_under_another_name_gives_the_same_bytes(folder: Path, whole: RunOutcome) -> None:
    again = load_config(whole.folder.local_path / "config.yaml", ["name=again"])
    other = run_roadmap(again)
    for file in ("scores.json", "plan.jsonl"):
        assert other.folder.read_bytes(file) == whole.folder.read_bytes(file)


def test_a_finished_run_is_not_run_again_and_another_config_is_refused(folder: Path, whole: RunOutcome) -> None:
    before = whole.folder.read_bytes("metrics.jsonl")
    same = run_roadmap(tiny_roadmap(folder, name="whole", evaluation__forward_transfer=True))
    assert same.folder.read_bytes("metrics.jsonl") == before
    with pytest.raises(ConfigError, match=r"name='whole'.*another config.*name=\.\.\."):
        run_roadmap(tiny_roadmap(folder, name="whole", seed=1))


@pytest.mark.slow
def test_scoring_the_exports_again_gives_the_same_scores(folder: Path, whole: RunOutcome) -> None:
    config = tiny_roadmap(folder, name="whole", evaluation__forward_transfer=True)
    before = whole.folder.read_bytes("scores.json")
    assert evaluate_run(config).scores == json.loads(before)


def test_the_gate_repeats_a_stage_with_more_replay_and_stops_the_run_when_that_does_not_help(folder: Path) -> None:
    config = tiny_roadmap(
        folder,
        name="retried",
        continual__max_forgetting=0.0001,
        continual__replay_ratio=0.0,
        continual__on_forgetting="retry",
        continual__max_retries=1,
        evaluation__every_steps=None,
    )
    with pytest.raises(ForgettingError, match=r"continual.max_forgetting=0.0001: after stage 'south', domain 'north'"):
        run_roadmap(config)
    assert json.loads((folder / "runs" / "retried" / "run.json").read_text())["outcome"] == "stopped"
    place = folder / "runs" / "retried"
    plan = [json.loads(line) for line in (place / "plan.jsonl").read_text().splitlines()]
    assert [(s["stage"], s["attempt"], s["replay_ratio"]) for s in plan] == [
        ("north", 0, 0.0),
        ("south", 0, 0.0),
        ("south", 1, 0.02),
    ]
    assert (place / "stages" / "01-south.attempt0" / "stage.json").exists()
    assert json.loads((place / "stages" / "01-south" / "stage.json").read_text())["gate"]["action"] == "stop"


@pytest.mark.slow
def test_a_progressive_stage_and_a_stage_s_own_settings(folder: Path) -> None:
    config = tiny_roadmap(
        folder,
        name="progressive",
        continual__curriculum="progressive",
        continual__progressive_steps=4,
        evaluation__every_steps=None,
        stages__1__override={"training.learning_rate": 1.0e-3, "training.zero_stage": 1},
    )
    outcome = run_roadmap(config)
    plan = [json.loads(line) for line in outcome.folder.read_text("plan.jsonl").splitlines()]
    ratios = [s["replay_ratio"] for s in plan if s["stage"] == "south"]
    assert ratios == sorted(ratios, reverse=True) and sum(ratios) / 4 == pytest.approx(0.25)
    lines = [json.loads(line) for line in outcome.folder.read_text("metrics.jsonl").splitlines()]
    assert max(line["train/lr"] for line in lines if line["stage"] == "south") == pytest.approx(1e-3)
    assert outcome.scores["bits_per_byte"][2][1] < outcome.scores["bits_per_byte"][1][1]


def test_a_fine_tuning_stage_learns_answers_and_replays_text(folder: Path) -> None:
    """Text, then conversations with replayed text, in one roadmap; the export chats."""
    from transformers import AutoTokenizer

    write_jsonl(folder / "chat.jsonl", conversations(200, words=3, turns=1))
    base = tiny_roadmap(folder, name="sft", training__seq_len=64, training__global_batch_tokens=512)
    data = base.model_dump(mode="json")
    data["domains"]["south"] |= {
        "format": "chat",
        "source": {"kind": "files", "paths": [str(folder / "chat.jsonl")], "split_on": None},
    }
    data["stages"][1]["kind"] = "sft"
    outcome = run_roadmap(parse_config(data), report=write_report)
    bits = outcome.scores["bits_per_byte"]
    assert bits[2][1] < bits[1][1], "the answers are learned"
    assert read(outcome, "run.json")["data"]["south"]["stats"]["packing_efficiency"] > 0.5
    samples = {each["domain"]: each for each in read(outcome, "stages", "01-south", "samples.json")}
    assert samples["south"]["prompt"].endswith("### Assistant\n")
    tokenizer = AutoTokenizer.from_pretrained(outcome.folder.local_path / "stages" / "01-south" / "model")
    assert tokenizer.apply_chat_template(talk("king?"), tokenize=False, add_generation_prompt=True).endswith("nt\n")
