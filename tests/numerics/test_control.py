"""A controlled stage is exact: it holds its bound, repeats from its plan, and goes on wherever it was killed.

The real worker loop over DeepSpeed and gloo, the real plan file, controller and driver's side; without Ray.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config.tree import RunConfig
from nexus_ray.errors import ForgettingError
from nexus_ray.train.schedule import stage_factors
from tests.controlled import EVERY, STEPS, Shift, actions, log
from tests.stage import checkpoints, column, metrics, run_folder, stage_folder

BOUND = 0.04
"""Bits per byte; with 2 % replay throughout, the first domain loses 0.057."""
EXACT = ("train/loss", "train/loss/one", "train/loss/two", "train/grad_norm", "train/lr", "data/batch_hash")


@pytest.fixture(scope="module")
def shift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shift]:
    made = Shift(tmp_path_factory.mktemp("shift"))
    yield made
    made.close()


def controlled(shift: Shift, name: str, **changes: Any) -> RunConfig:
    return shift.config(name, **{"continual__on_forgetting": "control", "continual__max_forgetting": BOUND, **changes})


@pytest.fixture(scope="module")
def held(shift: Shift) -> tuple[RunConfig, dict[str, Any]]:
    """An undisturbed controlled run."""
    config = controlled(shift, "held")
    return config, shift.run(config)


def plan(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder(config) / "plan.jsonl").read_text().splitlines()]


def same(config: RunConfig, reference: RunConfig, result: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every step, the weights, the scores, the plan."""
    mine, theirs = metrics(config, 1), metrics(reference, 1)
    assert sorted(mine) == sorted(theirs) == list(range(1, STEPS + 1))
    for key in EXACT:
        found = [(line.get(key), theirs[step].get(key)) for step, line in mine.items()]
        assert all(a == b for a, b in found), key
    assert result["weights"] == expected["weights"]
    name = "evaluation.npz"
    assert (stage_folder(config, 1) / name).read_bytes() == (stage_folder(reference, 1) / name).read_bytes()
    assert (run_folder(config) / "plan.jsonl").read_bytes() == (run_folder(reference) / "plan.jsonl").read_bytes()


# --- it holds the bound -----------------------------------------------------------------------------------------------


def test_a_strong_shift_is_held_under_its_bound_that_breaks_without_control(shift: Shift, held: Any) -> None:
    free = shift.config("free", continual__on_forgetting="warn", continual__max_forgetting=BOUND)
    shift.run(free)
    assert shift.forgotten(free) > 1.3 * BOUND
    config, result = held
    assert 0 < shift.forgotten(config) <= BOUND
    assert result["steps"] == STEPS, "the whole budget is spent"
    assert 2 <= len(actions(config)) <= 8


