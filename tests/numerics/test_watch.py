"""A watched stage reports its evaluations, pauses as it is told, and goes on exactly.

The real worker loop over DeepSpeed and gloo; without Ray.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config.tree import RunConfig
from nexus_ray.train.loop import StageJob
from nexus_ray.train.watch import Answer, Evaluated, Spent, Watch
from tests.controlled import EVERY, STEPS, Shift
from tests.stage import ROWS, SEQ_LEN, metrics, run_folder, stage_folder

PAUSE_AT = 4 * EVERY
BEFORE = Spent(steps=100, tokens=5_000, operations=2e6)


@dataclass(frozen=True)
class Notes:
    """A watcher that writes down what it is told."""

    file: Path
    pause_at: int | None = None

    def __call__(self, evaluated: Evaluated) -> Answer:
        with self.file.open("a") as out:
            out.write(json.dumps(asdict(evaluated)) + "\n")
        return "pause" if evaluated.step == self.pause_at else "continue"

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def shift(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Shift]:
    made = Shift(tmp_path_factory.mktemp("watched"), world=request.param)
    yield made
    made.close()


def watched(shift: Shift, notes: Notes) -> Callable[[StageJob], dict[str, Any]]:
    """`fit` of a stage that is watched: its first domain lost 0.01 before it, and it learns the second."""
    watch = Watch(notes, ("two",), {"one": 0.01}, BEFORE, 7.0, start_known=False)
    return lambda job: shift.workers.run(replace(job, watch=watch))


def whole(shift: Shift, name: str) -> tuple[RunConfig, dict[str, Any], Notes]:
    config, notes = shift.config(name), Notes(shift.root / f"{name}.jsonl")
    return config, shift.run(config, watched(shift, notes)), notes


def test_a_paused_stage_goes_on_exactly_and_reports_the_same(shift: Shift) -> None:
    _, expected, notes = whole(shift, "whole")
    paused = shift.config("paused")
    first = Notes(shift.root / "paused.jsonl", pause_at=BEFORE.steps + PAUSE_AT)
    result = shift.run(paused, watched(shift, first))
    assert (result["held"], result["step"]) == ("pause", PAUSE_AT)
    assert max(metrics(paused, 1)) == PAUSE_AT and not (stage_folder(paused, 1) / "evaluation.npz").exists()
    rest = replace(first, pause_at=None)
    result = shift.run(paused, watched(shift, rest))
    assert result["weights"] == expected["weights"]
    lines = (run_folder(paused) / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if '"stage_index": 1' in line]) == STEPS, "a step was done twice"
    told = rest.read()
    assert told == notes.read() and [each["step"] - BEFORE.steps for each in told] == list(range(EVERY, STEPS, EVERY))


def test_what_is_told_is_what_was_measured(shift: Shift) -> None:
    config, _, notes = whole(shift, "told")
    lines = metrics(config, 1)
    for each in notes.read():
        step = each["step"] - BEFORE.steps
        line = lines[step]
        assert each["tokens"] == BEFORE.tokens + step * ROWS * SEQ_LEN
        assert each["new"] == -line["eval/bits_per_byte/two"]
        assert each["cost"] == BEFORE.operations + 7.0 * step * ROWS * SEQ_LEN
        assert each["signals"] == {"loss": line["train/loss"], "grad_norm": line["train/grad_norm"]}
    first, last = notes.read()[0], notes.read()[-1]
    assert last["forgetting"] > 0.01 and last["new"] > first["new"]


def test_watching_changes_no_number(shift: Shift) -> None:
    plain = shift.config("plain")
    expected = shift.run(plain)
    _, result, _ = whole(shift, "seen")
    assert result["weights"] == expected["weights"]