def test_the_log_the_plan_and_the_metrics_say_the_same(held: Any) -> None:
    config, _ = held
    lines, mine = log(config), [line for line in plan(config) if line["stage"] == "two"]
    assert sorted(lines) == list(range(EVERY, STEPS, EVERY))
    first = mine[0]["start_row"]
    assert [(line["start_row"] - first) // 12 for line in mine[1:]] == [a["step"] for a in actions(config)]
    assert [(line["replay_ratio"], line["lr_factor"]) for line in mine[1:]] == [
        (a["replay_ratio"], a["lr_factor"]) for a in actions(config)
    ]
    assert all(line["start_row"] + line["rows"] == first + STEPS * 12 for line in mine)
    for step, line in metrics(config, 1).items():
        if step in lines:
            assert line["control/forgetting/one"] == lines[step]["forgetting"]["one"]
            assert line["control/replay_ratio"] == lines[step]["replay_ratio"]
    drift = lines[EVERY]["forgetting"]["one"]
    assert drift == pytest.approx(metrics(config, 1)[EVERY]["eval/bits_per_byte/one"] - start(config), abs=1e-12)


def start(config: RunConfig) -> float:
    from nexus_ray.evaluate.scores import scores_from_bytes

    return scores_from_bytes((stage_folder(config, 1) / "start.npz").read_bytes())["one"].bits_per_byte


def test_the_replayed_rows_are_those_of_the_plan(held: Any) -> None:
    """The share of replay rises where the plan says so."""
    config, _ = held
    fraction = column(config, "train/replay_fraction", 1)
    ratio = {a["step"]: a["replay_ratio"] for a in actions(config)}
    last = max(ratio)
    rows = [fraction[last - 1] * last, fraction[-1] * STEPS]
    assert (rows[1] - rows[0]) / (STEPS - last) == pytest.approx(ratio[last], abs=1 / (12 * (STEPS - last)) + 1e-9)


# --- it repeats from its plan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"continual__on_forgetting": "control"},
        {"continual__on_forgetting": "warn", "evaluation__every_steps": None, "continual__max_forgetting": None},
    ],
    ids=["controlled", "uncontrolled"],
)
def test_a_run_that_follows_the_recorded_plan_repeats_it(shift: Shift, held: Any, changes: dict[str, Any]) -> None:
    """The stream is a function of the plan alone: with it, and nothing else of the first run, every loss is the same,
    whether the stage is controlled and evaluated again or neither."""
    reference, expected = held
    again = controlled(shift, "again" + changes["continual__on_forgetting"], **changes)
    shift.first_stage(again)
    shutil.copy(run_folder(reference) / "plan.jsonl", run_folder(again))
    same(again, reference, shift.run(again), expected)
    if changes["continual__on_forgetting"] == "control":
        assert {**log(again)[45], "action": None} == {**log(reference)[45], "action": None}
        assert {a["reason"] for a in actions(again)} == {"as the recorded plan says"}


def test_the_learning_rate_factor_of_a_segment_is_that_of_its_steps(shift: Shift) -> None:
    config = controlled(shift, "slower", continual__max_forgetting=0.025)
    shift.run(config)
    lower = [a for a in actions(config) if a["kind"] == "learning_rate"]
    assert lower, "a bound this low needs the learning rate too"
    factors = stage_factors(config, 1)
    in_force = {0: 1.0} | {a["step"]: a["lr_factor"] for a in actions(config)}
    for step, line in metrics(config, 1).items():
        factor = in_force[max(at for at in in_force if at < step)]
        assert line["train/lr"] == config.training.learning_rate * factor * factors[step - 1]


# --- it goes on wherever it was killed --------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of the process."""


def rewind(config: RunConfig, *, to_step: int, plan_steps: int, log_steps: int) -> None:
    """Leave checkpoints up to `to_step`, plan lines of actions up to `plan_steps` and log lines up to `log_steps`."""
    folder = run_folder(config)
    for step, place in checkpoints(config, 1).items():
        if step > to_step:
            shutil.rmtree(place)
    lines = plan(config)
    first = next(line["start_row"] for line in lines if line["stage"] == "two")
    kept = [line for line in lines if line["stage"] == "one" or (line["start_row"] - first) // 12 <= plan_steps]
    (folder / "plan.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    logged = [json.loads(line) for line in (folder / "control.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line) + "\n" for line in logged if line["step"] <= log_steps)
    (folder / "control.jsonl").write_text(text)
    measured = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in measured if line["stage"] == "one" or line["step"] <= max(to_step, log_steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for name in ("evaluation.npz", "stage.json"):
        (stage_folder(config, 1) / name).unlink(missing_ok=True)


def copied(shift: Shift, held: RunConfig, name: str) -> RunConfig:
    config = controlled(shift, name)
    shutil.copytree(run_folder(held), run_folder(config))
    return config


MOMENTS: dict[str, Callable[[int, int], dict[str, int]]] = {
    "logged, not saved": lambda at, before: {"to_step": at - 1, "plan_steps": at - 1, "log_steps": at},
    "saved, not planned": lambda at, before: {"to_step": at, "plan_steps": at - 1, "log_steps": at},
    "planned, not begun": lambda at, before: {"to_step": at, "plan_steps": at, "log_steps": at},
    "thrown far back": lambda at, before: {"to_step": before, "plan_steps": at, "log_steps": at},
    "nothing saved yet": lambda at, before: {"to_step": 0, "plan_steps": at, "log_steps": at},
    "after the next evaluation": lambda at, before: {"to_step": at, "plan_steps": at, "log_steps": at + EVERY},
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow, id="first"), pytest.param(-1, id="last")])
def test_a_kill_at_any_moment_around_an_action_changes_nothing(
    shift: Shift, held: Any, moment: str, which: int
) -> None:
    reference, expected = held
    taken = [0, *(a["step"] for a in actions(reference))]
    at = taken[1:][which]
    config = copied(shift, reference, f"{moment.replace(' ', '-').replace(',', '')}{which}")
    rewind(config, **MOMENTS[moment](at, taken[taken.index(at) - 1]))
    result = shift.run(config)
    same(config, reference, result, expected)
    assert log(config) == log(reference)


def test_a_torn_last_line_of_the_log_is_decided_again(shift: Shift, held: Any) -> None:
    reference, expected = held
    at = actions(reference)[1]["step"]
    config = copied(shift, reference, "torn")
    rewind(config, to_step=at - 1, plan_steps=at - 1, log_steps=at)
    file = run_folder(config) / "control.jsonl"
    file.write_text(file.read_text()[:-20])
    same(config, reference, shift.run(config), expected)


def test_a_worker_that_is_restarted_after_saving_hands_its_decision_over(shift: Shift, held: Any) -> None:
    """Ray Train restarts dead workers with the plan they had: one that finds a logged action at its own checkpoint
    must not train on."""
    reference, expected = held
    at = actions(reference)[1]["step"]
    config = copied(shift, reference, "restarted")
    rewind(config, to_step=at, plan_steps=at - 1, log_steps=at - 1)
    lines = [line for line in log(reference).values() if line["step"] == at]
    seen: list[int] = []

    def fit(job: Any) -> dict[str, Any]:
        if not seen:  # the driver has looked at the log before; now the worker that died had written it
            with (run_folder(config) / "control.jsonl").open("a") as file:
                file.write(json.dumps({**lines[0], "time": 0.0}) + "\n")
        result = shift.workers.run(job)
        seen.append(result.get("step", STEPS))
        return result

    result = shift.run(config, fit)
    assert seen[0] == at
    same(config, reference, result, expected)


def test_an_undisturbed_second_call_of_a_stopped_stage_stops_again(shift: Shift) -> None:
    """Neither replay nor learning rate may be used: the stage stops, with a checkpoint, and says what to do."""
    settings = {
        "continual__replay_ratio": 0.0,
        "continual__max_forgetting": 0.01,
        "continual__control": {"max_replay_ratio": 0.02, "min_lr_factor": 0.9, "min_replay_ratio": 0.0},
    }
    config = controlled(shift, "stopped", **settings)
    for _ in range(2):
        with pytest.raises(ForgettingError, match=r"max_forgetting=0.01 cannot be held in stage 'two'.*max_replay_rat"):
            shift.run(config)
    stop = actions(config)[-1]
    assert stop["kind"] == "stop" and max(metrics(config, 1)) == stop["step"] == max(checkpoints(config, 1))
    assert not (stage_folder(config, 1) / "evaluation.npz").exists()


def test_two_workers_decide_the_same_and_share_the_plan(shift: Shift, tmp_path: Path) -> None:
    pair = Shift(tmp_path, world=2)
    try:
        config = controlled(pair, "pair")
        result = pair.run(config)
        assert result["steps"] == STEPS and pair.forgotten(config) <= BOUND and actions(config)
        assert len(log(config)) == (STEPS - 1) // EVERY
    finally:
        pair.close()
